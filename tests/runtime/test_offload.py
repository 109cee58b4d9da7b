"""Weights that move between host and device, and come back as they were."""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_stream import FakeStream
from latentrt.runtime import offload
from latentrt.runtime.offload import OffloadableWeights
from torch import Tensor, nn

CPU = torch.device("cpu")


def module() -> tuple[nn.Module, list[Tensor]]:
    """Channels last, a packed weight with views of it, one that views a part, an odd size, a buffer, two dtypes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7))
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    packed = torch.randn(9, 80)
    net[3].weight.data = packed[2:]
    return net, [*net.parameters(), *net.buffers(), packed[1:]]


@pytest.fixture(autouse=True)
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that also these weights are copied part by part."""
    monkeypatch.setattr(offload, "STAGING", 64)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of the blocks that exist."""
    blocks: dict[int, int] = {}
    make = offload._allocate

    def allocate(nbytes: int, device: torch.device) -> Tensor:
        block = make(nbytes, device)
        storage = block.untyped_storage()
        key = storage._cdata
        blocks[key] = nbytes
        weakref.finalize(storage, blocks.pop, key)
        return block

    monkeypatch.setattr(offload, "_allocate", allocate)
    return blocks


@pytest.mark.parametrize("staging", [2, 14, 1 << 12])
def test_weights_come_and_go_as_they_were(staging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "STAGING", staging)
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    before = [(t.clone(), t.stride()) for t in tensors]
    weights = OffloadableWeights(tensors, CPU)
    addresses = {t.data_ptr() for t in tensors}
    for move in (weights.offload, weights.onload, weights.offload, weights.onload):
        move()
        for tensor, (value, stride) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor.stride() == stride
            assert tensor.data_ptr() not in addresses
        assert net[3].weight.data_ptr() == tensors[-1].data_ptr() + 80 * 4  # still a view of the packed one
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
        addresses = {t.data_ptr() for t in tensors}
        assert torch.equal(net(x), expected)


def test_the_host_s_copy_stays_and_the_device_s_is_freed(live: dict[int, int]) -> None:
    _, tensors = module()
    weights = OffloadableWeights(tensors, CPU)
    assert not live  # they lie where they were read to
    weights.offload()
    (nbytes,) = live.values()
    home = tensors[0].untyped_storage().data_ptr()
    for _ in range(2):
        weights.onload()
        assert list(live.values()) == [nbytes, nbytes]
        weights.offload()
        assert list(live.values()) == [nbytes]
        assert tensors[0].untyped_storage().data_ptr() == home


def test_the_first_block_on_the_device_is_freed_when_it_is_offloaded(live: dict[int, int]) -> None:
    """As on a GPU: there the host has no copy until the first time that they leave."""
    _, tensors = module()
    weights = OffloadableWeights(tensors, CPU)
    weights.onload()
    (there,) = [t.untyped_storage().data_ptr() for t in tensors[:1]]
    assert len(live) == 1
    weights.offload()
    assert len(live) == 1
    assert tensors[0].untyped_storage().data_ptr() != there
    assert weights._host_copy is not None


def test_the_block_is_freed_before_the_allocator_s_cache_is_emptied(
    live: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only soon after: the allocator would keep a block that is freed later, and put small tensors into it."""
    _, tensors = module()
    weights = OffloadableWeights(tensors, CPU)
    weights.onload()
    nbytes = sum(live.values())
    given_back = []
    monkeypatch.setattr(offload, "_empty_cache", lambda device: given_back.append(dict(live)))
    for _ in range(2):
        weights.offload()
        assert [sum(there.values()) for there in given_back] == [nbytes]  # the host's
        weights.onload()
        given_back.clear()


def test_only_what_is_used_of_a_larger_storage_is_moved(live: dict[int, int]) -> None:
    """A checkpoint's tensors may be views of a fused one, of which the rest is another's."""
    fused = torch.randn(3, 100, 100)
    weights = OffloadableWeights([fused[1]], CPU)
    weights.onload()
    assert list(live.values()) == [100 * 100 * 4]


