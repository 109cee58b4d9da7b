"""`runtime/serve/ray_local.py`: Ray Serve itself: replicas killed under load, models by id, the end. Minutes on a slow
machine."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2 as httpx
import PIL.Image
import psutil
import pytest
from helpers.fake_runner import seed_of
from helpers.served import events_of
from helpers.waiting import until

pytestmark = [pytest.mark.full, pytest.mark.ray, pytest.mark.timeout(1500)]
SECONDS = 400
TESTS = Path(__file__).parents[2]
IMAGES = "/v1/images/generations"


class Cluster:
    """A process with a cluster of its own; `lines` are its log."""

    def __init__(self, **deployed: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
        command = [
            sys.executable,
            str(TESTS / "helpers" / "ray_server.py"),
            json.dumps({"cpus": 0.1, **deployed}),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,  # Ray tells there of workers that died
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until(lambda: self.url or self.process.poll() is not None, SECONDS)
        assert self.url, "".join(self.lines)
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS)

    @property
    def url(self) -> str:
        told = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return next((str(line["url"]) for line in told if "url" in line), "")

    def _read(self) -> None:
        self.lines.extend(self.process.stderr or ())

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in self.tree():
            try:
                if "ServeReplica:latentrt:replica" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post(IMAGES, json={"prompt": "a cat", "steps": 10, **fields})

    def close(self) -> None:
        self.client.close()
        tree = self.tree() if self.process.poll() is None else []
        self.process.kill()
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    models = [{"id": name, "source": "helpers.ray_runner:steady"} for name in ("cat", "dog")]
    one = Cluster(models=models, models_per_replica=2, min_replicas=2, max_replicas=2)
    yield one
    one.close()


def made(answer: httpx.Response) -> int:
    """The seed of the picture in an answer, which is that in its text."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = events_of(answer)
        (image,) = (event for event in events if event["type"] == "image_generation.completed")
        steps = [event["step"] for event in events if "step" in event]
        assert steps == sorted(set(steps))
    else:
        (image,) = answer.json()["data"]
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
    assert image["seed"] >= 65536 or seed_of(picture) == image["seed"]  # such is the fake's picture
    return int(image["seed"])


