"""`kernels/_attention_library.py`: attention by PyTorch's libraries, where the tuned data choose them, against
float64."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.kernels import _attention_library, attention, reference, tuning
from latentrt.kernels._attention_triton import plan, plan_kernel, tuning_key
from latentrt.kernels._triton import Launch
from torch import Tensor

META = torch.device("meta")
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(
    B: int, Sq: int, Sk: int, H: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """q, and k and v as views of one projection."""
    q = torch.randn(B, Sq, H, D, device=device).to(dtype)
    k, v = torch.randn(B, Sk, 2, H, D, device=device).to(dtype).unbind(2)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    out = attention(q, k, v, scale)
    assert out.is_contiguous()
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    assert_as_good(out, reference.attention(q, k, v, scale), exact)


def in_chunks(count: int) -> Counter[str]:
    steps = ("library: attention, scores", "_exponentials", "library: attention, values")
    return Counter(dict.fromkeys(steps, count))


@by_dtype
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_wide_heads_by_matmul(
    scale: float | None,
    dtype: torch.dtype,
    device: torch.device,
    launches: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the data have it; chunks of six queries, then of five, for each of two images of two heads."""
    per_query = 2 * 150 * (4 if dtype == torch.float32 else 6)
    monkeypatch.setattr(_attention_library, "CHUNK_BYTES", 7 * per_query)
    check(*draw(2, 17, 150, 2, 320, dtype, device), scale)
    assert launches == in_chunks(2 * 3)


@by_dtype
@pytest.mark.usefixtures("launches")
def test_more_keys_than_a_block_and_a_query_too_large_for_a_chunk(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attention_library, "CHUNK_BYTES", 1)
    q, k, v = draw(1, 2, 4099, 1, 257, dtype, device)
    check(q * 30, k, v)  # scores in the hundreds


@pytest.mark.usefixtures("launches")
def test_keys_that_score_minus_infinity_weigh_nothing(device: torch.device) -> None:
    q, k, v = draw(1, 3, 200, 1, 320, torch.float32, device)
    q = q.abs()
    k[:, :16, :, 3] = -math.inf
    torch.testing.assert_close(attention(q, k, v), attention(q, k[:, 16:], v[:, 16:]))


@by_dtype
def test_heads_by_pytorch_own_attention(
    dtype: torch.dtype, device: torch.device, launches: Counter[str]
) -> None:
    q, k, v = draw(2, 20, 33, 2, 64, dtype, device)
    with tuning.trying("attention", tuning.LIBRARY):
        check(q, k, v)
        check(q, k, v, -0.3)
        torch.library.opcheck(torch.ops.latentrt.attention.default, (q, k, v, None))
    assert set(launches) == {"library: attention"}


def test_the_custom_op_of_wide_heads(device: torch.device, launches: Counter[str]) -> None:
    q, k, v = draw(1, 3, 130, 1, 320, torch.float16, device)
    torch.library.opcheck(torch.ops.latentrt.attention.default, (q, k, v, None))
    assert set(launches) == set(in_chunks(1))


@pytest.mark.parametrize(
    "row",
    [
        {"LIBRARY": 1, "num_warps": 4, "num_stages": 1},
        {"LIBRARY": 2},
        {"BLOCK_M": 16, "num_warps": 4},
        {},
    ],
)
@pytest.mark.usefixtures("launches")
def test_a_row_says_one_thing(row: dict[str, int], device: torch.device) -> None:
    told = rf"num_stages, or {{'LIBRARY': 1}} alone, not {row}".replace("{", r"\{")
    with tuning.trying("attention", row), pytest.raises(ValueError, match=told):
        attention(*draw(1, 3, 5, 1, 64, torch.float32, device))


@pytest.mark.parametrize("arch", tuning.architectures())
@by_dtype
def test_where_only_a_kernel_can_be_launched_there_is_one(dtype: torch.dtype, arch: int) -> None:
    """As in a plugin, also where the data choose the libraries."""
    q, k, v = draw(1, 300, 300, 1, 512, dtype, META)
    with tuning.trying("attention_wide", tuning.LIBRARY):
        assert not all(isinstance(step, Launch) for step in plan(q, k, v, arch=arch)[1])
    _, (launch,) = plan_kernel(q, k, v, None, tuning.plain(*tuning_key(q, k, arch)))
    assert launch.label == "_attention_wide"


@by_dtype
def test_the_scratch_of_a_vae_is_bounded(dtype: torch.dtype) -> None:
    """At 1024x1024 and at 2048x2048, where all scores would be 17 GB."""
    for S in (16384, 65536):
        with tuning.trying("attention_wide", tuning.LIBRARY):
            _, steps = plan(*draw(1, S, S, 1, 512, dtype, META), arch=90)
        first = steps[0].args["out"].untyped_storage().nbytes()
        p = steps[1].args["p_ptr"].untyped_storage()
        taken = first + (0 if dtype == torch.float32 else p.nbytes())
        assert 0.8 * _attention_library.CHUNK_BYTES < taken <= _attention_library.CHUNK_BYTES


@pytest.mark.gpu
@by_dtype
def test_a_graph_of_wide_heads(dtype: torch.dtype) -> None:
    """As it runs without one, after which its inputs are others."""
    q, k, v = draw(1, 4096, 4096, 1, 512, dtype, torch.device("cuda"))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(q, k, v)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = attention(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    exact = reference.attention(q.double(), k.double(), v.double())
    assert_as_good(out, reference.attention(q, k, v), exact)
