"""`kernels/_attention_triton.py`: the Triton attention kernels against float64: on the GPU where there is one, else in
Triton's interpreter."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.errors import BackendUnavailableError
from latentrt.kernels import attention, geglu, reference, tuning
from latentrt.kernels._attention_triton import plan
from latentrt.kernels._dispatch import arch_of, forced
from torch import Tensor

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
SMALL_WIDE = {**SMALL, "BLOCK_D": 128, "BLOCK_V": 256}
TMA = {**SMALL, "BLOCK_M": 32, "TMA": 1}
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
variants = pytest.mark.parametrize("variant", [TMA, {**TMA, "SPECIALIZE": 1}], ids=["copied", "specialized"])

pytestmark = pytest.mark.usefixtures("poisoned")


def fused(B: int, S: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection."""
    return torch.randn(B, S, 3, H, D, device=device).to(dtype).unbind(2)


def amid_nan(
    B: int, Sq: int, Sk: int, H: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """q, k, v in memory that is NaN before, between and after their rows."""

    def views(S: int, count: int) -> tuple[Tensor, ...]:
        around = torch.full((B + 2, S, 2 * count + 1, H, D), float("nan"), dtype=dtype, device=device)
        inside = around[1:-1, :, 1::2]
        return inside.copy_(torch.randn(inside.shape, device=device)).unbind(2)

    return *views(Sq, 1), *views(Sk, 2)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    out = attention(q, k, v, scale)
    assert out.is_contiguous()
    exact = reference.attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), scale)
    assert_as_good(out.cpu(), reference.attention(q, k, v, scale).cpu(), exact)


CASES = [
    pytest.param(2, 33, 33, 2, 64, id="two heads, a block and one row"),
    pytest.param(1, 20, 77, 1, 64, id="a text's 77 keys"),
    pytest.param(1, 1, 1, 1, 40, id="one query, one key; D of SD 1.x, not a power of two"),
    pytest.param(1, 33, 33, 1, 40, id="D of SD 1.x in several blocks"),
    pytest.param(1, 17, 1, 1, 64, id="one key"),
    pytest.param(1, 1025, 3, 1, 16, id="1025 queries"),
    pytest.param(1, 17, 127, 1, 80, id="127 keys, D = 64 + 16"),
    pytest.param(1, 127, 77, 1, 160, id="127 queries, 77 keys, D = 128 + 32"),
    pytest.param(1, 16, 32, 1, 128, id="whole blocks only"),
    pytest.param(1, 5, 35, 1, 160, id="D = 128 + 32"),
    pytest.param(1, 7, 20, 3, 8, id="D below a block"),
    pytest.param(1, 7, 18, 1, 512, id="the VAE's head, cut"),
]


@by_dtype
@pytest.mark.parametrize(("B", "Sq", "Sk", "H", "D"), CASES)
def test_numerics(
    B: int,
    Sq: int,
    Sk: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    launches: Counter[str],
) -> None:
    q = torch.randn(B, Sq, H, D, device=device).to(dtype)
    k, v = torch.randn(B, Sk, 2, H, D, device=device).to(dtype).unbind(2)
    if Sq == Sk:
        q, k, v = fused(B, Sq, H, D, dtype, device)
    with tuning.trying("attention", SMALL), tuning.trying("attention_wide", SMALL_WIDE):
        check(q, k, v)
    assert sum(launches.values()) == 1


@by_dtype
@pytest.mark.parametrize("Sk", [1025, 2049])
def test_tuned_blocks(Sk: int, dtype: torch.dtype, device: torch.device, launches: Counter[str]) -> None:
    """Blocks as they are tuned, many keys: one more than whole blocks."""
    q = torch.randn(1, 3, 1, 64, device=device).to(dtype)
    k, v = torch.randn(1, Sk, 2, 1, 64, device=device).to(dtype).unbind(2)
    check(q, k, v)
    assert launches.total() == 1


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("Sq", "Sk", "D"),
    [
        pytest.param(48, 48, 64, id="whole blocks of keys, and half a block of queries"),
        pytest.param(33, 19, 16, id="neither"),
        pytest.param(3, 16, 512, id="the VAE's head, whole"),
    ],
)
def test_descriptors(
    Sq: int,
    Sk: int,
    D: int,
    dtype: torch.dtype,
    variant: dict[str, int],
    device: torch.device,
    launches: Counter[str],
) -> None:
    """Two images, so that blocks beyond the first one's end would show; and NaN around what is described."""
    q, k, v = amid_nan(2, Sq, Sk, 1 if D == 512 else 3, D, dtype, device)
    wide = {**variant, "BLOCK_D": 128, "BLOCK_V": 256}
    with tuning.trying("attention", variant), tuning.trying("attention_wide", wide):
        check(q, k, v)
        check(q, k, v, -0.2)
    assert launches == {"_attention_tma": 2}


