"""The Triton sampler step against float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_checks import assert_as_good
from latentrt.kernels import sampler_step
from latentrt.kernels._triton import forced
from latentrt.kernels.registry import specs
from latentrt.kernels.sampler_step import COLUMNS, HISTORY, KEEP_NOTHING, KEEP_OUT, KEEP_X0, StepRow
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


def raised(t: Any) -> Any:
    """A copy on the CPU, in float64 where it is of floats; what is no tensor as it is."""
    if not isinstance(t, Tensor):
        return t
    return t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)


@dataclass
class Expected:
    """What x and history are to be after one step of the operator's reference, in float32 and in float64."""

    given: dict[str, Any]
    scale: float | Tensor | None = None
    rescale: float | Tensor = 0.0

    def __post_init__(self) -> None:
        (spec,) = specs(["sampler_step"])
        self.usual = {name: None if t is None else t.clone() for name, t in self.given.items()}
        self.exact = {name: raised(t) for name, t in self.given.items()}
        spec.reference(**self.usual, guidance_scale=self.scale, guidance_rescale=self.rescale)
        spec.reference(**self.exact, guidance_scale=raised(self.scale), guidance_rescale=raised(self.rescale))

    def check(self) -> None:
        for name in ("x", "history"):
            if self.given[name] is not None:
                assert_as_good(self.given[name].cpu(), self.usual[name].cpu(), self.exact[name])


def check(given: dict[str, Any], scale: float | Tensor | None = None, rescale: float | Tensor = 0.0) -> None:
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
    check(given, scale, rescale)
    assert launches == {"_step_kernel": 1, **({"_ratio_kernel": 1} if rescale else {})}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.usefixtures("launches")
def test_layout_and_dtype_of_the_model(dtype: torch.dtype, rescale: float, device: torch.device) -> None:
    """channels_last, as a UNet leaves it; a scale for each image; more than one block; any strides."""
    scale = torch.rand(2, device=device) * 8
    for variance in (False, True):
        given = inputs((2, 4, 20, 19), device, variance=variance, dtype=dtype)
        given["model_out"] = given["model_out"].contiguous(memory_format=torch.channels_last)
        check(given, scale, rescale)
        given["model_out"] = given["model_out"].mT.contiguous().mT
        check(given, scale, rescale)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_a_rescale_of_each_image(device: torch.device, launches: Counter[str]) -> None:
    """0 is none, even of a flat output, whose ratio is no number."""
    given = inputs((3, 4, 5, 7), device)
    given["model_out"][1::3] = 0.25
    check(given, 7.4, torch.tensor([0.7, 0.0, 0.0], device=device))
    assert launches == {"_step_kernel": 1, "_ratio_kernel": 1}
    assert given["x"].isfinite().all()


@pytest.mark.usefixtures("launches")
def test_without_history_and_noise(device: torch.device) -> None:
    given = {**inputs((2, 1, 1, 1), device, keep=KEEP_NOTHING), "history": None, "noise": None}
    x = given["x"].clone()
    check(given, 7.4)
    assert not torch.equal(given["x"], x)


@pytest.mark.usefixtures("launches")
def test_strided_latents_are_written_in_place(device: torch.device) -> None:
    given = inputs((2, 4, 6, 5), device)
    given["x"] = torch.randn(2, 6, 5, 4, device=device).permute(0, 3, 1, 2)
    given["history"] = torch.randn(2, HISTORY, 4, 6, 5, device=device).transpose(0, 1)
    check(given, 3.0)


@pytest.mark.parametrize("path", [forced, nullcontext], ids=["kernel", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (2, 4, 0, 5)])
@pytest.mark.filterwarnings("ignore:std")  # of an image without pixels
def test_nothing_to_do(
    shape: tuple[int, ...], path: Callable[[], AbstractContextManager[None]], device: torch.device
) -> None:
    given, each = inputs(shape, device), torch.rand(shape[0], device=device)
    with path():
        for rescale in (0.0, 0.5, each):
            assert sampler_step(**given, guidance_scale=3.0, guidance_rescale=rescale).shape == shape


@pytest.mark.parametrize("step", [-1, 5, 2**40])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_outside_the_table(step: int, rows: int, device: torch.device, launches: Counter[str]) -> None:
    """Nothing beyond the table or the noise is read, the latents show it, and the history stays."""
    given = inputs((2, 4, 5, 7), device)
    given["table"], given["noise"] = given["table"][:rows], given["noise"][:rows]
    given["step"].fill_(step)
    history = given["history"].clone()
    assert sampler_step(**given, guidance_scale=3.0).isnan().all()
    assert given["history"].equal(history)
    assert launches == {"_step_kernel": 1}


@pytest.mark.usefixtures("launches")
def test_the_custom_op(device: torch.device) -> None:
    args = tuple(inputs((2, 4, 3, 5), device).values())
    op = torch.ops.latentrt.sampler_step.default
    torch.library.opcheck(op, (*args, None, 3.0, None, 0.5))
    torch.library.opcheck(op, (*args, *(torch.ones(2, device=device), None) * 2))


def test_the_custom_op_by_its_reference(device: torch.device) -> None:
    args = (t.double() if t.is_floating_point() else t for t in inputs((2, 4, 3, 5), device).values())
    torch.library.opcheck(torch.ops.latentrt.sampler_step.default, (*args, None, 3.0, None, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_full_size(rescale: float, launches: Counter[str]) -> None:
    check(inputs((4, 4, 128, 128), torch.device("cuda"), dtype=torch.float16), 7.4, rescale)
    assert launches["_step_kernel"] == 1


@pytest.mark.gpu
def test_a_captured_graph_serves_every_step(launches: Counter[str]) -> None:
    """The step is read on the device: what was recorded at step 3 replays step 1."""
    given = inputs((1, 4, 16, 16), torch.device("cuda"))
    start = {name: given[name].clone() for name in ("x", "history")}
    sampler_step(**given, guidance_scale=7.4)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler_step(**given, guidance_scale=7.4)
    for name, t in start.items():
        given[name].copy_(t)
    given["step"].fill_(1)
    expected = Expected(given, 7.4)
    graph.replay()
    expected.check()
