"""`runtime/serve/ingress.py` and `retries.py`: the ingress where replicas are lost, full or at fault: no request is
lost. Streams are in `test_ingress_streams.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import chain, repeat
from typing import Any

import httpx2 as httpx
import pytest
from helpers.replicas import FULL, IMAGES, LOST, Replicas, body, with_ingress
from latentrt.runtime.serve import retries
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head, HostedModel
from latentrt.runtime.serve.schema import Limits

BROKEN = Deployed.of({"models": [{"id": "cat", "source": "helpers.ray_runner:broken"}]})
REFUSED = Head(429, ((b"content-type", b"application/json"), (b"retry-after", b"2")))


def test_a_lost_replica_loses_no_request_and_the_seed_stays() -> None:
    replicas = Replicas(0, 1, None)  # before the head, after it, not at all

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(n=2))
        assert answer.status_code == 200
        seeds = [sent["seed"] for sent in replicas.bodies()]
        assert len(seeds) == 3
        assert len(set(seeds)) == 1
        assert [image["seed"] for image in answer.json()["data"]] == [seeds[0], seeds[0] + 1]
        ids = {dict(request.headers)[b"x-request-id"].decode() for _, request in replicas.sent}
        assert ids == {answer.headers["x-request-id"]}
        other = await client.post(IMAGES, json=body())
        assert other.json()["data"][0]["seed"] != seeds[0]

    with_ingress(replicas, test)


def test_a_retried_request_skips_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica that makes it after another was lost does not ask again whether there is time enough."""
    seen = []
    submit = AsyncEngine.submit

    def watched(engine: AsyncEngine, *requests: Any, **options: Any) -> Any:
        seen.append(options["again"])
        return submit(engine, *requests, **options)

    monkeypatch.setattr(AsyncEngine, "submit", watched)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(), headers={"latentrt.taken_before": "1"})
        assert answer.status_code == 200

    with_ingress(Replicas(0, 1), test)
    assert seen == [False, True, True]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_that_was_given_is_kept(seed: int) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(seed=seed))).json()["data"][0]["seed"] == seed

    with_ingress(Replicas(0), test)


def test_what_kills_every_replica_is_given_up() -> None:
    replicas = Replicas(*[0] * 9)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "replica_lost"
        assert len(replicas.sent) == 4

    with_ingress(replicas, test, tries=4)


def test_a_replica_that_is_not_ready_sends_on_to_the_next() -> None:
    replicas = Replicas()
    well = replicas.send

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        if not replicas.sent:
            replicas.sent.append((model, request))
            unwell = HostedModel(BROKEN.models[0], BROKEN, ())
            await unwell.start()
            assert unwell.fault is None  # it never was well: another process would be no better
            assert (
                unwell.service.reason == "the model does not load: 'no-model' is not a local folder or file"
            )
            async for part in unwell.answer(request):
                yield part
            await unwell.stop()
        else:
            async for part in well(model, request):
                yield part

    replicas.send = send  # type: ignore[method-assign]

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body())).status_code == 200
        assert len(replicas.sent) == 2

    with_ingress(replicas, test)


def test_the_deadline_counts_from_acceptance() -> None:
    replicas = Replicas(0, 0, None)

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(timeout=500))).status_code == 200
        times = [sent["timeout"] for sent in replicas.bodies()]
        assert 500 >= times[0] > times[1] > times[2] > 300
        replicas.losses = [0]
        late = await client.post(IMAGES, json=body(timeout=1e-9))
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")

    with_ingress(replicas, test)


@pytest.mark.parametrize("timeout", ["1" + "0" * 400, "600.5", "1e400", "NaN", "0", "-1", "true", "[1]"])
def test_unusable_timeouts_get_422(timeout: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        content = f'{{"prompt": "x", "timeout": {timeout}}}'
        answer = await client.post(IMAGES, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "timeout")

    with_ingress(Replicas(), test)


def ending(replicas: Replicas, ends: Iterable[Exception | Head | None]) -> None:
    """What tries come to before they reach a replica; None is an answer with nothing in it."""
    well, to_come = replicas.send, iter(ends)

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        try:
            end = next(to_come)
        except StopIteration:
            async for part in well(model, request):
                yield part
            return
        replicas.sent.append((model, request))
        if isinstance(end, Exception):
            raise end
        if end is not None:
            yield end
            yield b"{}"

    replicas.send = send  # type: ignore[method-assign]


@pytest.mark.parametrize("full", [FULL, REFUSED])
def test_what_was_taken_waits_where_the_others_are_full(full: Exception | Head) -> None:
    """However often: only replicas that are lost are counted."""
    replicas = Replicas()
    ending(replicas, [LOST, full, full, full, LOST, full])

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(seed=9))
        assert answer.status_code == 200
        assert answer.json()["data"][0]["seed"] == 9
        assert len(replicas.sent) == 7

    with_ingress(replicas, test, tries=3)


@pytest.mark.parametrize("given", [{"timeout": 0.2}, {}])
def test_it_waits_no_longer_than_it_has_time(given: dict[str, float]) -> None:
    """Its own, or the server's."""
    replicas = Replicas()
    ending(replicas, chain([LOST], repeat(REFUSED)))

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(**given))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert len(replicas.sent) > 2

    with_ingress(replicas, test, limits=Limits(timeout=600.0 if given else 0.2))


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_covers_waiting_for_a_place_or_a_model(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_GRACE", 0.1)
    replicas = Replicas()

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        await asyncio.sleep(5)
        yield Head(200)

    replicas.send = send  # type: ignore[method-assign]

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(timeout=0.2, stream=stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")

    with_ingress(replicas, test)


@pytest.mark.parametrize("full", [FULL, REFUSED])
def test_full_replicas_answer_429_without_a_retry(full: Exception | Head) -> None:
    replicas = Replicas()
    ending(replicas, repeat(full))

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        assert len(replicas.sent) == 1

    with_ingress(replicas, test)


def test_a_fault_of_a_replica_is_internal_and_hides_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing of what it says, which is for the log. It is tried once: it would be the same again."""
    replicas = Replicas()
    ending(replicas, [RuntimeError("the secret"), None])

    async def test(client: httpx.AsyncClient) -> None:
        for k in (1, 2):
            caplog.clear()
            answer = await client.post(IMAGES, json=body(), headers={"x-request-id": f"mine-{k}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"] == f"mine-{k}"
            (record,) = (record for record in caplog.records if record.exc_info)
            assert record.fields["request_id"] == f"mine-{k}"  # type: ignore[attr-defined]
        assert len(replicas.sent) == 2

    with_ingress(replicas, test)
