"""The ingress before replicas, without Ray: replicas are applications in this process, lost on command."""

from __future__ import annotations

import asyncio
import json
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from importlib import resources
from itertools import chain, repeat
from typing import Any

import httpx2 as httpx
import pytest
import ray_runner
import yaml
from fake_runner import FakeRunner, in_loop
from latentrt.errors import QueueFullError, RequestError
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head, HostedModel
from latentrt.runtime.serve.ingress import Ingress, ReplicaLostError
from latentrt.runtime.serve.schema import Limits
from ray_runner import HELD
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

Run = Callable[..., tuple[int, str, str]]
IMAGES = "/v1/images/generations"
DEPLOYED = Deployed.of(
    {"models": [{"id": "cat", "source": "ray_runner:quick"}, {"id": "dog", "source": "ray_runner:quick"}]}
)
BROKEN = Deployed.of({"models": [{"id": "cat", "source": "ray_runner:broken"}]})


class Replicas:
    """`losses`: of each try to come, the parts of the answer that arrive before the replica dies; None for no death.

    Attributes:
        sent: (model, request) of each try.
    """

    def __init__(self, *losses: int | None) -> None:
        self.losses = list(losses)
        self.sent: list[tuple[str, Forwarded]] = []
        self.hosted: dict[str, HostedModel] = {}

    async def __aenter__(self) -> Replicas:
        for settings in DEPLOYED.models:
            self.hosted[settings.id] = HostedModel(settings, DEPLOYED, ())
            await self.hosted[settings.id].start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for hosted in self.hosted.values():
            await hosted.stop()

    async def send(self, model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        self.sent.append((model, request))
        left = self.losses.pop(0) if self.losses else None
        async with aclosing(self.hosted[model].answer(request)) as parts:
            async for part in parts:
                if left == 0:
                    raise ReplicaLostError("the replica was lost")
                yield part
                left = None if left is None else left - 1
            if left is not None:
                raise ReplicaLostError("the replica was lost")

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for _, request in self.sent]


def asked(
    replicas: Replicas,
    test: Callable[[httpx.AsyncClient], Awaitable[None]],
    **options: Any,
) -> None:
    """Run a test against an ingress over these replicas."""

    async def run() -> None:
        async with replicas:
            ingress = Ingress(["cat", "dog"], replicas.send, **{"pause": 0.001, **options})

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await (await ingress.answer(Request(scope, receive)))(scope, receive, send)

            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                await test(client)

    in_loop(run())


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", "steps": 3, **fields}


def told(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.count("[DONE]") <= 1
    return [json.loads(line) for line in lines if line != "[DONE]"]


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

    asked(replicas, test)


def test_a_request_is_let_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
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

    asked(Replicas(0, 1), test)
    assert seen == [False, True, True]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_that_was_given_is_kept(seed: int) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(seed=seed))).json()["data"][0]["seed"] == seed

    asked(Replicas(0), test)


def test_what_kills_every_replica_is_given_up() -> None:
    replicas = Replicas(*[0] * 9)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "replica_lost"
        assert len(replicas.sent) == 4

    asked(replicas, test, tries=4)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_stream_goes_on_at_another_replica_and_tells_nothing_twice(after: int) -> None:
    """It is lost after so many pieces: its head, and events."""
    replicas = Replicas(after)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(n=2, stream=True, steps=8))
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = told(answer)
        made = [event["image"] for event in events if event["type"] == "image_generation.completed"]
        assert sorted(made) == [0, 1]
        for image in (0, 1):
            steps = [event["step"] for event in events if event["image"] == image and "step" in event]
            assert steps == sorted(set(steps))
        assert answer.text.endswith("data: [DONE]\n\n")
        assert len({sent["seed"] for sent in replicas.bodies()}) == 1
        assert len(replicas.sent) == 2

    asked(replicas, test)


def test_a_stream_that_no_replica_ends_says_so() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        events = told(await client.post(IMAGES, json=body(stream=True)))
        assert events[-1]["error"]["code"] == "replica_lost"

    asked(Replicas(*[2] * 9), test, tries=3)


def test_half_an_event_is_not_told() -> None:
    event = b'event: x\ndata: {"type": "image_generation.partial_image", "image": 0, "step": 1}\n\n'

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        yield Head(200, ((b"content-type", b"text/event-stream"),))
        if not tried:
            tried.append(1)
            yield event[:20]
            raise ReplicaLostError("the replica was lost")
        yield event + b"data: [DO"
        yield b"NE]\n\n"

    tried: list[int] = []
    replicas = Replicas()
    replicas.send = send  # type: ignore[method-assign]

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(stream=True))).content == event + b"data: [DONE]\n\n"

    asked(replicas, test)


