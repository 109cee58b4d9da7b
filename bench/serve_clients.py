"""Clients of `latentrt serve`, many at once, and what became of their requests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from time import perf_counter
from typing import Any

import httpx2 as httpx
import numpy as np
import PIL.Image

from ..errors import BenchmarkError

__all__ = ["Outcome", "flood", "mixed_bodies", "send"]

Body = dict[str, Any]
_PATH = "/v1/images/generations"


@dataclass
class Outcome:
    """The outcome of many requests.

    Attributes:
        images: seed -> digest of the image's pixels.
        statuses: HTTP status -> how many responses had it.
        disconnected: clients that disconnected before they got a response.
        seconds: size -> latencies of its images.
        retry_after: `Retry-After` of each refusal, in seconds; None if there was none.
        per_image: batch size -> stage -> seconds per image, of every response.
        wall: seconds in all.
        made: images that the server made meanwhile, by its own count.
    """

    images: dict[int, str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    disconnected: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    retry_after: list[int | None] = field(default_factory=list)
    per_image: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    wall: float = 0.0
    made: float = 0.0

    def add_response(self, body: Body, response: httpx.Response, seconds: float) -> None:
        """Record the response to a request, `seconds` after it was sent."""
        if response.status_code == 200:
            (image,) = response.json()["data"]
            self.add_image(body, image, seconds)
            return
        self.statuses[response.status_code] += 1
        if response.status_code == 429:
            retry_after = response.headers.get("retry-after", "")
            self.retry_after.append(int(retry_after) if retry_after.isdecimal() else None)

    def add_image(self, body: Body, image: dict[str, Any], seconds: float) -> None:
        """Record an image, as the server describes it in JSON."""
        self.statuses[200] += 1
        if image["seed"] != body["seed"]:
            raise BenchmarkError(f"seed {body['seed']} was answered with {image['seed']}")
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
        self.images[body["seed"]] = hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()
        self.seconds.setdefault(body.get("size", "auto"), []).append(seconds)
        stages = self.per_image.setdefault(image["batch"], defaultdict(list))
        for stage, stage_seconds in image["timings"].items():
            if stage != "queue":
                stages[stage].append(stage_seconds / image["batch"])

    @property
    def batches(self) -> dict[int, int]:
        """Batch size -> how many images were generated in batches of this size."""
        return {batch: len(stages["total"]) for batch, stages in sorted(self.per_image.items())}

    @property
    def in_company(self) -> float:
        """The share of images that were generated in batches of several."""
        return sum(count for batch, count in self.batches.items() if batch > 1) / len(self.images)

    def figures(self) -> dict[str, Any]:
        """The figures for the results' JSON."""
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "left": self.disconnected,
            "images_per_second": len(self.images) / self.wall,
            **_percentiles([latency for latencies in self.seconds.values() for latency in latencies]),
            "by_size": {size: _percentiles(latencies) for size, latencies in sorted(self.seconds.items())},
            "images_by_batch": {str(batch): count for batch, count in self.batches.items()},
            "wall_seconds": self.wall,
        }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    p50, p99 = map(float, np.percentile(seconds, [50, 99])) if seconds else (None, None)
    return {"p50_seconds": p50, "p99_seconds": p99}


def mixed_bodies(count: int, sizes: Sequence[str], steps: Sequence[int]) -> list[Body]:
    """Requests in a few groups that can be batched together. Within a group they differ, and each has its own seed.

    A group has the same size, the same steps, guidance or none, and a negative prompt or none.
    """
    rng = random.Random(1)
    groups = list(product(sizes, steps))
    bodies = []
    for seed in range(count):
        k = rng.randrange(len(groups))
        size, step_count = groups[k]
        bodies.append(
            {
                "prompt": rng.choice(["a red circle", "storm", "a blue square above a green ring"]),
                "seed": seed,
                "size": size,
                "steps": step_count,
                "guidance": 1.0 if k % 3 == 2 else rng.choice([3.0, 7.5]),
                "negative_prompt": rng.choice(["blurry", "dark"]) if k % 2 else None,
            }
        )
    return bodies


async def send(
    url: str,
    bodies: Sequence[Body],
    clients: int,
    disconnect_after: Callable[[Body], float | None] = lambda _: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Send requests from a number of clients, each of which sends its next request when the last one is answered.

    Args:
        disconnect_after: seconds after which a request's client disconnects, if it has no preview before, at which it
            disconnects too; None if it waits for its image.
        on_done: called after each request with how many are answered or disconnected by then.
    """
    outcome = Outcome()
    todo = list(reversed(bodies))
    started = perf_counter()
    async with httpx.AsyncClient(
        base_url=url, timeout=900, limits=httpx.Limits(max_connections=clients)
    ) as http:

        async def client() -> None:
            while todo:
                body = todo.pop()
                since = perf_counter()
                seconds = disconnect_after(body)
                if seconds is None:
                    outcome.add_response(body, await http.post(_PATH, json=body), perf_counter() - since)
                elif (image := await _stream_and_disconnect(http, body, seconds)) is not None:
                    outcome.add_image(body, image, perf_counter() - since)
                else:
                    outcome.disconnected += 1
                on_done(sum(outcome.statuses.values()) + outcome.disconnected)

        await asyncio.gather(*(client() for _ in range(clients)))
    outcome.wall = perf_counter() - started
    return outcome


async def _stream_and_disconnect(
    http: httpx.AsyncClient, body: Body, seconds: float
) -> dict[str, Any] | None:
    """Stream a request and disconnect at its first preview, or after some seconds. Returns its image if that came
    first."""
    try:
        async with (
            asyncio.timeout(seconds),
            http.stream("POST", _PATH, json={**body, "stream": True}) as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise BenchmarkError(f"seed {body['seed']}: {event['error']}")
                    return event if event["type"] == "image_generation.completed" else None
            raise BenchmarkError(f"seed {body['seed']}: {answer.status_code}, and no event")
    except TimeoutError:
        return None


async def flood(url: str, bodies: Sequence[Body], rate: float, on_image: Callable[[int], None]) -> Outcome:
    """Send `rate` requests a second, without waiting for responses.

    Args:
        on_image: called with the number of images after each one.
    """
    outcome = Outcome()
    started = perf_counter()
    async with httpx.AsyncClient(
        base_url=url, timeout=900, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def one(k: int, body: Body) -> None:
            await asyncio.sleep(started + k / rate - perf_counter())
            since = perf_counter()
            response = await http.post(_PATH, json=body)
            outcome.add_response(body, response, perf_counter() - since)
            if response.status_code == 200:
                on_image(len(outcome.images))

        await asyncio.gather(*(one(k, body) for k, body in enumerate(bodies)))
    outcome.wall = perf_counter() - started
    return outcome