@by_dtype
@pytest.mark.parametrize(("D", "kernel"), [(64, "_attention"), (80, "_attention"), (320, "_attention_wide")])
def test_nan_around_the_views(
    D: int, kernel: str, dtype: torch.dtype, device: torch.device, launches: Counter[str]
) -> None:
    """Sizes that blocks overlap."""
    with tuning.trying("attention", SMALL), tuning.trying("attention_wide", SMALL_WIDE):
        check(*amid_nan(2, 19, 21, 2, D, dtype, device))
    assert launches == {kernel: 1}


@variants
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_image_of_nan_stays_alone(
    variant: dict[str, int], device: torch.device, launches: Counter[str]
) -> None:
    q, k, v = fused(3, 20, 2, 16, torch.float16, device)
    with tuning.trying("attention", variant):
        alone = attention(q, k, v)[1]
        for t in (q, k, v):
            t[0] = t[2] = float("nan")
        assert torch.equal(attention(q, k, v)[1], alone)
    assert launches == {"_attention_tma": 2}


def test_what_descriptors_cannot_carry(device: torch.device, launches: Counter[str]) -> None:
    """Then the plain kernel, with the same blocks."""
    q, k, v = fused(2, 20, 2, 16, torch.float16, device)
    with tuning.trying("attention", TMA):
        check(q.float(), k.float(), v.float())  # too wide
        check(*fused(2, 20, 2, 40, torch.float16, device))  # no power of two
        check(q[:, :9], k, v)  # the second image's queries do not follow the first's
        check(*(torch.empty(2, 20, 2, 17, device=device).half()[..., 1:].copy_(t) for t in (q, k, v)))
        check(q, k.transpose(1, 3).contiguous().transpose(1, 3), v)  # columns apart
    assert launches == {"_attention": 5}


@pytest.mark.usefixtures("launches")
def test_a_wide_head_that_no_slice_divides(device: torch.device) -> None:
    q, k, v = fused(1, 18, 1, 320, torch.float16, device)
    with tuning.trying("attention_wide", SMALL_WIDE):
        check(q, k, v)


@by_dtype
@pytest.mark.usefixtures("launches")
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    """Heads before positions, columns apart."""
    q, k, v = (
        torch.randn(2, 3, 64, 20, device=device).to(dtype).permute(0, 3, 1, 2)[:, ::2] for _ in range(3)
    )
    with tuning.trying("attention", SMALL):
        check(q, k, v)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.usefixtures("launches")
def test_scales(scale: float, device: torch.device) -> None:
    q, k, v = fused(1, 20, 1, 16, torch.float32, device)
    with tuning.trying("attention", SMALL):
        check(q, k, v, scale)


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
@pytest.mark.usefixtures("launches")
def test_equal_and_large_scores(size: float, device: torch.device) -> None:
    """Rows of equal scores give the mean of v; scores in the thousands overflow nothing."""
    q, k, v = fused(1, 35, 1, 64, torch.float16, device)
    k = torch.full_like(k, size)
    with tuning.trying("attention", SMALL):
        check(q * size, k, v)
        check(q * size, q * size, v)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64)])
@pytest.mark.usefixtures("launches")
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    B, _, H, D = shape
    q = torch.randn(shape, device=device)
    k = torch.randn(B, 7, H, D, device=device)
    assert attention(q, k, k).shape == shape


def test_the_custom_op(device: torch.device, launches: Counter[str]) -> None:
    """Schema, fake and dispatch, with the kernel inside and, on the CPU, without."""
    q, k, v = fused(1, 5, 2, 16, torch.float32, device)
    with tuning.trying("attention", SMALL):
        torch.library.opcheck(torch.ops.latentrt.attention.default, (q, k, v, None))
    assert launches["_attention"] > 0


def test_the_custom_op_by_its_reference(device: torch.device) -> None:
    q, k, v = fused(1, 5, 2, 16, torch.float64, device)
    torch.library.opcheck(torch.ops.latentrt.attention.default, (q, k, v, 0.3))


def test_float64_runs_the_reference(device: torch.device, launches: Counter[str]) -> None:
    q, k, v = fused(1, 5, 2, 16, torch.float64, device)
    torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v))
    assert not launches