def test_what_is_refused_is_refused_once_by_the_application() -> None:
    replicas = Replicas()

    async def test(client: httpx.AsyncClient) -> None:
        for content, status in ((b"{", 400), (b"[1]", 422), (b"[" * 5000, 400), (b"{}", 422)):
            replicas.sent.clear()
            answer = await client.post(IMAGES, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status
            assert len(replicas.sent) == 1
        unknown = await client.post(IMAGES, json=body(model="fish"))
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
        replicas.sent.clear()
        long = await client.post(IMAGES, content=b"x" * 6001)
        assert (long.status_code, long.json()["error"]["param"]) == (413, "prompt")
        assert replicas.sent == []

    asked(replicas, test, limits=Limits(body=6000))


def test_models_are_chosen_by_id_and_listed() -> None:
    replicas = Replicas()

    async def test(client: httpx.AsyncClient) -> None:
        for model, chosen in (("dog", "dog"), ("cat", "cat"), (None, "cat")):
            replicas.sent.clear()
            answer = await client.post(IMAGES, json=body(model=model) if model else body())
            assert answer.status_code == 200
            assert [one for one, _ in replicas.sent] == [chosen]
        listed = (await client.get("/v1/models")).json()
        assert [one["id"] for one in listed["data"]] == ["cat", "dog"]
        assert (await client.get("/v1/models/dog")).json()["id"] == "dog"
        assert (await client.get("/v1/models/fish")).status_code == 404
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"ready": True, "reason": None}
        assert "latentrt" in (await client.get("/")).text

    asked(replicas, test)


def test_a_replica_that_is_not_ready_sends_on_to_the_next() -> None:
    replicas = Replicas()
    well = replicas.send

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        if not replicas.sent:
            replicas.sent.append((model, request))
            unwell = HostedModel(BROKEN.models[0], BROKEN, ())
            await unwell.start()
            assert unwell.fault is None  # it never was well: another process would be no better
            assert unwell.service.reason == "the model does not load: 'no-model' is no folder or file"
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

    asked(replicas, test)


def test_the_deadline_counts_from_acceptance() -> None:
    replicas = Replicas(0, 0, None)

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(timeout=500))).status_code == 200
        times = [sent["timeout"] for sent in replicas.bodies()]
        assert 500 >= times[0] > times[1] > times[2] > 300
        replicas.losses = [0]
        late = await client.post(IMAGES, json=body(timeout=1e-9))
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")

    asked(replicas, test)


FULL = QueueFullError("all replicas are busy; try again in 2 s", 2.0)
REFUSED = Head(429, ((b"content-type", b"application/json"), (b"retry-after", b"2")))
LOST = ReplicaLostError("the replica was lost")


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

    asked(replicas, test, tries=3)


@pytest.mark.parametrize("given", [{"timeout": 0.2}, {}])
def test_it_waits_no_longer_than_it_has_time(given: dict[str, float]) -> None:
    """Its own, or the server's."""
    replicas = Replicas()
    ending(replicas, chain([LOST], repeat(REFUSED)))

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(**given))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert len(replicas.sent) > 2

    asked(replicas, test, limits=Limits(timeout=600.0 if given else 0.2))


@pytest.mark.parametrize("full", [FULL, REFUSED])
def test_full_replicas_are_told_at_once(full: Exception | Head) -> None:
    replicas = Replicas()
    ending(replicas, repeat(full))

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        assert len(replicas.sent) == 1

    asked(replicas, test)


def streamed_then(*, limits: Limits, after: Callable[[], Awaitable[None]]) -> list[dict[str, Any]]:
    """The events of a stream whose replica is lost after the first of them, and what its other tries come to."""
    event = b'event: x\ndata: {"type": "image_generation.partial_image", "image": 0, "step": 1}\n\n'
    replicas = Replicas()

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        replicas.sent.append((model, request))
        if len(replicas.sent) > 1:
            await after()
        yield Head(200, ((b"content-type", b"text/event-stream"),))
        yield event
        raise LOST

    replicas.send = send  # type: ignore[method-assign]
    events = []

    async def test(client: httpx.AsyncClient) -> None:
        events.extend(told(await client.post(IMAGES, json=body(stream=True))))

    asked(replicas, test, limits=limits)
    return events


def test_a_stream_whose_time_ends_at_another_replica_says_so() -> None:
    async def late() -> None:
        await asyncio.sleep(60)

    async def full() -> None:
        raise FULL

    for after in (late, full):  # in the replica; at the ingress
        first, last = streamed_then(limits=Limits(timeout=0.3), after=after)
        assert first["step"] == 1
        assert last["error"]["code"] == "deadline_exceeded"


