"""Input that is unusual but allowed: NaN and infinities, views that share memory, sizes beyond 32 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from latentrt.errors import KernelArgumentError
from latentrt.kernels import attention, reference, tuning
from latentrt.kernels.registry import specs
from tolerances import KERNEL_BESIDE_REFERENCE
from torch import Tensor
from torch._subclasses import FakeTensorMode

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
SMALL = {
    "attention": BLOCKS,
    "attention_wide": {**BLOCKS, "BLOCK_D": 128, "BLOCK_V": 256},
    "group_norm": {"BLOCK": 256, "PROGRAM": 512, "PROGRAMS": 4, "num_warps": 4, "num_stages": 1},
    "linear_geglu": {**BLOCKS, "BLOCK_K": 16, "GROUP_M": 2},
}
WITHOUT_MEMORY = torch.device("meta")
HALF = torch.float16

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN in Triton's interpreter
]


@pytest.fixture(autouse=True)
def _small(launches: object) -> Iterator[None]:
    torch.manual_seed(0)
    with ExitStack() as stack:
        for table, sizes in SMALL.items():
            stack.enter_context(tuning.trying(table, sizes))
        yield


def both(name: str, args: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of an operator's kernels and of its reference."""
    (spec,) = specs([name])
    ours, usual = spec.op(*args), spec.reference(*args)
    yield from zip(*([out] if isinstance(out, Tensor) else out for out in (ours, usual)), strict=True)


def check(name: str, *args: Any) -> None:
    """NaN and infinities where the reference has them; elsewhere its numbers."""
    for ours, usual in both(name, args):
        torch.testing.assert_close(ours, usual, **KERNEL_BESIDE_REFERENCE, equal_nan=True)


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Of each operator, the first to be spoilt."""
    x, one = torch.randn(2, 8, 4, 4, device=device), torch.rand(8, device=device)
    q, k, v = torch.randn(2, 20, 3, 2, 16, device=device).unbind(2)
    weight = torch.randn(6, 4, device=device)
    return {
        "attention": (q, k, v),
        "group_norm": (x, one, one, 4, 1e-5),
        "group_norm_silu": (
            x.contiguous(memory_format=torch.channels_last),
            one,
            one,
            4,
            1e-5,
            x[:, :, 0, 0],
        ),
        "layer_norm": (x, one[:4], one[:4], 1e-5),
        "add_layer_norm": (x, x.flip(0), one[:4], one[:4], 1e-5),
        "geglu": (x,),
        "linear_geglu": (x, weight, weight[:, 0]),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [spec.name for spec in specs() if spec.name != "sampler_step"])
def test_what_is_not_finite_spreads_as_in_the_reference(
    name: str, value: float, device: torch.device
) -> None:
    """To the row, the group or the image it is in, and no further."""
    x, *others = arguments(device)[name]
    spoilt = x.clone()
    spoilt[1, 3, 1, 2] = value
    check(name, spoilt, *others)
    assert any(out.isfinite().any() and not out.isfinite().all() for out, _ in both(name, (spoilt, *others)))


@pytest.mark.parametrize("table", ["attention", "attention_wide", "copied"])
def test_keys_that_score_minus_infinity_weigh_nothing(table: str, device: torch.device) -> None:
    """A whole block of them, which is all that has been seen when the next one begins."""
    D, dtype = 320 if table == "attention_wide" else 16, HALF if table == "copied" else torch.float32
    q, k, v = torch.randn(1, 20, 3, 1, D, device=device).to(dtype).unbind(2)
    q, k = q.abs(), k.clone()
    k[:, :16, :, 3] = -math.inf
    with tuning.trying("attention", {**BLOCKS, "TMA": int(table == "copied")}):
        torch.testing.assert_close(attention(q, k, v), attention(q, k[:, 16:], v[:, 16:]))
        # On the CPU: in float32 on CUDA, PyTorch's own kernel splits -inf into two numbers, one of which is NaN.
        torch.testing.assert_close(attention(q, k, v).cpu(), reference.attention(q.cpu(), k.cpu(), v.cpu()))


def test_views_that_share_memory(device: torch.device) -> None:
    x, one = torch.randn(2, 8, 4, 4, device=device), torch.rand(1, device=device)
    q = torch.randn(2, 20, 2, 16, device=device)
    overlapping = torch.randn(99, device=device).as_strided((2, 20, 2, 16), (20, 2, 1, 1))
    check("attention", q[:1].expand(2, -1, -1, -1), q[:, :, :1].expand(-1, -1, 2, -1), q[:, :1].expand_as(q))
    check("attention", overlapping, overlapping, overlapping)
    torch.testing.assert_close(attention(*[overlapping] * 3), attention(*[overlapping.contiguous()] * 3))
    for name in ("group_norm", "group_norm_silu"):
        check(name, x[:1].expand(3, -1, -1, -1), one.expand(8), one.expand(8), 4, 1e-5)
    check("layer_norm", x[:, :1].expand(-1, 8, -1, -1), one.expand(4), one.expand(4), 1e-5)
    check("add_layer_norm", one.expand(2, 4), one.expand(2, 4), one.expand(4), one.expand(4), 1e-5)
    check("geglu", one.expand(2, 8))
    check("linear_geglu", x[..., :1].expand_as(x), one.expand(6, 4), one.expand(6))


@pytest.mark.parametrize("groups", [1, 8], ids=["one group", "a group for each channel"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 8, 1, 1), (3, 8, 1, 7)])
def test_groups_at_both_ends(
    shape: tuple[int, ...], channels_last: bool, groups: int, device: torch.device
) -> None:
    x, one = torch.randn(shape, device=device), torch.rand(8, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check("group_norm_silu", x, one, one, groups, 1e-5)
    check("group_norm_silu", x[:, :1], one[:1], one[:1], 1, 1e-5)  # one channel is in either layout


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "an image of channels last": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "channels last, cut": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, ::2],
    "a pixel of many": lambda x: x[:, :, :1, :1],
    "transposed": lambda x: x.mT,
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
def test_the_fakes_have_the_operators_layout(
    view: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Strides too, which a compiled graph goes by."""
    x = view(torch.randn(2, 8, 4, 4, device=device, dtype=dtype))
    one, last = torch.rand(8, device=device, dtype=dtype), x.shape[-1]
    calls: dict[str, tuple[Any, ...]] = {
        "group_norm": (x, one, one, 4, 1e-5),
        "group_norm_silu": (x, one, one, 4, 1e-5, x[:, :, 0, 0]),
        "layer_norm": (x, one[:last], one[:last], 1e-5),
        "add_layer_norm": (x, x.contiguous(), one[:last], one[:last], 1e-5),
        "linear_geglu": (x, torch.rand(6, last, device=device, dtype=dtype), None),
        "attention": (x, x.flip(1), x),
    }
    for name, args in calls.items():
        (spec,) = specs([name])
        with FakeTensorMode() as mode:
            faked = spec.op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        real = spec.op(*args)
        for f, r in zip(*([t] if isinstance(t, Tensor) else t for t in (faked, real)), strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), name


