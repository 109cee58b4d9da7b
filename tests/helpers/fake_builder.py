"""A stand-in for the process that builds engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.export.tensorrt import EngineRequest

__all__ = ["FakeBuilder"]


class FakeBuilder:
    """In place of the export and of the process that builds: counts, and writes a few bytes."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.expected: list[float | None] = []

    def __call__(self, request: EngineRequest, *, expected_seconds: float | None) -> Mapping[str, Any]:
        self.requests.append(request)
        self.expected.append(expected_seconds)
        Path(request.plan).write_bytes(b"an engine")
        return {"seconds": 7.0, "engine_bytes": 9}
