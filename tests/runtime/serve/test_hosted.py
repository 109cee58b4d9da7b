"""What a replica hosts: how it is configured, and that it frees what nobody waits for any more. No Ray."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import weakref
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
import yaml
from helpers import ray_runner
from helpers.fake_runner import FakeRunner, in_loop
from helpers.ray_runner import HELD
from helpers.replicas import DEPLOYED, IMAGES, body
from helpers.waiting import until
from latentrt.errors import RequestError
from latentrt.runtime.serve.hosted import Deployed, Forwarded, HostedModel

Run = Callable[..., tuple[int, str, str]]


def forwarded() -> Forwarded:
    """A request as the ingress sends it on."""
    content = json.dumps(body()).encode()
    headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)))
    return Forwarded("POST", IMAGES, "", headers, content)


def test_the_shipped_configuration_is_one() -> None:
    shipped = yaml.safe_load(resources.files("latentrt.runtime.serve").joinpath("ray.yaml").read_text())
    (application,) = shipped["applications"]
    deployed = Deployed.of(application["args"])
    assert deployed.ids == ["sdxl", "demo"]
    assert application["import_path"] == "latentrt.runtime.serve.ray_app:application"


def test_a_client_that_leaves_frees_the_replica() -> None:
    async def run() -> None:
        settings = Deployed.of({"models": [{"id": "cat", "source": "helpers.ray_runner:held"}]})
        hosted = HostedModel(settings.models[0], settings, ())
        await hosted.start()
        try:
            parts = hosted.answer(forwarded())
            waiting = asyncio.ensure_future(anext(parts))
            await asyncio.to_thread(HELD.reached)
            assert hosted.service.running == 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert hosted.service.running == 0
            HELD.release()
            metrics = b"".join(
                [
                    part
                    async for part in hosted.answer(Forwarded("GET", "/metrics"))
                    if isinstance(part, bytes)
                ]
            )
            counts = [line for line in metrics.splitlines() if line.startswith(b"latentrt_requests_total")]
            assert counts == [
                b'latentrt_requests_total{method="POST",path="/v1/images/generations",status="499"} 1.0'
            ]
        finally:
            HELD.release()
            await hosted.stop()

    HELD.hold()
    in_loop(run())


def test_a_model_that_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing but the replica's own references to it goes: FastAPI's caches keep its application."""
    runners = []

    def tracked() -> FakeRunner:
        runner = FakeRunner()
        runner.itself = runner  # type: ignore[attr-defined]  # as by the frames of an error
        runners.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(ray_runner, "quick", tracked)

    async def run() -> None:
        hosted = HostedModel(DEPLOYED.models[0], DEPLOYED, ())
        await hosted.start()
        assert [part async for part in hosted.answer(forwarded())]
        assert runners[0]() is not None
        await hosted.stop()
        assert runners[0]() is None

    in_loop(run())


def test_a_model_that_left_while_it_was_loaded_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()
    runners = []

    def slow() -> FakeRunner:
        loading.set()
        go_on.wait(60)
        runner = FakeRunner()
        runners.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(ray_runner, "quick", slow)

    async def run() -> None:
        hosted = HostedModel(DEPLOYED.models[0], DEPLOYED, ())
        starting = asyncio.ensure_future(hosted.start())
        await asyncio.to_thread(loading.wait, 60)
        await hosted.stop()
        await starting
        go_on.set()
        await asyncio.to_thread(until, lambda: not hosted.service.at_work, 60)
        assert runners[0]() is None

    in_loop(run())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "models: Field required"),
        ({"models": []}, "models: Tuple should have at least 1 item"),
        ({"models": [{"id": "a"}, {"id": "a"}]}, "models: Value error, ids must differ; these are a, a"),
        ({"models": [{"id": "a", "weights": 1}]}, "models.0.weights: Extra inputs are not permitted"),
        ({"models": [{"id": "a"}], "gpus": -1}, "gpus: Input should be greater than or equal to 0"),
        (
            {"models": [{"id": "a"}], "drain_seconds": float("inf")},
            "drain_seconds: Input should be less than or equal to 1000000",
        ),
        ({"models": [{"id": "a"}], "drain_seconds": float("nan")}, "drain_seconds: Input should be"),
        ({"models": [{"id": "a"}], "min_replicas": 3}, "max_replicas is 1, fewer than min_replicas, 3"),
    ],
)
def test_a_wrong_configuration_names_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        Deployed.of(values)


def test_without_ray_the_extra_is_named(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_app", "ray_local"):
        monkeypatch.delitem(sys.modules, f"latentrt.runtime.serve.{name}", raising=False)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")  # the import sets it: put back after the test
    code, out, err = run_cli("serve", "--ray")
    assert (code, out) == (1, "")
    assert '--ray needs ray, which is not installed; pip install "latentrt[ray]"' in err
    assert run_cli("serve", "--ray", "--replicas", "4..1")[0] == 2
