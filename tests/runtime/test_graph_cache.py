"""Captured graphs that are kept: how many, and whose."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.fake_stream import FakeStream
from helpers.threads import in_threads
from latentrt.runtime.graph_cache import GraphCache
from latentrt.runtime.streams import current_stream

STREAM = current_stream(torch.device("cpu"))
DONE = STREAM.record_event()


def test_a_taken_graph_is_not_given_out_twice() -> None:
    kept = GraphCache(100)
    kept.put("unet", "a", 1, 10, DONE)
    assert kept.take("vae", "a", STREAM) is None
    assert kept.take("unet", "a", STREAM) == 1
    assert kept.take("unet", "a", STREAM) is None
    assert (len(kept), kept.nbytes) == (0, 0)


def test_the_least_recently_used_graph_is_freed_first(caplog: pytest.LogCaptureFixture) -> None:
    """And it is said once, with the numbers."""
    kept = GraphCache(100_000)
    with caplog.at_level(logging.WARNING, "latentrt"):
        for kind in "abc":
            kept.put("unet", kind, kind, 30_000, DONE)
        kept.put("unet", "a", kept.take("unet", "a", STREAM), 30_000, DONE)  # used again
        assert not caplog.messages
        kept.put("unet", "d", "d", 40_000, DONE)
        kept.put("unet", "e", "e", 40_000, DONE)
    assert [kept.take("unet", kind, STREAM) for kind in "abcde"] == [None, None, None, "d", "e"]
    assert kept.evicted == 3
    (message,) = [text for text in caplog.messages if "captured graphs" in text]
    assert "evicted 30 kB of captured graphs (limit 100 kB, 100 kB stored)" in message
    assert "loop_memory=" in message


def test_what_is_too_large_by_itself_is_not_kept() -> None:
    kept = GraphCache(100)
    kept.put("unet", "b", 2, 50, DONE)
    kept.put("unet", "a", 1, 101, DONE)
    assert kept.take("unet", "a", STREAM) is None
    assert kept.take("unet", "b", STREAM) == 2  # no other went for it
    assert kept.evicted == 1


def test_several_of_a_kind_are_kept_within_the_same_room() -> None:
    kept = GraphCache(100)
    for value in range(4):
        kept.put("unet", "a", value, 30, DONE)
    assert (len(kept), kept.nbytes, kept.evicted) == (3, 90, 1)
    assert [kept.take("unet", "a", STREAM) for _ in range(4)] == [3, 2, 1, None]


def test_a_graph_in_use_is_waited_for_before_it_is_freed() -> None:
    """Over the limit at once, by a smaller limit, with its owner, and with all."""
    kept, stream = GraphCache(100), FakeStream()
    for kind in "abcd":
        kept.put("unet", kind, kind, 40, stream.record_event())
    kept.put("vae", "e", "e", 101, stream.record_event())
    assert (stream.log[-4:], stream.done) == (["record 4", "wait 2", "record 5", "wait 5"], 5)
    kept.put("unet", "f", "f", 20, stream.record_event())
    kept.shrink(60)
    assert stream.log[-1] == "wait 3"
    kept.put("vae", "g", "g", 20, stream.record_event())
    kept.drop("unet")
    assert stream.log[-2:] == ["wait 4", "wait 6"]
    kept.drop()
    assert stream.log[-1] == "wait 7"


def test_what_is_taken_is_used_after_its_last_use() -> None:
    """By another thread it may be used on another stream; the host does not wait for that."""
    kept, stream = GraphCache(100), FakeStream()
    kept.put("unet", "a", 1, 10, stream.record_event())
    kept.put("unet", "a", 2, 10, stream.record_event())
    kept.take("unet", "a", stream)
    assert (stream.log[-1], stream.done) == ("order after 2", 0)


def test_an_owner_s_own_go_with_it() -> None:
    kept = GraphCache(100)
    kept.put("unet", "a", 1, 10, DONE)
    kept.put("unet", "b", 1, 20, DONE)
    kept.put("vae", "a", 2, 40, DONE)
    assert kept.drop("unet") == 30
    assert kept.take("vae", "a", STREAM) == 2
    kept.put("vae", "a", 2, 40, DONE)
    assert kept.drop() == 40


def test_a_finalizer_inside_a_call_leaves_its_owner_s_to_the_next() -> None:
    """A garbage collection in the thread that holds the lock: neither stalled nor lost."""
    kept, stream = GraphCache(100), FakeStream()
    for owner in ("unet", "vae"):
        kept.put(owner, "a", owner, 10, stream.record_event())
    found: list[object] = []
    in_threads([lambda: found.append(kept.take("unet", "a", STREAM, lambda _: kept.forget("vae") is None))])
    assert found == ["unet"]
    assert stream.done == 0
    kept.put("unet", "a", "unet", 10, stream.record_event())
    assert (len(kept), stream.log[-1]) == (1, "wait 2")


def test_a_finalizer_drops_its_owner_s_at_once() -> None:
    kept, stream = GraphCache(100), FakeStream()
    kept.put("vae", "a", 1, 10, stream.record_event())
    kept.put("unet", "a", 2, 10, stream.record_event())
    kept.forget("vae")
    assert (len(kept), stream.log[-1]) == (1, "wait 1")
