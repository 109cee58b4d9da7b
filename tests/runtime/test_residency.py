"""Weights that come and go: who is there when, and that they come back as they were."""

from __future__ import annotations

import threading
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_components as tiny
import torch
from fake_queue import FakeQueue
from latentrt.runtime import residency
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.graph_cache import GraphCache
from latentrt.runtime.memory import POLICIES, Policy, check_policy, stays
from latentrt.runtime.residency import Residency, Weights
from torch import Tensor, nn

CPU = torch.device("cpu")
REQUEST = ("text_encoder", "text_encoder_2", "unet", "refiner", "vae_decoder")


class Resident:
    """An engine that only says when it leaves."""

    def __init__(self, name: str, there: Residency, gone: list[str]) -> None:
        self.component: Any = SimpleNamespace(name="unet" if name == "refiner" else name)
        self.device, self.present, self.held_bytes, self.graph_cache = CPU, True, 0, GraphCache()
        self.looping = False
        self.residency = there
        self._name, self._gone = name, gone

    def offload(self) -> None:
        self._gone.append(self._name)
        self.residency.left(self)


def walk(policy: Policy, requests: int = 2) -> tuple[list[set[str]], list[str]]:
    """What is there as each network runs, and who left, in turn."""
    there, gone = [], list[str]()
    held = Residency(policy)
    engines = {name: Resident(name, held, gone) for name in REQUEST}
    for name in REQUEST * requests:
        held.enter(engines[name])
        held.enter(engines[name])  # is there already
        there.append({n for n, engine in engines.items() if engine in held.present})
    return there, gone


def test_balanced_has_encoders_for_the_text_only() -> None:
    there, gone = walk("balanced")
    assert gone == ["text_encoder", "text_encoder_2"] * 2
    assert there[4] == {"unet", "refiner", "vae_decoder"}
    assert there[6] == set(REQUEST)  # the second request's text


def test_low_has_one_at_a_time() -> None:
    there, gone = walk("low")
    assert there == [{name} for name in REQUEST * 2]
    assert gone == list(REQUEST * 2)[:-1]


def test_resident_stays() -> None:
    kinds = ("text", "denoise", "pixels")
    assert all(stays("resident", one, other) for one in kinds for other in kinds)
    assert POLICIES == ("resident", "balanced", "low")
    with pytest.raises(ValueError, match="no memory policy 'all'"):
        check_policy("all")


def module() -> tuple[nn.Module, list[Tensor]]:
    """Channels last, a packed weight with views of it, one that views a part, an odd size, a buffer, two dtypes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7))
    net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    packed = torch.randn(9, 80)
    net[3].weight.data = packed[2:]
    return net, [*net.parameters(), *net.buffers(), packed[1:]]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of the pieces that exist."""
    pieces: dict[int, int] = {}
    make = residency._room

    def room(nbytes: int, device: torch.device) -> Tensor:
        piece = make(nbytes, device)
        storage = piece.untyped_storage()
        key = storage._cdata
        pieces[key] = nbytes
        weakref.finalize(storage, pieces.pop, key)
        return piece

    monkeypatch.setattr(residency, "_room", room)
    return pieces


@pytest.mark.parametrize("staging", [2, 14, 1 << 12])
def test_weights_come_and_go_as_they_were(staging: int) -> None:
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    before = [(t.clone(), t.stride()) for t in tensors]
    weights = Weights(tensors, CPU, staging)
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


def test_a_copy_at_home_stays_and_the_other_is_freed(live: dict[int, int]) -> None:
    _, tensors = module()
    weights = Weights(tensors, CPU, 64)
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


def test_what_came_first_as_one_piece_is_let_go_when_it_leaves(live: dict[int, int]) -> None:
    """As on a GPU: there the host has no copy until the first time that they leave."""
    _, tensors = module()
    weights = Weights(tensors, CPU, 64)
    weights.onload()
    (there,) = [t.untyped_storage().data_ptr() for t in tensors[:1]]
    assert len(live) == 1
    weights.offload()
    assert len(live) == 1
    assert tensors[0].untyped_storage().data_ptr() != there
    assert weights._home is not None


