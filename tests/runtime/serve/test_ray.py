"""Ray Serve itself: replicas killed under load, models by id, the end. Minutes on a slow machine."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import PIL.Image
import psutil
import pytest
from fake_runner import seed_of
from served import events_of, until

pytestmark = [pytest.mark.full, pytest.mark.ray, pytest.mark.timeout(1500)]
SECONDS = 400
TESTS = Path(__file__).parents[2]
IMAGES = "/v1/images/generations"


class Cluster:
    """A process with a cluster of its own; `lines` are its log."""

    def __init__(self, **deployed: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
        command = [sys.executable, str(TESTS / "ray_server.py"), json.dumps({"cpus": 0.1, **deployed})]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
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
    models = [{"id": name, "source": "ray_runner:steady"} for name in ("cat", "dog")]
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


def test_it_drains_and_ends() -> None:
    own = Cluster(models=[{"id": "cat", "source": "ray_runner:steady"}])
    try:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(own.ask, seed=k, steps=40) for k in range(4)]
            until(lambda: "latentrt_running_images 4" in own.client.get("/metrics").text, SECONDS)
            own.process.send_signal(signal.SIGTERM)
            assert [made(one.result()) for one in asked] == [0, 1, 2, 3]
        assert own.process.wait(SECONDS) == 0
    finally:
        own.close()


def test_a_model_that_does_not_load_says_why() -> None:
    own = Cluster(models=[{"id": "cat", "source": "ray_runner:broken"}])
    try:
        answer = own.client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the model does not load: 'no-model' is no folder or file"
    finally:
        own.close()
