"""`bench/kernels.py`: `latentrt kernels --measure` and `--tune`, without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.dry_timing import ATTENTION
from latentrt import cli
from latentrt.bench import kernel_timing
from latentrt.bench import kernels as timings
from latentrt.errors import BackendUnavailableError
from latentrt.kernels import aot


def test_a_dry_run_compiles_what_the_real_one_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[aot.Request] = []

    def attempts(requests: list[aot.Request], processes: int, seconds: float) -> list[Any]:
        asked.extend(requests)
        return ["does not compile", *[[] for _ in requests[1:]]]

    monkeypatch.setattr(aot, "attempts", attempts)
    assert cli.main(["kernels", "--measure", "--dry-run", "--op", "attention", "--arch", "sm_90"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"op": "attention", "trial": None, "error": "does not compile"}
    assert len(rows) == len(asked) == 2 * len(ATTENTION.cases)
    assert cli.main(["kernels", "--tune", "--dry-run", "--op", "attention"]) == 0
    assert all(r.trial for r in asked[len(rows) :])
    asked.clear()
    capsys.readouterr()
    command = ["kernels", "--dry-run", "--op", "attention", "--dtype", "float16"]
    assert cli.main([*command, "--measure"]) == 0
    assert {r.args[0].dtype for r in asked} == {torch.float16}
    assert cli.main([*command, "--tune"]) == 1
    assert "--tune finds what serves both half types, by bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--tune", "--measure"])


def test_timing_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="timed on a CUDA GPU"):
        kernel_timing.require_gpu()
    assert cli.main(["kernels", "--measure"]) == 1
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_the_command_says_what_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"op": "geglu", "case": "one", "dtype": "bfloat16", "us": 1.0, "tflops": 0, "tbs": 1, "share": 0.5}
    good |= {"baselines": {}, "launches": {"_geglu_kernel": 1}}
    bad = {"op": "geglu", "case": "two", "dtype": "bfloat16", "error": "wrong result"}
    result: dict[str, Any] = {"rows": [good], "left": [], "ceilings": {"copy": 4.0}}
    monkeypatch.setattr(kernel_timing, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(timings, "measure", lambda *_: result)
    assert cli.main(["kernels", "--measure"]) == 0
    result["rows"].append(bad)
    capsys.readouterr()
    assert cli.main(["kernels", "--measure"]) == 1
    out, err = capsys.readouterr()
    assert "geglu, one" in out
    assert "1 of 2 without a time: geglu, two, bfloat16: wrong result" in err
