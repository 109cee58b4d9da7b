"""`runtime/serve/ray_app.py`: replicas over a stand-in for Ray: models that share a place, and replicas that serve
nothing beside others that do."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from types import ModuleType
from typing import Any

import pytest
from helpers import ray_runner
from helpers.fake_ray import forwarded, ray_app, started
from helpers.fake_runner import FakeRunner, in_loop
from helpers.replicas import IMAGES, body, client_of
from latentrt.errors import OutOfMemoryError
from latentrt.runtime.serve import hosted
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head
from latentrt.runtime.serve.ingress import Ingress
from latentrt.runtime.serve.retries import NotServingError
from latentrt.runtime.serve.service import NotReadyError


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return ray_app(monkeypatch)


def deployed(sources: dict[str, str], **fields: Any) -> Deployed:
    models = [{"id": name, "source": f"helpers.ray_runner:{source}"} for name, source in sources.items()]
    return Deployed.of({"models": models, **fields})


PAIR = {"cat": "quick", "dog": "quick"}
"""Two models, for one place."""


@asynccontextmanager
async def replica_of(module: ModuleType, settings: Deployed) -> AsyncIterator[Any]:
    replica = await started(module, settings)
    try:
        yield replica
    finally:
        await replica._leave()


def image(**fields: Any) -> Forwarded:
    """A request for one, as the ingress sends it on."""
    headers = ((b"content-type", b"application/json"),)
    return Forwarded("POST", IMAGES, "", headers, json.dumps(body(**fields)).encode())


READY = Forwarded("GET", "/ready")


async def answered(replica: Any, model: str, request: Forwarded) -> tuple[int, dict[str, Any]]:
    """Status and body."""
    async with aclosing(forwarded(replica, model, request)) as parts:
        head = await anext(parts)
        assert isinstance(head, Head)
        return head.status, json.loads(b"".join([part async for part in parts if isinstance(part, bytes)]))


@pytest.mark.parametrize("stream", [False, True])
def test_models_that_share_a_place_make_all_that_comes(module: ModuleType, stream: bool) -> None:
    """A model that was loaded for a request makes that before it leaves for another one's."""
    tries = []

    async def main() -> None:
        async with replica_of(module, deployed(PAIR)) as replica:

            async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
                tries.append(model)
                async for part in forwarded(replica, model, request):
                    yield part

            async with client_of(Ingress(list(PAIR), send, pause=0.001)) as client:
                asked = [client.post(IMAGES, json=body(model=model, stream=stream)) for model in 4 * [*PAIR]]
                answers = await asyncio.gather(*asked)
        assert [answer.status_code for answer in answers] == 8 * [200]
        assert all("b64_json" in answer.text for answer in answers)
        assert len(tries) == 8

    in_loop(main())


