"""Scaled dot-product attention without a mask.

    o[b, i, h, :] = sum_j softmax_j(scale * <q[b, i, h, :], k[b, j, h, :]>) v[b, j, h, :]

Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; by default scale = D ** -0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference, tuning
from ._attention_triton import plan
from ._check import fail, require_dtypes, require_equal, require_rank
from ._dispatch import arch_of, launches_triton, uses_custom_op
from ._triton import run
from .registry import Case, OpSpec, register

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of each head over all keys.

    The layout is what a linear projection leaves behind, so callers neither transpose nor copy.

    Args:
        q: [B, Sq, H, D], any strides.
        k, v: [B, Sk, H, D], of q's dtype and device.
        scale: factor on the scores; D ** -0.5 where None.

    Returns:
        [B, Sq, H, D] of q's dtype. Scores and softmax of half types are kept in float32.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("attention", {"q": q, "k": k, "v": v})
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_rank("attention", name, tensor, f"[B, S{'q' if name == 'q' else 'k'}, H, D]")
    for name, tensor in (("k", k), ("v", v)):
        require_equal("attention", name, "have q's batch size", tensor.shape[0], q.shape[0])
        require_equal("attention", name, "have q's number of heads", tensor.shape[2], q.shape[2])
        require_equal("attention", name, "have q's head size", tensor.shape[3], q.shape[3])
    require_equal("attention", "v", "have k's number of keys", v.shape[1], k.shape[1])
    if isinstance(k.shape[1], int) and k.shape[1] == 0:
        raise fail("attention", "k", "hold at least one key", f"shape {tuple(k.shape)}")
    if not (scale is None or isinstance(scale, int | float | torch.SymFloat)):
        raise fail("attention", "scale", "be a number or None", repr(scale))
    if uses_custom_op(q):
        out: Tensor = torch.ops.latentrt.attention(q, k, v, scale)
        return out
    return reference.attention(q, k, v, scale)


@torch.library.custom_op("latentrt::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    if not launches_triton(q):
        return reference.attention(q, k, v, scale).contiguous()
    out, steps = plan(q, k, v, scale, arch=arch_of(q.device))
    done: Tensor = run(steps, out)
    return done


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _case(name: str, B: int, Sq: int, Sk: int, H: int, D: int, calls: int) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """As a model has them: self-attention's three are views of one projection, cross-attention's k and v."""
        if Sq == Sk:
            q, k, v = torch.randn(B, Sq, 3, H, D, dtype=dtype, device=device).unbind(2)
            return q, k, v
        q = torch.randn(B, Sq, H, D, dtype=dtype, device=device)
        k, v = torch.randn(B, Sk, 2, H, D, dtype=dtype, device=device).unbind(2)
        return q, k, v

    flops = 4.0 * B * H * Sq * Sk * D
    return Case(name, inputs, flops, elements=2 * B * H * D * (Sq + Sk), calls=calls)


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return reference.attention(q, k, v)

    return call


def _candidates(
    blocks: Sequence[Mapping[str, int]], stages: Sequence[int], variants: Sequence[Mapping[str, int]]
) -> list[dict[str, int]]:
    return [{**b, "num_stages": s, **v} for v in variants for b in blocks for s in stages]


_PLAIN: dict[str, int] = {}
_TMA = {"TMA": 1}
_SPECIALIZED = {"TMA": 1, "SPECIALIZE": 1}
_BLOCKS = [
    {"BLOCK_M": M, "BLOCK_N": N, "num_warps": warps}
    for M, N, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4))
]
# Triton specialises kernels of four warps only, and adds eight.
_BLOCKS_SPECIALIZED = [{"BLOCK_M": 128, "BLOCK_N": N, "num_warps": 4} for N in (128, 64)]
_BLOCKS_WIDE = [
    {"BLOCK_D": 64, "BLOCK_V": V, "BLOCK_M": M, "BLOCK_N": N, "num_warps": warps}
    for M, V, N, warps in (
        (64, 256, 64, 8),
        (64, 256, 32, 8),
        (64, 128, 64, 4),
        (64, 128, 32, 4),
        (128, 128, 64, 8),
        (64, 512, 32, 8),
    )
]

register(
    OpSpec(
        name="attention",
        op=attention,
        reference=reference.attention,
        plan=plan,
        cases=(
            _case("self 4096 x 10 heads", 2, 4096, 4096, 10, 64, calls=10),
            _case("self 1024 x 20 heads", 2, 1024, 1024, 20, 64, calls=60),
            _case("cross 4096 x 77, 10 heads", 2, 4096, 77, 10, 64, calls=10),
            _case("cross 1024 x 77, 20 heads", 2, 1024, 77, 20, 64, calls=60),
            _case("VAE 16384, head of 512", 1, 16384, 16384, 1, 512, calls=1),
        ),
        limit="matmul",
        tensor_cores=True,
        candidates={
            "attention": [
                tuning.LIBRARY,
                *_candidates(_BLOCKS, (1, 2, 3, 4), [_PLAIN]),
                *_candidates(_BLOCKS[:5], (2, 3), [_TMA]),
                *_candidates(_BLOCKS_SPECIALIZED, (2, 3), [_SPECIALIZED]),
            ],
            "attention_wide": [
                tuning.LIBRARY,
                *_candidates(_BLOCKS_WIDE, (1, 2, 3), [_PLAIN]),
                *_candidates([b for b in _BLOCKS_WIDE if b["BLOCK_M"] == 64], (1, 2), [_TMA]),
            ],
        },
        baselines={
            "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
            "SDPA memory-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        },
    )
)
