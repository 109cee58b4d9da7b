"""`runtime/serve/commands.py`: `latentrt serve`, the whole of it: the demo behind a port, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx2 as httpx
import latentrt
import numpy as np
import openai
import PIL.Image
import psutil
import pytest
from helpers.waiting import until
from latentrt.runtime.serve import commands, logs, server
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.service import Service

Run = Callable[..., tuple[int, str, str]]


class Process:
    """A server process, which is killed where it has not ended with the `with`; `lines` are its log so far."""

    def __init__(self, *options: str, entry: Sequence[str] = ("-m", "latentrt.cli")) -> None:
        command = [sys.executable, *entry, "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Process:
        try:
            until(lambda: self.urls or self.process.poll() is not None, 120, what="an address in its log")
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    @property
    def urls(self) -> list[str]:
        return [line["url"] for line in self.lines if "url" in line]

    def _read(self) -> None:
        for line in self.process.stderr or []:
            self.lines.append(json.loads(line))  # every line is JSON

    def end(self) -> int:
        code = self.process.wait(240)
        self._reader.join(10)
        return code


@pytest.fixture
def demo() -> Iterator[Process]:
    options = ("--model", "demo", "--backend", "eager", "--max-batch", "2", "--drain-seconds", "240")
    with Process(*options) as one:
        yield one


def pending_images(metrics: str) -> float:
    """Images that wait or are being made."""
    lines = [line.split() for line in metrics.splitlines()]
    return sum(
        float(line[1]) for line in lines if line[0] in ("latentrt_waiting_images", "latentrt_running_images")
    )


def pixels(b64: str) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(b64))), np.int16)


def test_the_demo_served_and_drained(demo: Process) -> None:
    """Images are those of the pipeline; SIGTERM under load loses nothing that was taken, and ends with 0."""
    url = demo.urls[0]
    listens = [c.laddr.ip for c in psutil.Process(demo.process.pid).net_connections() if c.status == "LISTEN"]
    assert listens == ["127.0.0.1"]  # unless told otherwise
    fields = {"steps": 2, "guidance": 3.0, "seed": 5, "high_noise_frac": 0.5}
    with httpx.Client(base_url=url, timeout=240) as http, ThreadPoolExecutor(5) as pool:
        until(lambda: http.get("/ready").status_code == 200, 120)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            made = client.images.generate(
                model="demo", prompt="a red circle", n=2, size="64x72", extra_body=fields
            )
        body = {"prompt": "storm", "size": "64x64", "steps": 12}
        asked = [pool.submit(http.post, "/v1/images/generations", json={**body, "seed": k}) for k in range(4)]
        until(lambda: pending_images(http.get("/metrics").text) == 4)
        demo.process.send_signal(signal.SIGTERM)
        until(lambda: http.get("/ready").status_code == 503)
        assert http.post("/v1/images/generations", json=body).json()["error"]["code"] == "draining"
        assert [one.result().json()["data"][0]["seed"] for one in asked] == [0, 1, 2, 3]
    assert demo.end() == 0
    access = [line for line in demo.lines if line["logger"] == "latentrt.access" and line.get("images")]
    assert [(line["status"], line["images"]) for line in access] == [(200, 2)] + [(200, 1)] * 4
    assert all(line["request_id"] for line in access)

    pipe = latentrt.Pipeline.from_pretrained("demo", "demo", backend="eager")
    wanted = pipe(
        "a red circle", width=64, height=72, num_inference_steps=2, guidance_scale=3.0, high_noise_frac=0.5,
        num_images_per_prompt=2, seed=5,
    ).images  # fmt: skip
    for image, other in zip(made.data, wanted, strict=True):
        assert np.abs(pixels(image.b64_json) - np.asarray(other, np.int16)).max() <= 1


def test_a_model_that_is_not_there_leaves_it_unready_and_ctrl_c_ends_it() -> None:
    with Process("--model", "/no/such/model", "--max-queue", "5") as server:
        until(lambda: "does not load" in httpx.get(f"{server.urls[0]}/ready").text)
        assert (
            "'/no/such/model' is not a local folder or file"
            in httpx.get(f"{server.urls[0]}/ready").json()["reason"]
        )
        assert httpx.get(f"{server.urls[0]}/ready", headers={"Host": "evil.example"}).status_code == 403
        schemas = httpx.get(f"{server.urls[0]}/openapi.json").json()["components"]["schemas"]
        assert schemas["GenerationBody"]["properties"]["n"]["anyOf"][0]["maximum"] == 5  # more can never wait
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0


LOADS_FOR_EVER = """
import sys, time
from latentrt.cli import main
from latentrt.runtime.pipeline import Pipeline
Pipeline.from_pretrained = lambda *_, **__: time.sleep(10_000)
sys.exit(main())
"""


def test_collections_pass_over_what_was_loaded(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model too: once it is ready."""
    told: list[str] = []

    class Started:
        def __init__(self, _: Any, service: Service, **__: Any) -> None:
            self._service = service

        def run(self, _: Any) -> None:
            asyncio.run(self._loaded())

        async def _loaded(self) -> None:
            self._service.begin()
            await self._service.loaded()
            told.append(str(self._service.reason))
            await self._service.drain(10)

    start = AsyncEngine.start

    async def started(engine: AsyncEngine) -> None:
        await start(engine)
        told.append("warm")

    monkeypatch.setattr(AsyncEngine, "start", started)
    monkeypatch.setattr(server, "Server", Started)
    monkeypatch.setattr(logs, "log_as_json", lambda: None)
    monkeypatch.setattr(gc, "freeze", lambda: told.append("frozen"))
    monkeypatch.setattr(gc, "unfreeze", lambda: told.append("as before"))
    assert run_cli("serve", "--port", "0", "--backend", "eager")[0] == 0
    assert told == ["warm", "frozen", "None", "as before"]


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.full)])
def test_sigterm_ends_the_server_while_the_model_loads(signals: int) -> None:
    with Process(entry=("-c", LOADS_FOR_EVER)) as server:
        assert httpx.get(f"{server.urls[0]}/ready").json()["reason"] == "the model is being loaded"
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))" + LOADS_FOR_EVER


