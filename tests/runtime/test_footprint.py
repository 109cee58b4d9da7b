"""One forward, followed: work and live memory against what can be worked out by hand, and against real runs."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_checkpoints import UNETS
from latentrt import kernels
from latentrt.kernels.registry import Case, OpSpec, specs
from latentrt.runtime.footprint import Tracker, measure
from latentrt.runtime.models.unet import UNet, UNetConfig
from torch import Tensor, nn

META = torch.device("meta")
ARCH = 90


class Skip(nn.Module):
    """[N, 8] -> [N, 4] with a skip, a view, an operation in place and a cat."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(8, 64)
        self.narrow = nn.Linear(64, 8, bias=False)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.widen(x)  # 64 live
        h = h.sigmoid()  # 128, then 64
        h = self.narrow(h.view(-1, 64))  # 72, then 8
        h.mul_(2)  # 8
        h = torch.cat([x, h], dim=1)  # 24, then 16
        return self.last(h)  # 20


def test_a_small_network_by_hand() -> None:
    N = 32
    with META:
        module = Skip()
        found = measure(module, [torch.empty(N, 8)], ARCH)
    assert found.activation_bytes == 4 * N * 128
    assert found.pool_bytes == 2 << 20  # a segment, which small tensors share
    assert found.scratch_bytes == 0
    assert found.flops == 2 * N * (8 * 64 + 64 * 8 + 16 * 4)
    assert found.parameters == 8 * 64 + 64 + 64 * 8 + 16 * 4 + 4
    assert found.weight_bytes == 4 * found.parameters
    assert (found.input_bytes, found.output_bytes) == (4 * N * 8, 4 * N * 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_by_hand(memory_format: torch.memory_format) -> None:
    with META:
        module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 3, stride=2))
        module = module.half().to(memory_format=memory_format)
        x = torch.empty(2, 3, 9, 9, dtype=torch.float16).contiguous(memory_format=memory_format)
    found = measure(module, [x], ARCH)
    assert found.activation_bytes == 2 * 2 * 16 * 9 * 9 * 2
    assert found.flops == 2 * 2 * (16 * 3 * 9 * 81 + 8 * 16 * 9 * 16)


def test_what_was_there_before_is_not_counted() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x.flatten()[self.weight.view(10, 100).shape[0] :]

    with META:
        found = measure(Views(), [torch.empty(50, 50)], ARCH)
    assert found.activation_bytes == 0


def test_a_storage_counts_until_its_last_view_is_gone() -> None:
    with Tracker() as tracker:
        base = torch.zeros(1000)
        view = base[10:20]
        del base
        assert (tracker.live, tracker.peak) == (4000, 4000)
        del view
        assert (tracker.live, tracker.peak) == (0, 4000)
        kept = torch.zeros(500)
    assert (tracker.live, tracker.peak) == (kept.nbytes, 4000)


def allocated_peak(module: nn.Module, x: Tensor) -> int:
    """The most that PyTorch's allocator had handed out during a forward, by its own events."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(x)
    total = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def test_the_peak_is_the_allocators() -> None:
    module, x = Skip(), torch.randn(32, 8)
    with META:
        planned = measure(Skip(), [torch.empty(32, 8)], ARCH)
    assert allocated_peak(module, x) == planned.activation_bytes


@pytest.mark.parametrize(("kind", "channels_last"), [("sdxl", True), ("sd15", False)])
def test_a_unet_on_meta_is_live_as_on_the_cpu(kind: str, channels_last: bool) -> None:
    """Kernels take the place of operators that give the same tensors, whatever they need on the way."""
    config = UNetConfig.from_dict(UNETS[kind])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(2, 4, 18, 10), (2,), (2, 77, config.cross_attention_dim)]
    if kind == "sdxl":
        shapes += [(2, 40), (2, 6)]

    def inputs(device: torch.device) -> list[Tensor]:
        tensors = [torch.ones(shape, device=device) for shape in shapes]
        return [tensors[0].contiguous(memory_format=memory_format), *tensors[1:]]

    def unet(device: torch.device) -> UNet:
        with device:
            return UNet(config).to(memory_format=memory_format)

    planned = measure(unet(META), inputs(META), ARCH)
    real, given = unet(torch.device("cpu")), inputs(torch.device("cpu"))
    with torch.no_grad(), kernels.as_nodes(), Tracker() as tracker:
        real(*given)
    assert tracker.peak == planned.activation_bytes
    assert tracker.flops == planned.flops
    assert tracker.live == 0


@pytest.mark.parametrize(
    ("spec", "case"), [(s, c) for s in specs() for c in s.cases], ids=lambda x: getattr(x, "name", None)
)
def test_operators_count_in_full(spec: OpSpec, case: Case) -> None:
    inputs = case.inputs(torch.float16, META)
    with kernels.as_nodes(), Tracker(ARCH) as tracker:
        out = spec.op(*inputs)
    results = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not inputs[0]]
    assert tracker.flops == case.flops
    assert tracker.peak == sum(t.nbytes for t in results)


@pytest.mark.usefixtures("untuned")
def test_the_workspace_of_a_kernel_is_counted() -> None:
    """GroupNorm keeps partial sums; a tensor that is not dense is copied first."""
    with META:
        x, weight, bias = torch.empty(2, 64, 32, 32), torch.empty(64), torch.empty(64)
    spec = next(s for s in specs() if s.name == "group_norm")
    launches = spec.plan(x, weight, bias, 32, 1e-5, arch=ARCH)[1]
    sums = launches[0].args["stats_ptr"].nbytes
    with kernels.as_nodes(), Tracker(ARCH) as tracker:
        spec.op(x, weight, bias, 32, 1e-5)
    assert tracker.scratch == sums > 0
    assert tracker.peak == x.nbytes
    assert [nbytes for _, nbytes in tracker.events if nbytes] == [x.nbytes, sums]

    with kernels.as_nodes(), Tracker(ARCH) as tracker:  # scores and exponentials of as many queries as may be
        q = torch.empty(1, 16384, 1, 512, dtype=torch.float16, device=META)
        kernels.attention(q, q, q)
    assert tracker.scratch == 4096 * (16384 * 6 + 4 + 512 * 4)

    with kernels.as_nodes(), Tracker(ARCH) as tracker:
        kernels.geglu(torch.empty(16, 128, device=META)[:, ::2])
    assert tracker.scratch == 4 * math.prod((16, 64))
