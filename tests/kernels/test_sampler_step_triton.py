"""`kernels/_sampler_step_triton.py`: the Triton sampler step against float64: on the GPU where there is one, else in
Triton's interpreter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.kernels import sampler_step
from latentrt.kernels._dispatch import forced
from latentrt.kernels.aot import signature
from latentrt.kernels.registry import Case, specs
from latentrt.kernels.sampler_step import COLUMNS, HISTORY, KEEP_NOTHING, KEEP_OUT, KEEP_X0, StepRow
from latentrt.runtime import denoise
from latentrt.runtime.denoise import DenoiseState, LoopKind
from torch import Tensor

(SPEC,) = specs(["sampler_step"])
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered in divide"
    ),  # the ratio where the rescale is 0
]


def inputs(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    keep: float = KEEP_X0,
    clamp: float = math.inf,
    rows: int = 2,
    variance: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    B, C, *size = shape
    table = 2 * torch.rand(5, COLUMNS) - 1
    table[:, StepRow._fields.index("clamp")] = clamp
    table[:, StepRow._fields.index("keep")] = keep
    return {
        "x": torch.randn(shape, device=device),
        "model_out": torch.randn(rows * B, C * (2 if variance else 1), *size, device=device).to(dtype),
        "history": torch.randn(HISTORY, *shape, device=device),
        "noise": torch.randn(5, *shape, device=device),
        "table": table.to(device),
        "step": torch.tensor([3], device=device),
    }


def guidance(scale: float, rescale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """For each image of `like`."""
    return torch.full_like(like[:, 0, 0, 0], scale), torch.full_like(like[:, 0, 0, 0], rescale)


def raised(t: Tensor | None) -> Tensor | None:
    """A copy on the CPU, in float64 if it is of floats."""
    return None if t is None else t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)


@dataclass
class Expected:
    """What x and history are to be after one step of the operator's reference, in float32 and in float64."""

    given: dict[str, Any]
    scale: Tensor | None = None
    rescale: Tensor | None = None

    def __post_init__(self) -> None:
        self.usual = {name: None if t is None else t.clone() for name, t in self.given.items()}
        self.exact = {name: raised(t) for name, t in self.given.items()}
        SPEC.reference(**self.usual, guidance_scale=self.scale, guidance_rescale=self.rescale)
        SPEC.reference(**self.exact, guidance_scale=raised(self.scale), guidance_rescale=raised(self.rescale))

    def check(self) -> None:
        for name in ("x", "history"):
            if self.given[name] is not None:
                assert_as_good(self.given[name].cpu(), self.usual[name].cpu(), self.exact[name])


def check(given: dict[str, Any], scale: Tensor | None = None, rescale: Tensor | None = None) -> None:
    expected = Expected(given, scale, rescale)
    assert sampler_step(**given, guidance_scale=scale, guidance_rescale=rescale) is given["x"]
    expected.check()


@pytest.mark.parametrize("keep", [KEEP_NOTHING, KEEP_X0, KEEP_OUT])
@pytest.mark.parametrize("variance", [False, True], ids=["", "variance"])
@pytest.mark.parametrize(
    ("scale", "rescale", "clamp"), [(None, 0.0, math.inf), (7.4, 0.0, 0.5), (3.0, 0.7, math.inf)]
)
def test_formula(
    keep: float,
    variance: bool,
    scale: float | None,
    rescale: float,
    clamp: float,
    device: torch.device,
    launches: Counter[str],
) -> None:
    rows = 1 if scale is None else 2
    given = inputs((3, 4, 5, 7), device, keep=keep, clamp=clamp, rows=rows, variance=variance)
    check(given, *(() if scale is None else guidance(scale, rescale, given["x"])))
    assert launches == {"_step_kernel": 1, **({} if scale is None else {"_ratio_kernel": 1})}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.usefixtures("launches")
def test_layout_and_dtype_of_the_model(dtype: torch.dtype, rescale: float, device: torch.device) -> None:
    """channels_last, as a UNet leaves it; a scale for each image; more than one block; any strides."""
    scale, rescales = torch.rand(2, device=device) * 8, torch.full((2,), rescale, device=device)
    for variance in (False, True):
        given = inputs((2, 4, 20, 19), device, variance=variance, dtype=dtype)
        given["model_out"] = given["model_out"].contiguous(memory_format=torch.channels_last)
        check(given, scale, rescales)
        given["model_out"] = given["model_out"].mT.contiguous().mT
        check(given, scale, rescales)


def test_a_rescale_of_each_image(device: torch.device, launches: Counter[str]) -> None:
    """0 is none, even of a flat output, whose ratio is no number."""
    given = inputs((3, 4, 5, 7), device)
    given["model_out"][1::3] = 0.25
    scale, _ = guidance(7.4, 0.0, given["x"])
    check(given, scale, torch.tensor([0.7, 0.0, 0.0], device=device))
    assert launches == {"_step_kernel": 1, "_ratio_kernel": 1}
    assert given["x"].isfinite().all()


