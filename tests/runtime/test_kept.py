"""Recorded work that is kept: how much of it, and whose."""

from __future__ import annotations

import logging

import pytest
from latentrt.runtime.kept import Kept


def test_what_is_taken_is_nobody_else_s() -> None:
    kept = Kept(100)
    kept.put("unet", "a", 1, 10)
    assert kept.take("vae", "a") is None
    assert kept.take("unet", "a") == 1
    assert kept.take("unet", "a") is None
    assert (len(kept), kept.nbytes) == (0, 0)


def test_what_was_not_used_for_longest_goes_first(caplog: pytest.LogCaptureFixture) -> None:
    """And it is said once, with the numbers."""
    kept = Kept(100_000)
    with caplog.at_level(logging.WARNING, "latentrt"):
        for kind in "abc":
            kept.put("unet", kind, kind, 30_000)
        kept.put("unet", "a", kept.take("unet", "a"), 30_000)  # used again
        assert not caplog.messages
        kept.put("unet", "d", "d", 40_000)
        kept.put("unet", "e", "e", 40_000)
    assert [kept.take("unet", kind) for kind in "abcde"] == [None, None, None, "d", "e"]
    assert kept.evicted == 3
    (message,) = [text for text in caplog.messages if "recorded work" in text]
    assert "recorded work of 30 kB was let go, there is room for 100 kB of it (100 kB are kept)" in message
    assert "loop_memory=" in message


def test_what_is_too_large_by_itself_is_not_kept() -> None:
    kept = Kept(100)
    kept.put("unet", "a", 1, 101)
    assert kept.nbytes == 0


def test_an_owner_s_own_go_with_it() -> None:
    kept = Kept(100)
    kept.put("unet", "a", 1, 10)
    kept.put("unet", "b", 1, 20)
    kept.put("vae", "a", 2, 40)
    assert kept.drop("unet") == 30
    assert kept.take("vae", "a") == 2
    kept.put("vae", "a", 2, 40)
    assert kept.drop() == 40