def test_a_flood_of_connections_takes_no_file_from_those_there_are() -> None:
    """Nor does it fill the log. The process may open 512 files, twice as many as it could when it was started."""
    with Process(entry=("-c", FEW_FILES)) as server, ExitStack() as flood:
        port = httpx.URL(server.urls[0]).port
        with httpx.Client(base_url=server.urls[0], timeout=60) as client:
            assert client.get("/health").status_code == 200
            for _ in range(700):
                flood.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=60)))
            open_files = psutil.Process(server.process.pid).num_fds
            until(lambda: 256 <= open_files() < 320)
            assert client.get("/health").status_code == 200
            flood.close()
            until(lambda: open_files() < 100)
            assert httpx.get(f"{server.urls[0]}/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    (told,) = (line["message"] for line in server.lines if line["level"] != "info")
    assert told == "256 connections are open, the most there may be; others are closed"


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        *(("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("127.1", True)),
        *(("localhost", True), ("LOCALHOST", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("", False), ("a..b", False)),
    ],
)
def test_who_can_reach_an_address(host: str, only_here: bool) -> None:
    """Where others can, a server without keys says so."""
    assert commands._is_local(host) == only_here


@pytest.mark.parametrize(
    ("addresses", "only_here"),
    [
        (["127.0.1.1"], True),
        (["127.0.1.1", "::1"], True),
        (["127.0.1.1", "fe80::1%eth0"], False),
        ([], False),
    ],
)
def test_who_can_reach_a_name(addresses: list[str], only_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as this machine's own, which may be its loopback's or not."""

    def getaddrinfo(host: str, port: None) -> list[Any]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(commands, "getaddrinfo", getaddrinfo)
    assert commands._is_local("mine") == only_here


def test_unusable_options(run_cli: Run, tmp_path: Any) -> None:
    (tmp_path / "empty").write_text("\n \n")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        for options, message in (
            (("--api-key-file", "empty"), "--api-key-file 'empty' holds no key; write one on each line"),
            (("--api-key-file", "gone"), "No such file or directory: gone"),
            (("--max-queue", "0"), "--max-queue is 0; it must be at least 1"),
            (("--max-batch", "-1"), "--max-batch is -1; it must be at least 1"),
            (("--drain-seconds", "inf"), "--drain-seconds must be a finite number; got inf"),
            (("--drain-seconds", "nan"), "--drain-seconds must be a finite number; got nan"),
            (("--drain-seconds", "-1"), "--drain-seconds is -1.0; it must be between 0 and 1000000"),
            (("--port", "99999"), "--port is 99999; it must be 0 to 65535"),
            (("--port", "-1"), "--port is -1; it must be 0 to 65535"),
            (("--port", str(taken.getsockname()[1])), "Address already in use"),
        ):
            code, out, err = run_cli("serve", *options)
            assert (code, out) == (1, "")
            assert message in err