def test_strides_that_a_block_steps_over_32_bits_with() -> None:
    """Then a copy is taken, for offsets within a block have 32 bits; below that none is. In half types one is
    taken as well of rows that begin anywhere and of columns that lie apart."""
    (spec,) = specs(["attention"])

    def strides(row: int, column: int, dtype: torch.dtype, D: int = 64) -> tuple[int, int]:
        size, apart = (1, 9, 1, D), (2**40, row, 2**35, column)
        q = torch.empty_strided(size, apart, dtype=dtype, device=WITHOUT_MEMORY)
        _, (launch,) = spec.plan(q, q, q, arch=90)
        return launch.args["stride_ks"], launch.args["stride_kd"]

    for dtype in (HALF, torch.float32):
        assert strides(2**23, 1, dtype) == (2**23, 1)
        assert strides(2**24, 1, dtype) == (64, 1)
        assert strides(1, 2**24, dtype) == (64, 1)
    assert strides(1, 2**23, torch.float32) == (1, 2**23)
    assert strides(1, 2**23, HALF) == (64, 1)
    assert strides(65, 1, torch.float32) == (65, 1)
    assert strides(65, 1, HALF) == (64, 1)
    assert strides(60, 1, HALF, D=60) == (64, 1)
    assert strides(64, 1, HALF, D=60) == (64, 1)


def test_more_than_the_kernels_count_to() -> None:
    one = torch.empty(1, dtype=HALF, device=WITHOUT_MEMORY)
    (spec,) = specs(["group_norm"])
    spec.plan(one.expand(1, 2, 2**31 - 1, 1), one.expand(2), one.expand(2), 1, 1e-5, arch=90)
    with pytest.raises(
        KernelArgumentError, match=r"x must have fewer than 2\^31 positions, got shape \(1, 1, 2"
    ):
        spec.plan(one.expand(1, 1, 2**31, 1), one, one, 1, 1e-5, arch=90)
    (spec,) = specs(["linear_geglu"])
    with pytest.raises(KernelArgumentError, match=r"weight must have fewer than 2\^32 elements, got shape"):
        spec.plan(one.expand(1, 2**16), one.expand(2**16, 2**16), None, arch=90)
