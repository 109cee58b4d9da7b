"""Weights that come and go: who is there when, and that they come back as they were."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from latentrt.errors import RequestError
from latentrt.runtime.footprint import Footprint, Tracker
from latentrt.runtime.memory import Network, Plan, Stage
from latentrt.runtime.residency import Residency, Staging, allowed
from torch import Tensor, nn

CPU = torch.device("cpu")
NETWORK = Network("float32", 1, Footprint(0, 0, 0, 0, 0, 0, 0, 0))
PLAN = Plan(
    "",
    dict.fromkeys(("te1", "te2", "unet", "refiner unet", "vae_decoder"), NETWORK),
    (
        Stage("text", "text", {"te1": 1, "te2": 3}),
        Stage("base", "denoise", {"unet": 24}),
        Stage("refiner", "denoise", {"refiner unet": 6}),
        Stage("decode", "pixels", {"vae_decoder": 1}),
    ),
    {},
)
REQUEST = [(stage.name, name) for stage in PLAN.stages for name in stage.calls]


def walk(policy: str, requests: int = 2) -> tuple[list[set[str]], list[str]]:
    """What is there as each network runs, and who left, in turn."""
    there, gone = [], []
    weights = {name: [torch.randn(3, 4)] for name in PLAN.networks}
    residency = Residency(weights, partial(allowed, PLAN, policy), Staging(CPU, 64), gone.append)
    for stage, name in REQUEST * requests:
        residency.use(stage, name)
        assert name in residency.present <= allowed(PLAN, policy, stage, name)
        there.append(set(residency.present))
    return there, gone


def test_resident_stays() -> None:
    there, gone = walk("resident")
    assert there[-1] == set(PLAN.networks)
    assert gone == []


def test_balanced_has_encoders_for_the_text_only() -> None:
    there, gone = walk("balanced")
    assert gone == ["te1", "te2"] * 2
    assert there[4] == {"unet", "refiner unet", "vae_decoder"}
    assert there[6] == set(PLAN.networks)  # the second request's text


def test_low_has_one_at_a_time() -> None:
    there, gone = walk("low")
    assert there == [{name} for _, name in REQUEST * 2]
    assert gone == [name for _, name in REQUEST * 2][:-1]


def test_an_unknown_policy() -> None:
    with pytest.raises(RequestError, match="no memory policy 'all'"):
        allowed(PLAN, "all", "text", "te1")


def module() -> tuple[nn.Module, list[Tensor]]:
    """Channels last, a packed weight with views of it, an odd size and a buffer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7))
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    packed = torch.randn(7, 80)
    net[3].weight.data = packed[:7]
    return net, [*net.parameters(), *net.buffers(), packed]


@pytest.mark.parametrize("nbytes", [2, 14, 1 << 12])
def test_weights_come_and_go_as_they_were(nbytes: int) -> None:
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    before = [(t.clone(), t.stride(), t.data_ptr()) for t in tensors]
    residency = Residency(
        {"net": tensors}, lambda *_: frozenset({"net"}), Staging(CPU, nbytes), lambda _: None
    )
    for _ in range(2):
        residency.use("s", "net")
        residency.use("s", "net")  # is there already
        for tensor, (value, stride, address) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor.stride() == stride
            assert tensor.data_ptr() != address
        assert net[3].weight.data_ptr() == tensors[-1].data_ptr()  # still a view of the packed one
        assert torch.equal(net(x), expected)
        residency.close()
        assert [t.data_ptr() for t in tensors] == [address for *_, address in before]
        assert torch.equal(net(x), expected)


def test_what_left_is_freed_before_the_next_comes() -> None:
    """The peak on the device is one network, not two."""
    weights = {name: [torch.zeros(1000)] for name in ("a", "b")}
    residency = Residency(weights, lambda _, name: frozenset({name}), Staging(CPU, 64), lambda _: None)
    with Tracker() as tracker:
        for name in ("a", "b", "a"):
            residency.use("s", name)
    assert tracker.live == 4000
    assert tracker.peak == 4000
