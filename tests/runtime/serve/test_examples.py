"""The examples, run: each over a runner without a model."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx2 as httpx
import PIL.Image
import pytest
from fake_runner import FakeRunner, in_loop, seed_of
from latentrt.errors import BackendError, QueueFullError, RequestError
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.examples import fastapi_service, openai_client, queue_worker
from latentrt.runtime.serve.examples.queue_worker import Task
from served import served


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

            def full(*_: object, **__: object) -> None:
                raise QueueFullError("full", 7.0)

            monkeypatch.setattr(app.state.engine, "submit", full)
            late = await client.get("/cards/1?motif=cat")
            assert (late.status_code, late.headers["retry-after"]) == (429, "7")

    in_loop(go())
    assert runner.warm == 1
    assert callable(fastapi_service.app)


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
