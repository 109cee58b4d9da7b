"""`runtime/serve/examples/`: the examples, run: each over a runner without a model."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx2 as httpx
import PIL.Image
import pytest
from helpers.fake_runner import FakeRunner, in_loop, seed_of
from helpers.faults import disk_full
from helpers.served import served
from latentrt.errors import (
    BackendError,
    DeadlineError,
    DrainingError,
    QueueFullError,
    RequestError,
    StoppedError,
)
from latentrt.runtime.image import save_png
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.examples import fastapi_service, openai_client, queue_worker
from latentrt.runtime.serve.examples.queue_worker import Task


class Picky(FakeRunner):
    """Refuses the prompt "bad"."""

    def check(self, request: Any) -> Any:
        if request.prompt == "bad":
            raise RequestError("prompt is 'bad'; ask for something else")
        return super().check(request)


def test_the_fastapi_service(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Picky()
    app = fastapi_service.create_app(lambda: runner)

    async def go() -> None:
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            cards = await asyncio.gather(*(client.get(f"/cards/{k}?motif=cat") for k in (4, 5)))
            assert [seed_of(PIL.Image.open(io.BytesIO(card.content))) for card in cards] == [4, 5]
            bad = await client.get("/cards/1?motif=bad")
            assert (bad.status_code, bad.json()["detail"]) == (422, "prompt is 'bad'; ask for something else")

            for error, status in (
                (QueueFullError("full", 6.2), 429),
                (DeadlineError("late"), 504),
                (DrainingError("draining"), 503),
                (StoppedError("stopped"), 503),
            ):

                def fail(*_: object, error: Exception = error, **__: object) -> None:
                    raise error

                monkeypatch.setattr(app.state.engine, "submit", fail)
                answer = await client.get("/cards/1?motif=cat")
                assert (answer.status_code, answer.json()["detail"]) == (status, str(error))
                assert answer.headers.get("retry-after") == ("7" if status == 429 else None)

    in_loop(go())
    assert runner.warm == 1
    assert callable(fastapi_service.app)


def test_a_client_that_leaves_the_fastapi_service_frees_the_device() -> None:
    runner = FakeRunner()
    app = fastapi_service.create_app(lambda: runner)

    async def go() -> None:
        async with app.router.lifespan_context(app):
            left = asyncio.Event()
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            runner.hold()
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/cards/4",
                "query_string": b"motif=cat",
                "headers": [],
            }
            answering = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.to_thread(runner.reached)
            assert app.state.engine.running == 1
            left.set()
            await answering
            await asyncio.sleep(0)
            assert app.state.engine.running == 0
            assert sent[0]["status"] == 499
            runner.release()

    in_loop(go())


def test_a_full_disk_does_not_end_the_queue_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave anybody to wait for its tasks."""

    def full(image: Any, path: Path, parameters: Any) -> None:
        if path.stem != "task-0":
            raise disk_full()
        save_png(image, path, parameters)

    monkeypatch.setattr(queue_worker, "save_png", full)

    async def go() -> dict[str, str]:
        tasks: asyncio.Queue[Task] = asyncio.Queue()
        for k in range(4):
            tasks.put_nowait(Task(f"task-{k}", "cat", seed=k))
        async with AsyncEngine(FakeRunner()) as engine:
            return await queue_worker.work(engine, tasks, tmp_path, at_once=2)

    failed = in_loop(go(), 60)
    assert failed == {f"task-{k}": "[Errno 28] No space left on device" for k in (1, 2, 3)}
    assert [path.name for path in tmp_path.iterdir()] == ["task-0.png"]


def test_the_queue_worker(tmp_path: Path) -> None:
    """A fault that passes is tried again; one that stays, and what is refused, is told."""
    faults = {3: 1, 4: 9}

    def fail(seeds: list[int]) -> Exception | None:
        (seed,) = seeds if len(seeds) == 1 else (None,)
        hit = next((s for s in seeds if faults.get(s, 0) > 0), None)
        if hit is None:
            return None
        if seed is not None:  # the engine tries each of a batch alone before it gives up
            faults[hit] -= 1
        return BackendError(f"seed {hit} does not work")

    async def go() -> dict[str, str]:
        tasks: asyncio.Queue[Task] = asyncio.Queue()
        for k in range(8):
            tasks.put_nowait(Task(f"task-{k}", "bad" if k == 6 else "cat", seed=k))
        async with AsyncEngine(Picky(fail), max_batch=4) as engine:
            return await queue_worker.work(engine, tasks, tmp_path, at_once=4)

    failed = in_loop(go())
    assert failed == {
        "task-4": "seed 4 does not work",
        "task-6": "prompt is 'bad'; ask for something else",
    }
    made = {path.name: seed_of(PIL.Image.open(path)) for path in tmp_path.iterdir()}
    assert made == {f"task-{k}.png": k for k in range(8) if k not in (4, 6)}


def test_the_queue_workers_main_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        @staticmethod
        def from_pretrained(model: str, refiner: str) -> FakeRunner:
            assert (model, refiner) == ("demo", "demo")
            return FakeRunner()

    monkeypatch.setattr(queue_worker, "Pipeline", Pipeline)
    assert in_loop(queue_worker.main(tmp_path / "new", ["a", "b"])) == {}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["0000.png", "0001.png"]


def test_openais_client(tmp_path: Path) -> None:
    with served(FakeRunner) as server:
        openai_client.main(server.url, "a cat", tmp_path)
    seeds = {path.name: seed_of(PIL.Image.open(path)) for path in tmp_path.iterdir()}
    assert seeds["picture.png"] == 7
    *previews, last = [seeds[f"watched-{k}.png"] for k in range(len(seeds) - 1)]
    assert last == 7
    assert len(previews) <= 3
    assert set(previews) <= {107}
