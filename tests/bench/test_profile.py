"""Where the time goes: operators by kind, of PyTorch and of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.planted_sides import planted
from latentrt.bench import report
from latentrt.bench.cases import Case
from latentrt.bench.gates import GATES
from latentrt.bench.profile import BETWEEN, kind_of, profile_call, profile_sessions
from latentrt.bench.results import CaseResult, Report
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import Layout
from latentrt.bench.worker import Worker
from latentrt.errors import BenchmarkError

SIDE = 256


def save_product(file: Path) -> None:
    """[SIDE, SIDE] times a matrix, four times over."""
    from onnx import TensorProto, helper

    names = [f"x{k}" for k in range(5)]
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [SIDE, SIDE], np.eye(SIDE, dtype=np.float32).tobytes(), True
    )
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [SIDE, SIDE]) for n in (names[0], names[-1])]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    graph = helper.make_graph(nodes, "product", value[:1], value[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)


def test_operators_of_both_libraries_are_distinguished(tmp_path: Path) -> None:
    save_product(tmp_path / "product.onnx")
    ones = np.ones((SIDE, SIDE), np.float32)
    with profile_sessions(tmp_path) as sessions:
        session = onnxruntime.InferenceSession(
            str(tmp_path / "product.onnx"), providers=["CPUExecutionProvider"]
        )

        def make() -> None:
            for _ in range(3):
                session.run(None, {"x0": ones})
            torch.nn.functional.conv2d(torch.ones(1, 8, 64, 64), torch.ones(8, 8, 3, 3))

        found = profile_call(make, sessions)
    assert onnxruntime.InferenceSession.__name__ == "InferenceSession"
    assert found.parts["matrix products"] > 0
    assert found.parts["convolutions"] > 0
    assert found.parts["norms"] == 0
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=1e-6)
    # Of the second call alone: three runs of four products, and what one convolution calls.
    assert 12 < found.operators < 30


def test_calls_that_differ_cannot_be_profiled(tmp_path: Path) -> None:
    save_product(tmp_path / "product.onnx")
    runs = iter([1, 2])
    with profile_sessions(tmp_path) as sessions:
        session = onnxruntime.InferenceSession(
            str(tmp_path / "product.onnx"), providers=["CPUExecutionProvider"]
        )

        def make() -> None:
            for _ in range(next(runs)):
                session.run(None, {"x0": np.ones((SIDE, SIDE), np.float32)})

        with pytest.raises(BenchmarkError, match="ran 3 times in two equal calls"):
            profile_call(make, sessions)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("FusedConv", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("Softmax", "attention"),
        ("aten::addmm", "matrix products"),
        ("FusedMatMul", "matrix products"),
        ("aten::native_group_norm", "norms"),
        ("SkipLayerNormalization", "norms"),
        ("BiasGelu", "element by element"),
        ("aten::mul", "element by element"),
        ("aten::exp", "element by element"),
        ("aten::expand", "moving"),
        ("Expand", "moving"),
        ("Transpose", "moving"),
        ("aten::copy_", "moving"),
        ("NonZero", "other operators"),
    ],
)
def test_kinds(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_a_case_reports_its_time_by_kind_of_operator(tmp_path: Path) -> None:
    case = Case("planted", "nothing real", "none", steps=3)
    compiled = planted("compiled")
    sides = [planted("a", step_seconds=0.01), planted("wrong", wrong_from=0)]
    plan = Plan(["a"], GATES["eager"], rounds=1, pictures=1, profile=["a", "wrong", "compiled"])
    run = CaseRun(
        case, [*sides, compiled], plan, steps={"base": 3}, device="cpu", folder=tmp_path, open_host=Worker
    )
    run.measure()
    result = run.result()
    profile, withheld, _ = (row.profile for row in result.rows)
    assert withheld is None
    assert profile is not None
    assert profile.parts[BETWEEN] > 0.03  # sleep is no operator
    assert profile.seconds == pytest.approx(sum(profile.parts.values()))
    text = report.markdown(Report("", {}, 0, [result]))
    assert "| ms | a | compiled |" in text
    assert f"| {BETWEEN} | " in text


def test_a_profile_is_of_what_was_timed(measure: Callable[..., CaseResult]) -> None:
    """Which layout is quicker is not tried out again in its process."""
    asked = []

    class Noting(Worker):
        def tune(self, layout: Layout | None = None) -> tuple[str, Layout | None]:
            asked.append((self._job.profiled, layout))
            return super().tune(layout)

    (row,) = measure(planted("a"), open_host=Noting, rounds=1, profile=["a"]).rows
    assert asked == [(False, None), (True, {"UNet": "channels_last", "VAE": "contiguous"})]
    assert row.profile is not None
