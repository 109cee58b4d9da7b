"""`bench/onnxruntime_side.py`: what it refuses before anything is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latentrt.bench import onnxruntime_side
from latentrt.bench.cases import Case
from latentrt.errors import BackendUnavailableError, RequestError


def test_plain_onnx_runtime_says_that_it_takes_no_bfloat16(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="takes no bfloat16; measure it in float32 or float16"):
        onnxruntime_side.open_side(case, torch.device("cpu"), torch.bfloat16, tmp_path)
    assert not any(tmp_path.iterdir())


def test_plain_onnx_runtime_exports_nothing_that_it_could_not_run(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime_side, "load_pipelines", lambda *_: pytest.fail("minutes are spent"))
    with pytest.raises(BackendUnavailableError, match="this onnxruntime is built without CUDA"):
        onnxruntime_side.open_side(case, torch.device("cuda"), torch.float16, tmp_path)
