"""A worker that takes tasks from a queue and leaves pictures in a folder.

The queue is `asyncio.Queue`; Redis, SQS or RabbitMQ take its place with a `get` that leases a task and a `done` that
acknowledges it. A task keeps its seed, so one that is delivered twice makes the same picture twice.

python -m latentrt.runtime.serve.examples.queue_worker pictures "a red circle" "a blue square"
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from latentrt import AsyncEngine, ImageRequest, Pipeline
from latentrt.errors import QueueFullError, RequestError
from latentrt.runtime.image import save_png


@dataclass(frozen=True)
class Task:
    """`name` is the file's; `tries` how often it was begun."""

    name: str
    prompt: str
    seed: int
    tries: int = 0


async def work(
    engine: AsyncEngine, tasks: asyncio.Queue[Task], folder: Path, *, at_once: int = 8, most_tries: int = 3
) -> dict[str, str]:
    """Until the queue is empty and all is made; what could not be, by name, and why.

    `at_once` is worth the engine's `max_batch` or a little more: fewer leave batches half empty, more only wait.
    """
    failed: dict[str, str] = {}

    async def one() -> None:
        while True:
            task = await tasks.get()
            try:
                result = await engine.generate(ImageRequest(task.prompt, seed=task.seed, steps=20))
                await asyncio.to_thread(
                    save_png, result.image, folder / f"{task.name}.png", result.parameters
                )
            except QueueFullError as error:  # others use the engine too
                await asyncio.sleep(error.retry_after)
                tasks.put_nowait(task)
            except Exception as error:  # a full disk as well: a worker that ends leaves its tasks to nobody
                again = Task(task.name, task.prompt, task.seed, task.tries + 1)
                if isinstance(error, RequestError) or again.tries >= most_tries:  # it would be refused again
                    failed[task.name] = str(error) or type(error).__name__
                else:
                    tasks.put_nowait(again)
            finally:
                tasks.task_done()

    workers = [asyncio.create_task(one()) for _ in range(at_once)]
    await tasks.join()
    for worker in workers:
        worker.cancel()
    return failed


async def main(folder: Path, prompts: list[str]) -> dict[str, str]:
    """A picture of each prompt by the shipped model."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: asyncio.Queue[Task] = asyncio.Queue()
    for k, prompt in enumerate(prompts):
        tasks.put_nowait(Task(f"{k:04d}", prompt, seed=k))
    async with AsyncEngine(Pipeline.from_pretrained("demo", refiner="demo")) as engine:
        return await work(engine, tasks, folder)


if __name__ == "__main__":
    for name, why in asyncio.run(main(Path(sys.argv[1]), sys.argv[2:])).items():
        sys.stderr.write(f"{name}: {why}\n")