def test_a_fault_of_a_replica_is_told_as_one(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing of what it says, which is for the log. It is tried once: it would be the same again."""

    async def fault() -> None:
        raise RuntimeError("the secret")

    last = streamed_then(limits=Limits(), after=fault)[-1]
    assert last["error"]["code"] == "internal"
    assert "secret" not in last["error"]["message"]

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

    asked(replicas, test)


def test_its_own_refusals_have_an_id_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "latentrt.access")

    async def test(client: httpx.AsyncClient) -> None:
        for given, kept in (("mine-1", True), ("not/allowed", False)):
            caplog.clear()
            answer = await client.post(IMAGES, content=b"x" * 600, headers={"x-request-id": given})
            assert answer.status_code == 413
            assert (answer.headers["x-request-id"] == given) is kept
            (line,) = (record.fields for record in caplog.records if record.name == "latentrt.access")  # type: ignore[attr-defined]
            assert (line["status"], line["request_id"]) == (413, answer.headers["x-request-id"])

    asked(Replicas(), test, limits=Limits(body=500))


def test_it_drains() -> None:
    """What was taken is answered, streamed or not; what is new is told to go elsewhere."""
    settings = Deployed.of({"models": [{"id": "cat", "source": "ray_runner:held"}]})

    async def run() -> None:
        hosted = HostedModel(settings.models[0], settings, ())
        await hosted.start()

        async def send(_: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
            async for part in hosted.answer(request):
                yield part

        ingress = Ingress(["cat"], send)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await (await ingress.answer(Request(scope, receive)))(scope, receive, send)

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            taken = [
                asyncio.ensure_future(client.post(IMAGES, json=body(seed=5, stream=stream)))
                for stream in (False, True)
            ]
            await asyncio.to_thread(HELD.reached)
            assert not await ingress.drain(0.01)
            for new in (await client.post(IMAGES, json=body()), await client.get("/ready")):
                assert new.status_code == 503
            assert (await client.get("/v1/models")).status_code == 200
            HELD.release()
            assert await ingress.drain(60)
            plain, stream = await asyncio.gather(*taken)
            assert plain.json()["data"][0]["seed"] == 5
            assert stream.text.endswith("data: [DONE]\n\n")
        await hosted.stop()

    HELD.hold()
    in_loop(run())


def test_the_document_has_all_models() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        found = (await client.get("/openapi.json")).json()
        field = found["components"]["schemas"]["GenerationBody"]["properties"]["model"]
        assert field["anyOf"][0]["enum"] == ["cat", "dog"]
        (parameter,) = found["paths"]["/v1/models/{model}"]["get"]["parameters"]
        assert parameter["schema"]["enum"] == ["cat", "dog"]

    asked(Replicas(), test)


def test_the_shipped_configuration_is_one() -> None:
    shipped = yaml.safe_load(resources.files("latentrt.runtime.serve").joinpath("ray.yaml").read_text())
    (application,) = shipped["applications"]
    deployed = Deployed.of(application["args"])
    assert deployed.ids == ["sdxl", "demo"]
    assert application["import_path"] == "latentrt.runtime.serve.ray_app:application"


def test_a_client_that_leaves_frees_the_replica() -> None:
    async def run() -> None:
        settings = Deployed.of({"models": [{"id": "cat", "source": "ray_runner:held"}]})
        hosted = HostedModel(settings.models[0], settings, ())
        await hosted.start()
        try:
            content = json.dumps(body()).encode()
            headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)))
            parts = hosted.answer(Forwarded("POST", IMAGES, "", headers, content))
            waiting = asyncio.ensure_future(anext(parts))
            await asyncio.to_thread(HELD.reached)
            assert hosted.service.running == 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert hosted.service.running == 0
        finally:
            HELD.release()
            await hosted.stop()

    HELD.hold()
    in_loop(run())


def test_a_model_that_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing but the replica's own references to it goes: FastAPI's caches keep its application."""
    runners = []

    def tracked() -> FakeRunner:
        runner = FakeRunner()
        runner.itself = runner  # type: ignore[attr-defined]  # as a pipeline is referred to by its parts
        runners.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(ray_runner, "quick", tracked)

    async def run() -> None:
        hosted = HostedModel(DEPLOYED.models[0], DEPLOYED, ())
        await hosted.start()
        content = json.dumps(body()).encode()
        headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)))
        assert [part async for part in hosted.answer(Forwarded("POST", IMAGES, "", headers, content))]
        assert runners[0]() is not None
        await hosted.stop()
        assert runners[0]() is None

    in_loop(run())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "models: Field required"),
        ({"models": []}, "models: Tuple should have at least 1 item"),
        ({"models": [{"id": "a"}, {"id": "a"}]}, "models: Value error, ids must differ; these are a, a"),
        ({"models": [{"id": "a", "weights": 1}]}, "models.0.weights: Extra inputs are not permitted"),
        ({"models": [{"id": "a"}], "gpus": -1}, "gpus: Input should be greater than or equal to 0"),
        ({"models": [{"id": "a"}], "min_replicas": 3}, "max_replicas is 1, fewer than min_replicas, 3"),
    ],
)
def test_a_wrong_configuration_names_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        Deployed.of(values)


def test_without_ray_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_app", "ray_local"):
        monkeypatch.delitem(sys.modules, f"latentrt.runtime.serve.{name}", raising=False)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")  # the import sets it: put back after the test
    code, out, err = run("serve", "--ray")
    assert (code, out) == (1, "")
    assert '--ray needs ray, which is not installed; pip install "latentrt[ray]"' in err
    assert run("serve", "--ray", "--replicas", "4..1")[0] == 2
