"""Pipelines over the tiny checkpoints, loaded once and shared by the tests of whole pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from parity import Rig


@pytest.fixture(scope="session")
def rig(tiny: Callable[..., Path], exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Both sides' pipelines."""
    from parity import Rig, save_lcm

    def folder(kind: str) -> Path:
        if kind != "lcm":
            return tiny(kind)
        path = tmp_path_factory.getbasetemp() / "lcm"
        return path if path.exists() else save_lcm(path, tiny("sdxl"))

    return Rig(folder, exports)