def test_who_leaves_while_a_model_loads_keeps_no_place(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def held_up() -> FakeRunner:
        loading.set()
        go_on.wait(60)
        return FakeRunner()

    monkeypatch.setattr(ray_runner, "steady", held_up)

    async def main() -> None:
        settings = deployed({"cat": "quick", "dog": "steady"}, drain_seconds=1e6)
        async with replica_of(module, settings) as replica:
            leaving = asyncio.ensure_future(answered(replica, "dog", image()))
            await asyncio.to_thread(loading.wait, 60)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            go_on.set()
            assert (await answered(replica, "dog", image()))[0] == 200
            assert (await answered(replica, "cat", image()))[0] == 200

    in_loop(main(), 60)


def test_an_answer_that_does_not_end_keeps_a_place_for_as_long_as_draining_takes(module: ModuleType) -> None:
    async def main() -> None:
        async with (
            replica_of(module, deployed(PAIR, drain_seconds=0.2)) as replica,
            aclosing(forwarded(replica, "cat", image(stream=True))) as unread,
        ):
            await anext(unread)
            assert (await answered(replica, "dog", image()))[0] == 200

    in_loop(main(), 60)


class Failing:
    """Loads a model, but not the first times."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.tries = 0

    def __call__(self) -> FakeRunner:
        self.tries += 1
        if self.tries <= self.times:
            raise OutOfMemoryError("another process has the memory")
        return FakeRunner()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_first_model_that_does_not_load_is_tried_again(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And until it does, `/ready` says why."""
    monkeypatch.setattr(module, "_RETRY_LOAD", 0.1)
    monkeypatch.setattr(module, "_REFUSAL", 0.0)
    failing = Failing(2)
    monkeypatch.setattr(ray_runner, "broken", failing)

    async def main() -> None:
        async with replica_of(module, deployed({"cat": "broken"})) as replica:
            why = "the model does not load: another process has the memory"
            assert await answered(replica, "cat", READY) == (503, {"ready": False, "reason": why})
            with pytest.raises(NotServingError, match=f"not ready: {why}"):
                await answered(replica, "cat", image())
            replica.check_health()
            await until(lambda: failing.tries == 3)
            while (await answered(replica, "cat", READY))[0] != 200:
                await asyncio.sleep(0.005)
            assert (await answered(replica, "cat", image()))[0] == 200
            await asyncio.sleep(0.3)
            assert failing.tries == 3

    in_loop(main(), 60)


def test_a_first_model_without_its_place_is_not_loaded_beside_the_one_that_has_it(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_LOAD", 0.1)
    failing = Failing(1)
    monkeypatch.setattr(ray_runner, "broken", failing)

    async def main() -> None:
        async with replica_of(module, deployed({"cat": "broken", "dog": "quick"})) as replica:
            assert (await answered(replica, "dog", image()))[0] == 200
            await asyncio.sleep(0.3)
            assert failing.tries == 1
            assert (await answered(replica, "cat", image()))[0] == 200

    in_loop(main(), 60)


def test_a_model_that_does_not_load_is_tried_once_for_all_who_wait(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody behind them waits for more than that try."""
    go_on, failing = threading.Event(), Failing(1e9)

    def held_up() -> FakeRunner:
        go_on.wait(60)
        return failing()

    monkeypatch.setattr(module, "_REFUSAL", 0.0)
    monkeypatch.setattr(ray_runner, "broken", held_up)

    async def main() -> None:
        async with replica_of(module, deployed({"cat": "quick", "dog": "broken"})) as replica:
            asked = [asyncio.ensure_future(answered(replica, "dog", image())) for _ in range(8)]
            await asyncio.sleep(0.05)
            other = asyncio.ensure_future(answered(replica, "cat", image()))
            go_on.set()
            for error in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(error, NotReadyError)
                assert "another process has the memory" in str(error)
            assert (await other)[0] == 200
            assert failing.tries == 1

    in_loop(main(), 60)


def test_a_model_that_is_tried_again_has_its_place_until_that_ends(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long: what loads cannot be broken off, and two models would be in a place for one."""
    monkeypatch.setattr(module, "_RETRY_LOAD", 0.05)
    go_on, failing, at_work, together = threading.Event(), Failing(1), [], []

    def again() -> FakeRunner:
        at_work.append("cat")
        try:
            if failing.tries:
                go_on.wait(60)
            return failing()
        finally:
            at_work.remove("cat")

    def other() -> FakeRunner:
        together.extend(at_work)
        return FakeRunner()

    monkeypatch.setattr(ray_runner, "broken", again)
    monkeypatch.setattr(ray_runner, "quick", other)

    async def main() -> None:
        settings = deployed({"cat": "broken", "dog": "quick"}, drain_seconds=0.1)
        async with replica_of(module, settings) as replica:
            await until(lambda: at_work)
            asked = asyncio.ensure_future(answered(replica, "dog", image()))
            await asyncio.sleep(0.5)
            go_on.set()
            assert (await asked)[0] == 200
            assert together == []
            assert list(replica._hosted) == ["dog"]

    in_loop(main(), 60)


def test_a_fault_before_a_try_does_not_end_the_tries(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a device that has no memory even to free some."""
    monkeypatch.setattr(module, "_RETRY_LOAD", 0.05)
    failing, faults = Failing(1), []
    release = hosted.release_memory

    def faulty() -> None:
        if failing.tries == 1 and not faults:
            faults.append("CUDA error: out of memory")
            raise RuntimeError(faults[0])
        release()

    monkeypatch.setattr(ray_runner, "broken", failing)
    monkeypatch.setattr(hosted, "release_memory", faulty)

    async def main() -> None:
        async with replica_of(module, deployed({"cat": "broken"})) as replica:
            while (await answered(replica, "cat", READY))[0] != 200:
                await asyncio.sleep(0.005)
            assert faults

    in_loop(main(), 20)


class Dying(FakeRunner):
    """Makes the image of its start, and nothing after it."""

    def __init__(self) -> None:
        super().__init__(lambda _: RuntimeError("an illegal memory access"))

    def warm_up(self, *batches: Any) -> None:
        super().warm_up(*batches)
        if self.warm > 1:
            raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize("bad", ["broken", "dying"])
def test_a_replica_that_serves_nothing_costs_no_request(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """Though each goes to the replica that has fewer of them, as by Ray."""
    monkeypatch.setattr(module, "_REFUSAL", 0.1)
    monkeypatch.setattr(ray_runner, "broken", Failing(1e9) if bad == "broken" else Dying)
    settings = [deployed({"cat": source}, max_batch=2) for source in ("broken", "steady")]
    dice, open_, tries = random.Random(0), [0, 0], [0, 0]

    async def main() -> None:
        async with replica_of(module, settings[0]) as first, replica_of(module, settings[1]) as second:
            if bad == "dying":
                for seed in range(3):
                    assert (await answered(first, "cat", image(seed=seed)))[0] == 500
                await until(lambda: first._hosted["cat"].fault)

            async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
                k = min(dice.sample(range(2), 2), key=open_.__getitem__)
                open_[k] += 1
                tries[k] += 1
                try:
                    parts = [part async for part in forwarded((first, second)[k], model, request)]
                finally:
                    open_[k] -= 1  # for Ray it has ended, whenever it is read
                for part in parts:
                    yield part

            async with client_of(Ingress(["cat"], send, pause=0.02)) as client:

                async def user() -> list[int]:
                    return [(await client.post(IMAGES, json=body())).status_code for _ in range(4)]

                statuses = await asyncio.gather(*(user() for _ in range(8)))
        assert statuses == 8 * [4 * [200]]
        assert tries[0] > 0
        assert tries[1] == 32

    in_loop(main())