def test_it_is_gone_when_memory_is_given_back(live: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only soon after: the allocator would keep a piece that is freed later, and put small tensors into it."""
    _, tensors = module()
    weights = Weights(tensors, CPU, 64)
    weights.onload()
    nbytes = sum(live.values())
    given_back = []
    monkeypatch.setattr(residency, "_give_back", lambda device: given_back.append(dict(live)))
    for _ in range(2):
        weights.offload()
        assert [sum(there.values()) for there in given_back] == [nbytes]  # what is at home
        weights.onload()
        given_back.clear()


def test_only_what_is_used_of_a_larger_memory_is_moved(live: dict[int, int]) -> None:
    """A checkpoint's tensors may be views of a fused one, of which the rest is another's."""
    fused = torch.randn(3, 100, 100)
    weights = Weights([fused[1]], CPU, 64)
    weights.onload()
    assert list(live.values()) == [100 * 100 * 4]


@pytest.mark.parametrize("staging", [14, 1 << 12])
def test_weights_are_on_the_device_when_onload_returns(staging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever stream uses them next: none is ordered after the one that they were copied on."""
    queue, empty = FakeQueue(), torch.empty

    def unpinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*sizes, **options)

    _, tensors = module()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unpinned)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=queue.record))
        patch.setattr(residency, "_room", lambda nbytes, _: empty(nbytes, dtype=torch.uint8))
        patch.setattr(residency, "_give_back", lambda device: None)
        weights = Weights(tensors, torch.device("cuda"), staging)
        assert 0 < queue.places == queue.done
        weights.offload()
        queue.record()
        weights.onload()
        assert queue.places == queue.done


class Broken(BaseException):
    """As KeyboardInterrupt."""


def breaking(*_: Any) -> None:
    raise Broken


@pytest.mark.parametrize("where", ["__init__", "copy"])
def test_an_onload_that_is_broken_off_leaves_nothing_there(
    where: str, live: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where host memory is pinned, or as bytes are on their way."""
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    weights = Weights(tensors, CPU, 64)
    weights.offload()
    (home,) = live.values()
    with monkeypatch.context() as patch:
        patch.setattr(residency.Staging, where, breaking)
        with pytest.raises(Broken):
            weights.onload()
    assert list(live.values()) == [home]
    weights.onload()
    assert list(live.values()) == [home, home]
    assert torch.equal(net(x), expected)


def test_an_onload_whose_end_nobody_heard_of_is_not_there_twice(
    live: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensors = module()
    weights = Weights(tensors, CPU, 64)
    weights.offload()
    weights.onload()
    most: list[int] = []
    room = residency._room
    monkeypatch.setattr(residency, "_room", lambda *a: (most.append(len(live)), room(*a))[1])
    weights.onload()
    assert most == [1]  # the copy at home
    assert len(live) == 2


def test_what_left_half_way_comes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tensors = module()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    weights = Weights(tensors, CPU, 64)
    with monkeypatch.context() as patch:
        nan = partial(torch.full, fill_value=255, dtype=torch.uint8)
        patch.setattr(residency, "_room", lambda nbytes, _: nan((nbytes,)))
        patch.setattr(Tensor, "copy_", breaking)
        with pytest.raises(Broken):
            weights.offload()
    weights.onload()
    assert torch.equal(net(x), expected)


def test_a_caller_s_inference_mode_does_not_mark_the_weights() -> None:
    _, tensors = module()
    weights = Weights(tensors, CPU, 64)
    with torch.inference_mode():
        weights.offload()
        weights.onload()
    assert not any(t.is_inference() for t in tensors)


def test_on_the_host_weights_keep_where_they_begin_in_a_cache_line() -> None:
    """A mapped file's lie anywhere; some processors round matrix products by that."""
    tensors = [torch.zeros(120, dtype=torch.uint8)[start:] for start in (0, 8, 40, 0)]
    before = [x.data_ptr() % 64 for x in tensors]
    assert before == [0, 8, 40, 0]
    weights = Weights(tensors, CPU)
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
    weights = Weights(tensors, CPU)
    for _ in range(2):
        weights.offload()
        weights.onload()
        assert all(x.equal(y) for x, y in zip(tensors, wanted, strict=True))


def test_a_call_of_what_may_leave_has_the_turn_of_what_is_recorded() -> None:
    """On a GPU a loop that another thread replays computes in the same memory."""
    loader = EngineLoader("eager", CPU, torch.float32, None, graphs=True, memory="low")
    lazy = loader.engine(tiny.affine())
    engine, graphs, taken = lazy.load(), lazy.graphs, list[str]()
    assert graphs is not None

    def elsewhere() -> None:
        with graphs.exclusive():
            taken.append("elsewhere")

    class Watched:
        def __call__(self, inputs: Any) -> Any:
            other.start()
            other.join(0.2)
            taken.append("here")
            return engine(inputs)

    other = threading.Thread(target=elsewhere)
    lazy._engine = Watched()  # type: ignore[assignment]
    lazy({"x": torch.zeros(2, 4)})
    other.join()
    assert taken == ["here", "elsewhere"]
