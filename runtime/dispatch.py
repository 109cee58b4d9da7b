"""Dispatch modes, by which work is followed (`footprint.py`) and recorded (`graph.py`)."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

__all__ = ["expect_modes"]


def expect_modes() -> None:
    """To be called before a mode is entered, once where it is certain that one will be.

    The first that is makes PyTorch import its compiler, which leaves a cycle of all frames that led there: a pipeline
    would be held by its own call until garbage is collected, and a GPU's memory with it.
    """
    if "torch._dynamo" not in sys.modules:
        import_module("torch._dynamo")
        gc.collect()
