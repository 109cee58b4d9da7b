"""`latentrt serve` under load, on the demo: what batching gains, that nothing is lost or mixed up, and overload.

    python -m latentrt.bench.serve_load [--requests 500] [--clients 32] [--seconds 30] [--out FILE.json]

Two servers, processes of their own on ONNX Runtime: one makes an image at a time, one batches. Three parts:
- batching: equal requests from all clients, to each server in turn; the ratio of their throughputs, and from the
  answers what an image takes in calls of each size, which says why the ratio is what it is;
- mixed: requests that differ in size, steps, scale and prompt, a third of whose clients leave midway. Each of the
  others gets its image once, equal to the bit to what the server without batching makes of it; memory stays flat;
- overload: requests come at five times the measured throughput, each with a deadline. 99 % of those that are let in
  are made in their time, the rest is answered 429.

Exits with 1 where one of these does not hold; the file is written all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import PIL.Image

from ..errors import BenchmarkError
from .machine import describe_machine

__all__ = ["Outcome", "Running", "batching", "main", "measure", "mixed", "mixed_bodies", "overload", "send"]

Body = dict[str, Any]
_PATH = "/v1/images/generations"
_GAIN = 1.5
_GROWTH = 100
"""Megabytes that a server may grow by between the first fifth of the mixed requests and their end."""


@dataclass
class Outcome:
    """What became of many requests.

    Attributes:
        images: seed -> digest of its pixels.
        statuses: how many answers of each.
        left: hung up before they were answered.
        seconds: of each image.
        per_image: images in the call -> stage -> seconds for each image, of every answer.
        wall: seconds in all.
    """

    images: dict[int, str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    per_image: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    wall: float = 0.0

    def take(self, body: Body, answer: httpx.Response, seconds: float) -> None:
        """Note an answer."""
        self.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            return
        (made,) = answer.json()["data"]
        if made["seed"] != body["seed"] or body["seed"] in self.images:
            raise BenchmarkError(f"seed {body['seed']} was answered with {made['seed']}, or twice")
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(made["b64_json"])))
        self.images[body["seed"]] = hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()
        self.seconds.append(seconds)
        stages = self.per_image.setdefault(made["batch"], defaultdict(list))
        for stage, spent in made["timings"].items():
            if stage != "queue":
                stages[stage].append(spent / made["batch"])

    def figures(self) -> dict[str, Any]:
        """For the file."""
        p50, p99 = np.percentile(self.seconds, [50, 99]) if self.seconds else (None, None)
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "left": self.left,
            "images_per_second": len(self.images) / self.wall,
            "p50_seconds": p50,
            "p99_seconds": p99,
            "wall_seconds": self.wall,
        }


def mixed_bodies(count: int, sizes: Sequence[str], steps: Sequence[int]) -> list[Body]:
    """Requests that differ in everything; the seed is the name of each."""
    dice = random.Random(1)
    return [
        {
            "prompt": dice.choice(["a red circle", "storm", "a blue square above a green ring"]),
            "seed": seed,
            "size": dice.choice(sizes),
            "steps": dice.choice(steps),
            "guidance": dice.choice([1.0, 3.0, 7.5]),
            "negative_prompt": dice.choice([None, "blurry"]),
        }
        for seed in range(count)
    ]


async def send(
    url: str, bodies: Sequence[Body], clients: int, leave: Callable[[Body], float | None] = lambda _: None
) -> Outcome:
    """So many clients, each asking when its last one is answered; `leave`: after how many seconds one hangs up."""
    outcome = Outcome()
    todo = list(reversed(bodies))
    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=_connections(clients)) as http:

        async def client() -> None:
            while todo:
                body = todo.pop()
                since = time.perf_counter()
                try:
                    async with asyncio.timeout(leave(body)):
                        answer = await http.post(_PATH, json=body)
                except TimeoutError:
                    outcome.left += 1
                    continue
                outcome.take(body, answer, time.perf_counter() - since)

        await asyncio.gather(*(client() for _ in range(clients)))
    outcome.wall = time.perf_counter() - begun
    return outcome


async def flood(url: str, bodies: Sequence[Body], rate: float) -> Outcome:
    """Requests at so many a second, whether or not others are answered."""
    outcome = Outcome()
    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=_connections(None)) as http:

        async def one(k: int, body: Body) -> None:
            await asyncio.sleep(begun + k / rate - time.perf_counter())
            since = time.perf_counter()
            answer = await http.post(_PATH, json=body)
            outcome.take(body, answer, time.perf_counter() - since)

        await asyncio.gather(*(one(k, body) for k, body in enumerate(bodies)))
    outcome.wall = time.perf_counter() - begun
    return outcome


def _connections(count: int | None) -> httpx.Limits:
    return httpx.Limits(max_connections=count)


@dataclass(frozen=True)
class Running:
    """A server process."""

    url: str
    pid: int

    @property
    def resident(self) -> float:
        """Megabytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def counted(self, name: str) -> float:
        """A figure of its metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def _serving(max_batch: int, backend: str) -> Iterator[Running]:
    """The demo behind a port, warm."""
    command = [
        sys.executable,
        "-m",
        "latentrt.cli",
        "serve",
        "--model",
        "demo",
        "--backend",
        backend,
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--max-batch", str(max_batch), "--max-queue", "64"], stderr=subprocess.PIPE, text=True
    )
    try:
        yield Running(_ready(process), process.pid)
    finally:
        process.terminate()
        process.wait(120)


def _ready(process: subprocess.Popen[str]) -> str:
    """Its address, once it takes requests."""
    log = process.stderr
    if log is None:
        raise AssertionError("it is piped")
    seen = []
    for line in log:
        seen.append(line)
        if "url" in (entry := json.loads(line)):
            threading.Thread(target=lambda: [None for _ in log], daemon=True).start()  # or it would fill up
            url = str(entry["url"])
            break
    else:
        raise BenchmarkError(f"the server ended: {''.join(seen[-5:])}")
    deadline = time.monotonic() + 900
    while True:
        answer = httpx.get(f"{url}/ready")
        if answer.status_code == 200:
            return url
        if "does not load" in answer.text or time.monotonic() > deadline:
            raise BenchmarkError(f"the server is not ready: {answer.text}")
        time.sleep(0.2)


def batching(
    alone: Running, batched: Running, *, clients: int, rounds: int, checks: dict[str, bool]
) -> dict[str, Any]:
    """The same requests to both in turn."""
    ratios, outcomes = [], []
    for k in range(rounds):
        bodies = [
            {
                "prompt": "a red circle",
                "seed": 10_000 * (k + 1) + seed,
                "steps": 4,
                "guidance": 3.0,
                "timeout": 600,
            }
            for seed in range(2 * clients)
        ]
        each = [asyncio.run(send(server.url, bodies, clients)) for server in (alone, batched)]
        ratios.append(each[0].wall / each[1].wall)
        outcomes.append(each)
        checks["batched images equal those alone"] = (
            checks.get("batched images equal those alone", True) and each[0].images == each[1].images
        )
    gain = float(np.median(ratios))
    per_image = {
        str(batch): {stage: float(np.median(spent)) for stage, spent in stages.items()}
        for batch, stages in sorted(
            {**outcomes[-1][1].per_image, **outcomes[-1][0].per_image}.items(), key=itemgetter(0)
        )
    }
    checks[
        f"batching gains {_GAIN}x, or an image alone takes less than {_GAIN} times its share of a batch"
    ] = gain >= _GAIN or (
        per_image["1"]["total"] < _GAIN * min(stages["total"] for stages in per_image.values())
    )
    return {
        "gain": gain,
        "gains": ratios,
        "one_at_a_time": outcomes[-1][0].figures(),
        "batched": outcomes[-1][1].figures(),
        "seconds_per_image_by_batch": per_image,
    }


def mixed(
    alone: Running, batched: Running, *, requests: int, clients: int, pace: float, checks: dict[str, bool]
) -> dict[str, Any]:
    """A third leaves midway."""
    bodies = mixed_bodies(requests, ["64x64", "72x64", "128x128"], [2, 3, 4])
    dice = random.Random(2)
    before = batched.counted("latentrt_images_total")
    fifth = requests // 5

    def leave(_: Body) -> float | None:
        return dice.choice([None, None, dice.uniform(0.1, clients * pace)])

    parts = []
    resident = []
    for part in (bodies[:fifth], bodies[fifth:]):
        parts.append(asyncio.run(send(batched.url, part, clients, leave)))
        resident.append(batched.resident)
    outcome = Outcome(
        images={**parts[0].images, **parts[1].images},
        statuses=parts[0].statuses + parts[1].statuses,
        left=sum(part.left for part in parts),
        seconds=parts[0].seconds + parts[1].seconds,
        wall=sum(part.wall for part in parts),
    )
    made = batched.counted("latentrt_images_total") - before
    again = [body for body in bodies if body["seed"] in outcome.images]
    same = asyncio.run(send(alone.url, again, 1))
    differ = [seed for seed, digest in outcome.images.items() if same.images.get(seed) != digest]
    checks["every request was answered or had left"] = len(outcome.images) + outcome.left == requests
    checks["a part left midway"] = 0.15 * requests <= outcome.left <= 0.45 * requests
    checks["none was made twice"] = made <= requests
    checks["every image equals the same made alone"] = not differ
    checks[f"memory grew by less than {_GROWTH} MB"] = resident[1] - resident[0] < _GROWTH
    return {
        **outcome.figures(),
        "requests": requests,
        "made": made,
        "compared_with_alone": len(outcome.images),
        "differ": differ,
        "resident_mb": {"after_a_fifth": resident[0], "at_the_end": resident[1]},
    }


def overload(
    batched: Running, *, rate: float, seconds: float, timeout: float, checks: dict[str, bool]
) -> dict[str, Any]:
    """Five times what it can make."""
    fields = {"prompt": "a red circle", "steps": 4, "guidance": 3.0, "timeout": timeout}
    bodies = [{**fields, "seed": seed} for seed in range(int(5 * rate * seconds))]
    outcome = asyncio.run(flood(batched.url, bodies, 5 * rate))
    made, late, refused = (outcome.statuses[status] for status in (200, 504, 429))
    checks["overload is answered with 200, 429 or 504"] = made + late + refused == len(bodies)
    checks["99 % of what was let in was in time"] = late <= 0.01 * (made + late)
    checks["the rest was refused, and the device not idle"] = refused > 0 and made >= 0.5 * rate * seconds
    return {**outcome.figures(), "offered_per_second": 5 * rate, "deadline_seconds": timeout, "late": late}


def measure(
    *, requests: int, clients: int, rounds: int, seconds: float, backend: str = "onnxruntime"
) -> dict[str, Any]:
    """All three parts; `checks` says what held."""
    checks: dict[str, bool] = {}
    with _serving(1, backend) as alone, _serving(8, backend) as batched:
        found_batching = batching(alone, batched, clients=clients, rounds=rounds, checks=checks)
        rate = found_batching["batched"]["images_per_second"]
        found_mixed = mixed(alone, batched, requests=requests, clients=clients, pace=1 / rate, checks=checks)
        found_overload = overload(
            batched, rate=rate, seconds=seconds, timeout=max(2.0, 40 / rate), checks=checks
        )
    return {
        "benchmark": "serve load",
        "machine": describe_machine(),
        "backend": backend,
        "clients": clients,
        "batching": found_batching,
        "mixed": found_mixed,
        "overload": found_overload,
        "checks": checks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="The demo served, under load.")
    parser.add_argument("--requests", type=int, default=500, help="of the mixed part")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of the batching part")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "demo_serve_load.json"
    )
    args = parser.parse_args(argv)
    found = measure(
        requests=args.requests,
        clients=args.clients,
        rounds=args.rounds,
        seconds=args.seconds,
        backend=args.backend,
    )
    args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(json.dumps({name: found[name] for name in ("batching", "mixed", "overload", "checks")}, indent=2))
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