def test_without_triton_a_forced_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    q = torch.randn(1, 5, 2, 16)
    assert torch.equal(attention(q, q, q), reference.attention(q, q, q))
    with forced(), pytest.raises(BackendUnavailableError, match=r"pip install 'latentrt\[triton\]'"):
        attention(q, q, q)


def test_a_gpu_without_triton_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from latentrt.kernels import _dispatch

    monkeypatch.setattr(_dispatch, "unavailable", lambda device: "there is none")
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda"))
    assert [_dispatch.launches_triton(on_a_gpu) for _ in range(3)] == [False] * 3  # type: ignore[arg-type]
    assert [r.getMessage() for r in caplog.records] == [
        "operators on the GPU run their PyTorch references: there is none"
    ]


def test_the_cpu_says_once_that_references_run(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, which `latentrt -v` shows."""
    caplog.set_level("INFO", logger="latentrt")
    q = torch.randn(1, 5, 2, 16)
    for _ in range(2):
        attention(q, q, q)
        geglu(q)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("latentrt.kernels._dispatch", "INFO", "operators on the cpu run their PyTorch references")
    ]


# What is tuned on a GPU may choose another variant: full sizes count launches, and name only what they choose.


def test_heads_that_cannot_be_described_are_tuned_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 48 columns: what TMA is launched with would make the plain kernel spill."""
    plain = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    copied = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2, "TMA": 1, "SPECIALIZE": 1}
    tuning.save(90, "attention", {"16/d64-long": copied, "16/d64-long-kernel": plain})
    for D, name, row in ((64, "_attention_tma", copied), (48, "_attention", plain)):
        q, k, v = torch.empty(2, 4096, 3, 10, D, dtype=torch.float16, device="meta").unbind(2)
        (launch,) = plan(q, k, v, arch=90)[1]
        assert launch.kernel.name == name
        sizes = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.constants}
        assert {key: sizes[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")} == {
            key: row[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        }


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("D", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("Sk", [77, 4096])
def test_full_size(D: int, Sk: int, dtype: torch.dtype, launches: Counter[str]) -> None:
    device = torch.device("cuda")
    q = torch.randn(2, 4096, 10, D, device=device).to(dtype)
    k, v = torch.randn(2, Sk, 2, 10, D, device=device).to(dtype).unbind(2)
    out = attention(q, k, v)
    rows = slice(0, 4096, 64)  # float64 of them all would need gigabytes
    exact = reference.attention(q[:, rows].double(), k.double(), v.double())
    assert_as_good(out[:, rows], reference.attention(q, k, v)[:, rows], exact)
    assert launches.total() == 1


@pytest.mark.gpu
@by_dtype
def test_the_vae_at_full_size(dtype: torch.dtype, launches: Counter[str]) -> None:
    q, k, v = fused(1, 16384, 1, 512, dtype, torch.device("cuda"))
    out = attention(q, k, v)
    rows = slice(0, 16384, 256)
    exact = reference.attention(q[:, rows].double(), k.double(), v.double())
    assert_as_good(out[:, rows], reference.attention(q[:, rows], k, v), exact)
    assert launches == Counter(step.label for step in plan(q, k, v, arch=arch_of(q.device))[1])


TMA_SIZES = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "TMA": 1}
SPECIALIZED_SIZES = {**TMA_SIZES, "num_warps": 4, "num_stages": 2, "SPECIALIZE": 1}
TMA_WIDE_SIZES = {**TMA_SIZES, "BLOCK_D": 64, "BLOCK_V": 256, "BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("S", "H", "D", "variant"),
    [
        *(
            (S, H, 64, variant)
            for S, H in ((4096, 10), (4000, 10), (1024, 20))
            for variant in (TMA_SIZES, SPECIALIZED_SIZES)
        ),
        (16384, 1, 512, TMA_WIDE_SIZES),
    ],
)
def test_descriptors_at_full_size(
    S: int, H: int, D: int, variant: dict[str, int], dtype: torch.dtype, launches: Counter[str]
) -> None:
    """Beside the plain kernel, which is held against float64 above: as near to float64 as that."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU that copies whole blocks: sm_90 or later")
    q, k, v = fused(1, S, H, D, dtype, torch.device("cuda"))
    table = "attention_wide" if D == 512 else "attention"
    with tuning.trying(table, {**variant, "TMA": 0}):
        plain = attention(q, k, v)
    with tuning.trying(table, variant):
        out = attention(q, k, v)
    assert launches == {f"_{table}": 1, "_attention_tma": 1}
    rows = slice(0, S, S // 64)
    exact = reference.attention(q[:, rows].double(), k.double(), v.double())
    assert_as_good(out[:, rows], plain[:, rows], exact)
