"""`bench/random_checkpoint.py`: random weights, drawn on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench.random_checkpoint import write_weights


def test_random_weights_are_drawn_where_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's stand-in: its numbers are the CPU's, and its memory is given back."""
    shapes = {"a.weight": torch.Size([8, 4]), "a.bias": torch.Size([8])}
    write_weights(tmp_path / "cpu", shapes)
    drawn: list[Any] = []
    plain, generator = torch.randn, torch.Generator

    def randn(shape: torch.Size, *, generator: Any, device: torch.device) -> torch.Tensor:
        drawn.append(device)
        return plain(shape, generator=generator)

    monkeypatch.setattr(torch, "Generator", lambda device: drawn.append(device) or generator())
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: drawn.append("given back"))
    cuda = torch.device("cuda")
    write_weights(tmp_path / "cuda", shapes, cuda)
    assert drawn == [cuda, cuda, "given back"]
    assert (tmp_path / "cuda").read_bytes() == (tmp_path / "cpu").read_bytes()
