"""The ingress itself, without Ray: models by id, what it refuses, tells and logs, and how it drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2 as httpx
import pytest
from helpers.fake_runner import in_loop
from helpers.ray_runner import HELD
from helpers.replicas import IMAGES, Replicas, body, client_of, with_ingress
from latentrt.runtime.serve import ingress
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head, HostedModel
from latentrt.runtime.serve.ingress import Ingress
from latentrt.runtime.serve.retries import NotServingError
from latentrt.runtime.serve.schema import Limits
from latentrt.runtime.serve.service import NotReadyError


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

    with_ingress(replicas, test, limits=Limits(body=6000))


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

    with_ingress(replicas, test)


@pytest.mark.parametrize("lately", [60.0, 0.0])
@pytest.mark.parametrize(("error", "most"), [(NotServingError, 3), (NotReadyError, 1)])
def test_a_model_that_was_served_lately_is_waited_for(
    error: type[Exception], most: int, lately: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many replicas are not ready. One that was not is refused: at once where a try took another model's
    place."""
    monkeypatch.setattr(ingress, "_LATELY", lately)
    replicas = Replicas()
    well, refusals = replicas.send, [0]

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        if refusals[0]:
            refusals[0] -= 1
            raise error("not ready: it does not load")
        async for part in well(model, request):
            yield part

    replicas.send = send  # type: ignore[method-assign]

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(model="cat"))).status_code == 200
        for model, made in (("cat", lately > 0), ("dog", False)):
            refusals[0] = 9
            answer = await client.post(IMAGES, json=body(model=model))
            assert answer.status_code == (200 if made else 503)
            assert refusals[0] == (0 if made else 9 - most)
        told = answer.json()["error"]
        assert (told["code"], told["message"]) == ("not_ready", "not ready: it does not load")

    with_ingress(replicas, test, tries=3)


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

    with_ingress(Replicas(), test, limits=Limits(body=500))


def test_it_drains() -> None:
    """What was taken is answered, streamed or not; what is new is told to go elsewhere."""
    settings = Deployed.of({"models": [{"id": "cat", "source": "helpers.ray_runner:held"}]})

    async def run() -> None:
        hosted = HostedModel(settings.models[0], settings, ())
        await hosted.start()

        async def send(_: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
            async for part in hosted.answer(request):
                yield part

        ingress = Ingress(["cat"], send)
        async with client_of(ingress) as client:
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

    with_ingress(Replicas(), test)


def test_the_document_tells_that_names_are_checked() -> None:
    async def run() -> None:
        deployed = Deployed.of(
            {"models": [{"id": "cat", "source": "helpers.ray_runner:quick"}], "hosts": ["localhost"]}
        )
        hosted = HostedModel(deployed.models[0], deployed, ())
        await hosted.start()
        async with client_of(
            Ingress(["cat"], lambda _, asked: hosted.answer(asked), hosts=["localhost"])
        ) as client:
            found = (await client.get("/openapi.json", headers={"Host": "localhost"})).json()
            assert "403" in found["paths"]["/ready"]["get"]["responses"]
        await hosted.stop()

    in_loop(run())


def test_head_is_answered_as_get() -> None:
    """The server in front leaves the body out, and tells its length; a lost replica is no answer either."""
    replicas = Replicas(0)

    async def test(client: httpx.AsyncClient) -> None:
        for path in ("/v1/models", "/health", "/ready", "/"):
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, get.status_code) == (200, 200)
            assert head.headers["content-length"] == get.headers["content-length"]
        assert (await client.head(IMAGES)).status_code == 405

    with_ingress(replicas, test)
