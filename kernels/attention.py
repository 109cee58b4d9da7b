"""Scaled dot-product attention without a mask.

    o[b, i, h, :] = sum_j softmax_j(scale * <q[b, i, h, :], k[b, j, h, :]>) v[b, j, h, :]

Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; by default scale = D ** -0.5.

The kernels keep a running maximum m and sum l of each query's scores and rescale what they have summed when m
grows, so that no [Sq, Sk] buffer exists: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018), algorithm 3; Dao, "FlashAttention-2" (2023), algorithm 1. Exponentials are base 2, log2(e) being part
of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference, tuning
from ._check import fail, require_dtypes, require_equal, require_rank
from ._triton import Launch, arch_of, kernel, run, takes, tl, usable
from .registry import Case, OpSpec, register

__all__ = ["attention"]


@kernel
def _attention(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    o_ptr,  # [B, Sq, H, D], contiguous
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    H,
    Sq,
    Sk,
    scale,  # of the scores, times log2(e); positive
    D: tl.constexpr,
    NEGATE: tl.constexpr,  # whether the true scale is negative
    PRECISION: tl.constexpr,
    EIGHTS: tl.constexpr,  # whether strides of batches, rows and heads are multiples of eight
    BLOCK_D: tl.constexpr,  # a head is cut into BLOCK_D and BLOCK_E columns: 80 is 64 + 16, not a padded 128
    BLOCK_E: tl.constexpr,  # 0 where the first are enough; else they fit D exactly
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    first = (pid % blocks) * BLOCK_M
    b = (pid // blocks // H).to(tl.int64)
    h = (pid // blocks % H).to(tl.int64)
    if (
        EIGHTS
    ):  # which Triton sees of multiples of sixteen only: heads of 40 would be loaded by single elements
        stride_qb, stride_qs, stride_qh = stride_qb // 8 * 8, stride_qs // 8 * 8, stride_qh // 8 * 8
        stride_kb, stride_ks, stride_kh = stride_kb // 8 * 8, stride_ks // 8 * 8, stride_kh // 8 * 8
        stride_vb, stride_vs, stride_vh = stride_vb // 8 * 8, stride_vs // 8 * 8, stride_vh // 8 * 8

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = BLOCK_D + tl.arange(0, BLOCK_E if BLOCK_E > 0 else 16)
    m_m = first + m < Sq
    m_d = d < D

    p_q = q_ptr + b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qs + m[:, None] * stride_qs
    p_k = k_ptr + b * stride_kb + h * stride_kh + n[None, :] * stride_ks
    p_v = v_ptr + b * stride_vb + h * stride_vh + n[:, None] * stride_vs

    b_q = tl.load(p_q + d[None, :] * stride_qd, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        b_q_e = tl.load(p_q + e[None, :] * stride_qd, mask=m_m[:, None], other=0.0)
        b_acc_e = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    full = Sk // BLOCK_N * BLOCK_N
    for TAIL in tl.static_range(2):  # whole blocks of keys, then what is left
        for start in tl.range(full * TAIL, full + (Sk - full) * TAIL, BLOCK_N):
            m_n = start + n < Sk
            if TAIL == 0:
                if BLOCK_D > D:
                    b_k = tl.load(p_k + d[:, None] * stride_kd, mask=m_d[:, None], other=0.0)
                else:
                    b_k = tl.load(p_k + d[:, None] * stride_kd)
            else:
                b_k = tl.load(p_k + d[:, None] * stride_kd, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            if BLOCK_E > 0:
                if TAIL == 0:
                    b_k_e = tl.load(p_k + e[:, None] * stride_kd)
                else:
                    b_k_e = tl.load(p_k + e[:, None] * stride_kd, mask=m_n[None, :], other=0.0)
                b_s = tl.dot(b_q_e, b_k_e, b_s, input_precision=PRECISION)
            if NEGATE:
                b_s = -b_s
            if TAIL == 1:
                b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
            b_old = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_max = b_new
            b_p = b_p.to(v_ptr.dtype.element_ty)

            if TAIL == 0:
                if BLOCK_D > D:
                    b_v = tl.load(p_v + d[None, :] * stride_vd, mask=m_d[None, :], other=0.0)
                else:
                    b_v = tl.load(p_v + d[None, :] * stride_vd)
            else:
                b_v = tl.load(p_v + d[None, :] * stride_vd, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_acc = tl.dot(b_p, b_v, b_acc * b_old[:, None], input_precision=PRECISION)
            if BLOCK_E > 0:
                if TAIL == 0:
                    b_v_e = tl.load(p_v + e[None, :] * stride_vd)
                else:
                    b_v_e = tl.load(p_v + e[None, :] * stride_vd, mask=m_n[:, None], other=0.0)
                b_acc_e = tl.dot(b_p, b_v_e, b_acc_e * b_old[:, None], input_precision=PRECISION)

            p_k += BLOCK_N * stride_ks
            p_v += BLOCK_N * stride_vs

    p_o = o_ptr + ((b * Sq + first) * H + h) * D + m[:, None].to(tl.int64) * (H * D)
    b_o = (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(p_o + d[None, :], b_o, mask=m_m[:, None] & m_d[None, :])
    if BLOCK_E > 0:
        b_o = (b_acc_e / b_sum[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(p_o + e[None, :], b_o, mask=m_m[:, None])


@kernel
def _attention_wide(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    o_ptr,  # [B, Sq, H, D], contiguous
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    H,
    Sq,
    Sk,
    scale,
    D: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of q and k multiplied at a time
    BLOCK_V: tl.constexpr,  # columns of v, and of the result, of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries and BLOCK_V result columns of one head too wide to be held at once."""
    slices = tl.cdiv(D, BLOCK_V)
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    columns = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    pid = pid // slices
    first = (pid % blocks) * BLOCK_M
    b = (pid // blocks // H).to(tl.int64)
    h = (pid // blocks % H).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_m = first + m < Sq
    m_v = columns < D

    p_q = q_ptr + b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qs + m[:, None] * stride_qs
    p_k = k_ptr + b * stride_kb + h * stride_kh + n[None, :] * stride_ks
    p_v = v_ptr + b * stride_vb + h * stride_vh + n[:, None] * stride_vs + columns[None, :] * stride_vd

    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, Sk, BLOCK_N):
        m_n = start + n < Sk
        b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in tl.static_range(0, D, BLOCK_D):
            m_d = c + d < D
            b_q = tl.load(p_q + (c + d)[None, :] * stride_qd, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_k = tl.load(p_k + (c + d)[:, None] * stride_kd, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        if NEGATE:
            b_s = -b_s
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_max = b_new
        b_v = tl.load(p_v, mask=m_n[:, None] & m_v[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
        p_k += BLOCK_N * stride_ks
        p_v += BLOCK_N * stride_vs

    p_o = o_ptr + ((b * Sq + first) * H + h) * D + m[:, None].to(tl.int64) * (H * D) + columns[None, :]
    tl.store(p_o, (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty), mask=m_m[:, None] & m_v[None, :])


def _plan(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, arch: int
) -> tuple[Tensor, list[Launch]]:
    B, Sq, H, D = q.shape
    Sk = k.shape[1]
    out = torch.empty((B, Sq, H, D), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out, []
    if scale is None:
        scale = D**-0.5
    args = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "o_ptr": out, "H": H, "Sq": Sq, "Sk": Sk}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        for dim, stride in zip("bshd", tensor.stride(), strict=True):
            args[f"stride_{name}{dim}"] = stride
    # Masked scores are -inf, and stay so unless multiplied by zero; this much makes all scores equal as well.
    args["scale"] = max(abs(scale) * math.log2(math.e), 1e-30)
    table = "attention_wide" if D > WIDE else "attention"
    tuned = dict(tuning.constants(table, arch, q.dtype, _shape_class(D, Sk)))
    num_warps, num_stages = tuned.pop("num_warps"), tuned.pop("num_stages")
    constants = {"D": D, "NEGATE": scale < 0, **tuned}
    # TF32 would drop thirteen of float32's bits.
    constants["PRECISION"] = "ieee" if q.dtype == torch.float32 else "tf32"
    programs = B * H * -(-Sq // tuned["BLOCK_M"])
    if D > WIDE:
        programs *= -(-D // tuned["BLOCK_V"])
        return out, [Launch(_attention_wide, (programs,), args, constants, num_warps, num_stages)]
    constants["BLOCK_D"], constants["BLOCK_E"] = _cut(D)
    constants["EIGHTS"] = all(stride % 8 == 0 for t in (q, k, v) for stride in t.stride()[:3])
    return out, [Launch(_attention, (programs,), args, constants, num_warps, num_stages)]


WIDE = 256
"""Heads of more columns than this are cut."""
_HEADS = (40, 64, 80, 128, 160, WIDE)
SHORT = 128
"""At most this many keys is a shape class of its own: a text's 77."""


def _shape_class(D: int, Sk: int) -> str:
    width = next((f"d{size}" for size in _HEADS if size >= D), "any")
    return f"{width}-short" if Sk <= SHORT else width


def _cut(D: int) -> tuple[int, int]:
    """Two powers of two that make up D; or the next power of two, whose rest is masked, and 0."""
    whole = max(16, 1 << (D - 1).bit_length())
    rest = D - whole // 2
    return (whole // 2, rest) if 16 <= rest < whole // 2 and rest & (rest - 1) == 0 else (whole, 0)


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
    if takes(q):
        out: Tensor = torch.ops.latentrt.attention(q, k, v, scale)
        return out
    return reference.attention(q, k, v, scale)


@torch.library.custom_op("latentrt::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    if not usable(q):
        return reference.attention(q, k, v, scale).contiguous()
    out, launches = _plan(q, k, v, scale, arch=arch_of(q.device))
    run(launches)
    return out


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


_CANDIDATES = [
    {"BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}
    for M, N, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4))
    for stages in (1, 2, 3, 4)
]
_WIDE_CANDIDATES = [
    {"BLOCK_D": 64, "BLOCK_V": V, "BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}
    for M, V, N, warps in (
        (64, 256, 64, 8),
        (64, 256, 32, 8),
        (64, 128, 64, 4),
        (64, 128, 32, 4),
        (128, 128, 64, 8),
        (64, 512, 32, 8),
    )
    for stages in (1, 2, 3)
]

SPEC = register(
    OpSpec(
        name="attention",
        op=attention,
        reference=reference.attention,
        plan=_plan,
        cases=(
            _case("self 4096 x 10 heads", 2, 4096, 4096, 10, 64, calls=10),
            _case("self 1024 x 20 heads", 2, 1024, 1024, 20, 64, calls=60),
            _case("cross 4096 x 77, 10 heads", 2, 4096, 77, 10, 64, calls=10),
            _case("cross 1024 x 77, 20 heads", 2, 1024, 77, 20, 64, calls=60),
            _case("VAE 16384, head of 512", 1, 16384, 16384, 1, 512, calls=1),
        ),
        limit="matmul",
        tensor_cores=True,
        candidates={"attention": _CANDIDATES, "attention_wide": _WIDE_CANDIDATES},
        rivals={
            "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
            "SDPA memory-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        },
    )
)