def test_killed_replicas_lose_no_request_and_come_back(cluster: Cluster) -> None:
    until(lambda: len(cluster.replicas()) == 2, SECONDS)
    before = {process.pid for process in cluster.replicas()}
    count = 48
    with ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(
                cluster.ask, seed=k if k % 2 else None, stream=k % 3 == 0, model=("cat", "dog")[k % 2]
            )
            for k in range(count)
        ]
        until(lambda: sum(one.done() for one in asked) >= 4, SECONDS)
        cluster.replicas()[0].send_signal(signal.SIGKILL)
        until(lambda: sum(one.done() for one in asked) >= count // 2, SECONDS)
        for process in cluster.replicas():  # both, if the first is back
            process.send_signal(signal.SIGKILL)
        seeds = [made(one.result()) for one in asked]
    assert seeds[1::2] == list(range(1, count, 2))
    until(lambda: len(cluster.replicas()) == 2, SECONDS)
    assert not before & {process.pid for process in cluster.replicas()}
    assert made(cluster.ask(seed=5)) == 5


def test_nothing_but_rays_replica_ports_listens_beyond_this_machine(cluster: Cluster) -> None:
    addresses = set()
    for process in [psutil.Process(cluster.process.pid), *cluster.tree()]:
        try:
            if "ServeReplica" in " ".join(process.cmdline()):  # Ray has no setting for its gRPC port
                continue
            links = process.net_connections("inet")
        except psutil.Error:
            continue
        addresses |= {link.laddr.ip for link in links if link.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert cluster.replicas()[0].environ()["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_rest_of_the_interface(cluster: Cluster) -> None:
    assert [one["id"] for one in cluster.client.get("/v1/models").json()["data"]] == ["cat", "dog"]
    assert cluster.client.get("/ready").json() == {"ready": True, "reason": None}
    assert cluster.client.get("/health").status_code == 200
    assert "<title>latentrt</title>" in cluster.client.get("/").text
    assert cluster.ask(steps=0).json()["error"]["param"] == "steps"
    assert cluster.ask(model="fish").status_code == 404


def taken(cluster: Cluster, pool: ThreadPoolExecutor, **fields: Any) -> Future[httpx.Response]:
    """Ask until it is taken: a refusal comes at once."""
    while True:
        asked = pool.submit(cluster.ask, **fields)
        done, _ = wait([asked], 0.25)
        if not done or asked.result().status_code == 200:
            return asked
        assert asked.result().status_code == 429, asked.result().text


def test_what_killed_replicas_had_waits_for_a_place() -> None:
    """Five places in each of three, and four more before them, for fifteen: none is refused that was taken."""
    own = Cluster(
        models=[{"id": "cat", "source": "helpers.ray_runner:steady"}],
        min_replicas=3,
        max_replicas=3,
        max_batch=1,
        max_queue=4,
    )
    try:
        with ThreadPoolExecutor(15) as pool:
            asked = [taken(own, pool, seed=k, steps=150, stream=k % 2 == 0) for k in range(15)]
            assert not any(one.done() for one in asked)
            for process in own.replicas()[:2]:
                process.send_signal(signal.SIGKILL)
            assert [made(one.result()) for one in asked] == list(range(15))
        with ThreadPoolExecutor(40) as pool:  # for what is new there are nineteen places
            answers = [one.result() for one in [pool.submit(own.ask, steps=40) for _ in range(40)]]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
    finally:
        own.close()


@pytest.fixture(scope="module")
def changing() -> Iterator[Cluster]:
    """A replica with a place for one of three models; or two."""
    sources = {"cat": "steady", "dog": "steady", "fish": "broken"}
    one = Cluster(
        models=[{"id": name, "source": f"helpers.ray_runner:{source}"} for name, source in sources.items()],
        models_per_replica=1,
        max_replicas=2,
        max_batch=1,
        target_ongoing=1,
    )
    yield one
    one.close()


def test_models_take_turns_in_one_place(changing: Cluster) -> None:
    for seed, model in enumerate(("cat", "dog", "cat")):
        assert made(changing.ask(seed=seed, model=model)) == seed
    for _ in range(2):  # tried, and not tried again at once
        answer = changing.ask(model="fish")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].endswith(
            "the model does not load: 'no-model' is not a local folder or file"
        )
    assert made(changing.ask(seed=4, model="dog")) == 4


def test_replicas_are_added_under_load(changing: Cluster) -> None:
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(changing.ask, seed=k, steps=150) for k in range(10)]
        until(lambda: len(changing.replicas()) == 2, SECONDS)
        assert not all(one.done() for one in asked)
        assert [made(one.result()) for one in asked] == list(range(10))


def test_it_drains_and_ends() -> None:
    """Twenty requests, of which eight are being made: SIGTERM ends it when all are answered; others are sent away."""
    own = Cluster(models=[{"id": "cat", "source": "helpers.ray_runner:steady"}])
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(own.ask, seed=k, steps=40, stream=k % 3 == 0) for k in range(20)]
            until(lambda: "latentrt_running_images 8" in own.client.get("/metrics").text, SECONDS)
            own.process.send_signal(signal.SIGTERM)
            until(lambda: own.client.get("/ready").status_code == 503, SECONDS)
            new = own.ask()
            assert (new.status_code, new.json()["error"]["code"]) == (503, "draining")
            assert new.headers["retry-after"] == "5"
            assert sum(one.done() for one in asked) < 20
            assert [made(one.result()) for one in asked] == list(range(20))
        assert own.process.wait(SECONDS) == 0
    finally:
        own.close()


def test_a_model_that_does_not_load_says_why() -> None:
    own = Cluster(models=[{"id": "cat", "source": "helpers.ray_runner:broken"}])
    try:
        answer = own.client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the model does not load: 'no-model' is not a local folder or file"
    finally:
        own.close()
