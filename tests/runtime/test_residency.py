"""Which engines' weights are on the device when."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.threads import in_threads
from latentrt.runtime import offload
from latentrt.runtime.engines import eager, lazy
from latentrt.runtime.engines.base import Engine
from latentrt.runtime.engines.lazy import EngineLoader, LazyEngine
from latentrt.runtime.graph_cache import GraphCache
from latentrt.runtime.memory import POLICIES, Policy, check_policy, stays
from latentrt.runtime.residency import Residency

CPU = torch.device("cpu")
REQUEST = ("text_encoder", "text_encoder_2", "unet", "refiner", "vae_decoder")


class FakeEngine:
    """An engine that only says when it leaves."""

    def __init__(self, name: str, there: Residency, gone: list[str]) -> None:
        self.component: Any = SimpleNamespace(name="unet" if name == "refiner" else name)
        self.device, self.present, self.held_bytes, self.graph_cache = CPU, True, 0, GraphCache()
        self.looping = False
        self.residency = there
        self._name, self._gone = name, gone

    def offload(self) -> None:
        self._gone.append(self._name)
        self.residency.forget(self)


def walk(policy: Policy, requests: int = 2) -> tuple[list[set[str]], list[str]]:
    """What is there as each network runs, and who left, in turn."""
    there, gone = [], list[str]()
    held = Residency(policy)
    engines: dict[str, Any] = {name: FakeEngine(name, held, gone) for name in REQUEST}
    for name in REQUEST * requests:
        held.enter(engines[name])
        held.enter(engines[name])  # is there already
        there.append({n for n, engine in engines.items() if engine in held.loaded})
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
    assert walk("resident")[1] == []
    assert POLICIES == ("resident", "balanced", "low")
    with pytest.raises(ValueError, match="no memory policy 'all'"):
        check_policy("all")


def test_a_call_of_what_may_be_offloaded_excludes_replays() -> None:
    """On a GPU a loop that another thread replays computes in the same memory."""
    loader = EngineLoader("eager", CPU, torch.float32, None, graphs=True, policy="low")
    lazy = loader.engine(tiny.affine())
    engine, graphs, taken = lazy.load(), lazy.graphs, list[str]()
    assert graphs is not None

    at_lock = threading.Event()

    def elsewhere() -> None:
        at_lock.set()
        with graphs.exclusive():
            taken.append("elsewhere")

    class Watched:
        def __call__(self, inputs: Any) -> Any:
            other.start()
            assert at_lock.wait(60)
            other.join(0.2)
            taken.append("here")
            return engine(inputs)

    other = threading.Thread(target=elsewhere)
    lazy._engine = Watched()  # type: ignore[assignment]
    lazy({"x": torch.zeros(2, 4)})
    other.join()
    assert taken == ["here", "elsewhere"]


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Run `work` until it comes to so many lines of what moves weights; whether it came so far."""
    lines = itertools.count()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_globals["__name__"] not in (offload.__name__, lazy.__name__, eager.__name__):
            return None
        # Not where a `with` is left again, from which Python lets no signal keep the lock.
        forward = frame.f_lineno > last.get(frame, 0)
        last[frame] = frame.f_lineno
        if event == "line" and forward and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("move", ["offload", "load"])
@pytest.mark.parametrize("moved", [0, 1], ids=["the first time", "later"])
def test_a_move_of_weights_may_be_interrupted_anywhere(move: str, moved: int) -> None:
    """Then they are on the device for the next call, in one block, and what a plan counts is what is there."""
    for line in itertools.count():
        loaded = EngineLoader("eager", CPU, torch.float32, None, graphs=False, policy="balanced").engine(
            tiny.affine()
        )
        loaded.load()._weights.onload()  # type: ignore[attr-defined]  # as on a GPU
        engine: Any = loaded.load()
        weights, tensors = engine._weights, engine._weights._tensors
        wanted = [x.clone() for x in tensors]
        for _ in range(moved):
            loaded.offload()
            loaded.load()
        if move == "load":
            loaded.offload()
        came = interrupted(getattr(loaded, move), line)
        assert loaded.present == (weights._device_copy is not None)
        assert loaded.load() is engine
        (block,) = {x.untyped_storage().data_ptr() for x in tensors}
        assert block == weights._device_copy.untyped_storage().data_ptr()
        assert all(x.equal(y) for x, y in zip(tensors, wanted, strict=True))
        loaded.offload()
        assert not loaded.present
        assert weights._device_copy is None
        if not came:
            break
    assert line > 10


@pytest.mark.parametrize("call", [LazyEngine.__call__, LazyEngine.capture])
def test_an_engine_that_moves_before_a_borrower_s_turn_is_loaded_again(
    call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the pipeline that lends it moves to another device."""
    loader = EngineLoader("eager", CPU, torch.float32, None, graphs=True)
    lent = loader.engine(tiny.affine())
    before, load, loaded = lent.load(), LazyEngine.load, threading.Event()

    def seen(self: LazyEngine) -> Engine:
        engine = load(self)
        loaded.set()
        return engine

    monkeypatch.setattr(LazyEngine, "load", seen)
    with ThreadPoolExecutor(1) as pool, loader.exclusive():
        called = pool.submit(call, lent, {"x": torch.zeros(2, 4)})
        assert loaded.wait(60)
        loader.move(CPU)
    called.result()
    (kept,) = loader.graph_cache._items
    assert kept.value.engine is lent.load()
    assert kept.value.engine is not before


def test_a_move_is_seen_only_once_what_runs_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever saw the new device earlier would run the engine of the old one there. The wait may be interrupted: then
    nothing has moved."""
    loader = EngineLoader("eager", CPU, torch.float32, None, graphs=True)
    lent = loader.engine(tiny.affine())
    before, graphs = lent.load(), loader.graphs
    seen: list[object] = []

    def wait(device: torch.device, waited: object) -> None:
        seen.append((device, waited, loader.device, loader.graphs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lazy, "_wait", wait)
        with pytest.raises(KeyboardInterrupt):
            loader.move(torch.device("cpu", 0))
    assert seen == [(CPU, graphs, CPU, graphs)]
    assert (loader.device, loader.graphs, lent.load()) == (CPU, graphs, before)


@pytest.mark.parametrize(("device", "at_once"), [("cuda:0", 1), ("cpu", 2)])
def test_without_graphs_a_gpu_runs_one_call_at_a_time(device: str, at_once: int) -> None:
    """Of two at once the activations would add up, and a plan counts one; on the host nothing bounds them."""
    running, most = [0], [0]
    met = threading.Barrier(2)

    class Engine:
        def __call__(self, inputs: Any) -> dict[str, torch.Tensor]:
            running[0] += 1
            most[0] = max(most[0], running[0])
            with suppress(threading.BrokenBarrierError):
                met.wait(0.5)  # for the other thread to come as well, if it can
            running[0] -= 1
            return {}

    loader = EngineLoader("eager", CPU, torch.float32, None, graphs=False)
    loader.device = torch.device(device)
    loader.backend = SimpleNamespace(load=lambda component, **_: Engine())  # type: ignore[assignment]
    engine = loader.engine(tiny.text_encoder())
    in_threads([lambda: engine({})] * 2)
    assert most == [at_once]
    with engine.exclusive(), engine.exclusive():  # as a callback of a loop that decodes
        pass
