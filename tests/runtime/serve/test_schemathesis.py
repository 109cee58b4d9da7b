"""`runtime/serve/schema.py`: the OpenAPI document is complete and true: schemathesis asks by it, and beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from helpers.fake_runner import FakeRunner
from helpers.served import Served, served
from helpers.waiting import until
from hypothesis import HealthCheck, assume, given, settings
from latentrt.runtime.serve.app import create_app
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.metrics import Metrics
from latentrt.runtime.serve.schema import Limits
from latentrt.runtime.serve.service import Service
from schemathesis import GenerationMode

LIMITS = Limits(pixels=512 * 512, steps=50, images=3, prompt=50)
# A queue may be full, and a time too short; whether a size or seeds are beyond a limit is left out of what is asked.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "429", "504"]
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "404", "405", "413", "422"]
"""


@pytest.fixture(scope="module")
def document() -> Any:
    """Of an application in this process, without a network."""
    metrics = Metrics()
    service = Service("cat-model", lambda: AsyncEngine(FakeRunner(), on_batch=metrics.batch))
    app = create_app(service, metrics=metrics, limits=LIMITS)
    config = schemathesis.Config.from_str(CONFIG)
    loaded = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    until(lambda: service.reason is None)
    return loaded


def fits(case: Any) -> bool:
    """Whether it is within what no field shows alone: pixels, and seeds that count up."""
    body = case.body if isinstance(case.body, dict) else {}
    size = body.get("size")
    width, height = (8, 8) if size in (None, "auto") else map(int, size.split("x"))
    seeds = (body.get("seed") or 0) + (body.get("n") or 1) - 1
    return width * height <= LIMITS.pixels and seeds < 2**63


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("POST", "/v1/images/generations", GenerationMode.POSITIVE),
        ("POST", "/v1/images/generations", GenerationMode.NEGATIVE),
        ("GET", "/v1/models", GenerationMode.POSITIVE),  # in which nothing can be wrong
        ("GET", "/v1/models/{model}", GenerationMode.POSITIVE),
        ("GET", "/v1/models/{model}", GenerationMode.NEGATIVE),
        ("GET", "/ready", GenerationMode.POSITIVE),
    ],
)
def test_answers_are_as_described(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = document[path][method]

    @settings(
        max_examples=20 if method == "POST" else 3,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        assume(mode is GenerationMode.NEGATIVE or fits(case))
        case.call_and_validate()

    ask()


def test_errors_are_described_where_they_can_be(document: Any) -> None:
    raw = document.raw_schema
    answers = raw["paths"]["/v1/images/generations"]["post"]["responses"]
    assert set(answers) == {"200", "400", "404", "408", "413", "422", "429", "500", "503", "504"}
    assert set(answers["200"]["content"]) == {"application/json", "image/png", "text/event-stream"}
    assert "Retry-After" in answers["429"]["headers"]
    assert set(raw["paths"]["/v1/models/{model}"]["get"]["responses"]) == {"200", "404"}
    assert "HTTPValidationError" not in str(raw)
    fields = raw["components"]["schemas"]["GenerationBody"]["properties"]
    assert fields["steps"]["anyOf"][0]["maximum"] == 50
    assert fields["prompt"]["maxLength"] == 50
    assert fields["model"]["anyOf"][0]["enum"] == ["cat-model"]


def test_keys_are_described() -> None:
    service = Service("cat-model", lambda: AsyncEngine(FakeRunner()))
    raw = create_app(service, metrics=Metrics(), api_keys=["k"]).openapi()
    for path, method in (("/v1/images/generations", "post"), ("/v1/models", "get"), ("/metrics", "get")):
        operation = raw["paths"][path][method]
        assert operation["security"] == [{"key": []}]
        assert "401" in operation["responses"]
    assert "security" not in raw["paths"]["/health"]["get"]


@pytest.mark.parametrize("hosts", [(), ("localhost",)])
def test_names_are_described(hosts: tuple[str, ...]) -> None:
    """A foreign one is refused everywhere, or nowhere."""
    service = Service("cat-model", lambda: AsyncEngine(FakeRunner()))
    raw = create_app(service, metrics=Metrics(), hosts=hosts).openapi()
    operations = [operation for path in raw["paths"].values() for operation in path.values()]
    assert len(operations) == 6
    for operation in operations:
        assert ("403" in operation["responses"]) == bool(hosts)
    if hosts:
        schema = operations[0]["responses"]["403"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """All of its phases, over the network."""
    # The program cannot leave out what no field shows alone.
    (tmp_path / "schemathesis.toml").write_text(CONFIG.replace('"2xx", "429"', '"2xx", "422", "429"'))
    with served(FakeRunner, limits=LIMITS) as server:
        finished = _schemathesis(server, tmp_path)
    print(finished.stdout[-6000:])
    assert finished.returncode == 0


def _schemathesis(server: Served, folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{server.url}/openapi.json", "--max-examples", "100", "--no-color"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