@pytest.mark.parametrize("staging", [14, 1 << 12])
def test_weights_are_on_the_device_when_onload_returns(staging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever stream uses them next: none is ordered after the one that they were copied on."""
    stream, empty = FakeStream(), torch.empty

    def unpinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*sizes, **options)

    _, tensors = module()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unpinned)
        patch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=stream.record_event)
        )
        patch.setattr(offload, "_allocate", lambda nbytes, _: empty(nbytes, dtype=torch.uint8))
        patch.setattr(offload, "_empty_cache", lambda device: None)
        patch.setattr(offload, "STAGING", staging)
        weights = OffloadableWeights(tensors, torch.device("cuda"))
        assert 0 < stream.places == stream.done
        weights.offload()
        stream.record_event()
        weights.onload()
        assert stream.places == stream.done


class Broken(BaseException):
    """As KeyboardInterrupt."""


def breaking(*_: Any) -> None:
    raise Broken


@pytest.mark.parametrize("where", ["__init__", "copy"])
def test_an_interrupted_onload_leaves_nothing_on_the_device(
    where: str, live: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where host memory is pinned, or as bytes are on their way."""
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    weights = OffloadableWeights(tensors, CPU)
    weights.offload()
    (home,) = live.values()
    with monkeypatch.context() as patch:
        patch.setattr(offload.Staging, where, breaking)
        with pytest.raises(Broken):
            weights.onload()
    assert list(live.values()) == [home]
    weights.onload()
    assert list(live.values()) == [home, home]
    assert torch.equal(net(x), expected)


def test_weights_that_are_there_are_not_copied_again(
    live: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a move was interrupted before its caller knew of its end."""
    _, tensors = module()
    weights = OffloadableWeights(tensors, CPU)
    weights.offload()
    assert weights.offloaded
    weights.onload()
    assert not weights.offloaded
    monkeypatch.setattr(offload, "_allocate", breaking)
    weights.onload()
    assert len(live) == 2  # the host's too


def test_an_interrupted_offload_leaves_the_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    weights = OffloadableWeights(tensors, CPU)
    with monkeypatch.context() as patch:
        nan = partial(torch.full, fill_value=255, dtype=torch.uint8)
        patch.setattr(offload, "_allocate", lambda nbytes, _: nan((nbytes,)))
        patch.setattr(Tensor, "copy_", breaking)
        with pytest.raises(Broken):
            weights.offload()
    weights.onload()
    assert torch.equal(net(x), expected)


def test_a_caller_s_inference_mode_does_not_mark_the_weights() -> None:
    _, tensors = module()
    weights = OffloadableWeights(tensors, CPU)
    with torch.inference_mode():
        weights.offload()
        weights.onload()
    assert not any(t.is_inference() for t in tensors)


def test_on_the_host_weights_keep_where_they_begin_in_a_cache_line() -> None:
    """A mapped file's lie anywhere; some processors round matrix products by that."""
    tensors = [torch.zeros(120, dtype=torch.uint8)[start:] for start in (0, 8, 40, 0)]
    before = [x.data_ptr() % 64 for x in tensors]
    assert before == [0, 8, 40, 0]
    weights = OffloadableWeights(tensors, CPU)
    for _ in range(2):
        weights.offload()
        weights.onload()
        assert [x.data_ptr() % 64 for x in tensors] == before


def test_what_lies_across_its_items_comes_back_as_it_was() -> None:
    """Nothing keeps a file's numbers from beginning at odd addresses."""
    stored = np.zeros(200, np.uint8)
    base = -stored.ctypes.data % 64
    tensors = []
    for start in (base + 9, base + 50):
        part = np.frombuffer(stored.data, np.float32, 8, start)
        part[:] = np.arange(8) + start
        tensors.append(torch.from_numpy(part))
    assert tensors[0].data_ptr() % 4 == 1
    wanted = [x.clone() for x in tensors]
    weights = OffloadableWeights(tensors, CPU)
    for _ in range(2):
        weights.offload()
        weights.onload()
        assert all(x.equal(y) for x, y in zip(tensors, wanted, strict=True))