@pytest.mark.usefixtures("launches")
def test_without_history_and_noise(device: torch.device) -> None:
    given = {**inputs((2, 1, 1, 2), device, keep=KEEP_NOTHING), "history": None, "noise": None}
    x = given["x"].clone()
    check(given, *guidance(7.4, 0.0, given["x"]))
    assert not torch.equal(given["x"], x)


@pytest.mark.usefixtures("launches")
def test_strided_latents_are_written_in_place(device: torch.device) -> None:
    given = inputs((2, 4, 6, 5), device)
    given["x"] = torch.randn(2, 6, 5, 4, device=device).permute(0, 3, 1, 2)
    given["history"] = torch.randn(2, HISTORY, 4, 6, 5, device=device).transpose(0, 1)
    check(given, *guidance(3.0, 0.0, given["x"]))


@pytest.mark.parametrize("path", [forced, nullcontext], ids=["kernel", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (2, 4, 0, 5)])
@pytest.mark.filterwarnings("ignore:std")  # of an image without pixels
def test_nothing_to_do(
    shape: tuple[int, ...], path: Callable[[], AbstractContextManager[None]], device: torch.device
) -> None:
    given, each = inputs(shape, device), torch.rand(shape[0], device=device)
    with path():
        assert sampler_step(**given, guidance_scale=each, guidance_rescale=each).shape == shape


@pytest.mark.parametrize("step", [-1, 5, 2**40])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_outside_the_table(step: int, rows: int, device: torch.device, launches: Counter[str]) -> None:
    """Nothing beyond the table or the noise is read, the latents show it, and the history stays."""
    given = inputs((2, 4, 5, 7), device)
    given["table"], given["noise"] = given["table"][:rows], given["noise"][:rows]
    given["step"].fill_(step)
    history = given["history"].clone()
    scale, rescale = guidance(3.0, 0.0, given["x"])
    assert sampler_step(**given, guidance_scale=scale, guidance_rescale=rescale).isnan().all()
    assert given["history"].equal(history)
    assert launches == {"_step_kernel": 1, "_ratio_kernel": 1}


@pytest.mark.usefixtures("launches")
def test_the_custom_op(device: torch.device) -> None:
    args = tuple(inputs((2, 4, 3, 5), device).values())
    each = torch.full((2,), 0.5, device=device)
    torch.library.opcheck(torch.ops.latentrt.sampler_step.default, (*args, each, each))


def test_the_custom_op_by_its_reference(device: torch.device) -> None:
    args = (t.double() if t.is_floating_point() else t for t in inputs((2, 4, 3, 5), device).values())
    each = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.latentrt.sampler_step.default, (*args, each, each))


@pytest.mark.parametrize("case", SPEC.cases, ids=[case.name for case in SPEC.cases])
def test_the_cases_launch_what_the_loop_launches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is timed and tuned is what runs: the same kernels, of the same types, in the same order."""
    kind = LoopKind(
        (1, 4, 128, 128), 30, cfg=True, history=True, noise=True, variance=False, dtype=torch.float16
    )
    state, meta = DenoiseState(kind, torch.device("meta")), torch.device("meta")
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(denoise, "sampler_step", lambda *args: called.append(args))
    state.step(lambda: None)
    planned = [SPEC.plan(*args, arch=90)[1] for args in (*called, case.inputs(kind.dtype, meta))]
    of_loop, of_case = ([(step.label, signature(step)) for step in steps] for steps in planned)
    assert [label for label, _ in of_loop] == ["_ratio_kernel", "_step_kernel"]
    assert of_case == of_loop


@pytest.mark.gpu
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_full_size(rescale: float, launches: Counter[str]) -> None:
    given = inputs((4, 4, 128, 128), torch.device("cuda"), dtype=torch.float16)
    check(given, *guidance(7.4, rescale, given["x"]))
    assert launches["_step_kernel"] == 1


@pytest.mark.gpu
def test_a_captured_graph_serves_every_step(launches: Counter[str]) -> None:
    """The step is read on the device: what was recorded at step 3 replays step 1."""
    given = inputs((1, 4, 16, 16), torch.device("cuda"))
    start = {name: given[name].clone() for name in ("x", "history")}
    scale, rescale = guidance(7.4, 0.0, given["x"])
    sampler_step(**given, guidance_scale=scale, guidance_rescale=rescale)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler_step(**given, guidance_scale=scale, guidance_rescale=rescale)
    for name, t in start.items():
        given[name].copy_(t)
    given["step"].fill_(1)
    expected = Expected(given, scale, rescale)
    graph.replay()
    expected.check()
