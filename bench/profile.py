"""Profiles one picture on a CPU: the time by kind of operator, and the rest between operators.

PyTorch's operators are timed by its profiler, ONNX Runtime's by its own. Profilers take time themselves, so the total
is longer than without them, and the time between operators is an upper bound.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BenchmarkError

__all__ = ["BETWEEN", "KINDS", "Profile", "Sessions", "kind_of", "profile_call", "profile_sessions"]

BETWEEN = "between operators"
KINDS = {
    "convolutions": r"conv",
    "attention": r"attention|softmax",
    "matrix products": r"matmul|gemm|addmm|bmm|::mm$|linear",
    "norms": r"norm",
    "element by element": r"add|mul|div|sub|neg|exp(?!and)|log|sqrt|pow|sin|cos|erf|tanh|gelu|silu|sigmoid|clamp|clip"
    r"|where|sum|mean",
    "moving": r"copy|cat|transpose|reshape|reorder|slice|split|gather|resize|upsample|expand|pad|index|shape|cast|fill"
    r"|clone|permute|view|squeeze|empty|resolve|::to$|as_strided|select|flip|repeat|narrow|chunk|tile|range|contiguous",
}
"""Kind -> a pattern for the names of PyTorch's and ONNX's operators; the first match counts."""
_OTHER = "other operators"


@dataclass(frozen=True)
class Profile:
    """The profile of one picture.

    Attributes:
        seconds: in all, with the profilers running.
        parts: kind of operator -> seconds. `BETWEEN` is the rest: Python, and what a session does outside of its
            operators.
        operators: how many were called.
    """

    seconds: float
    parts: dict[str, float]
    operators: int


def kind_of(operator: str) -> str:
    """The kind of an operator such as `aten::addmm` or `FusedConv`."""
    name = operator.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), _OTHER)


def profile_call(call: Callable[[], Any], sessions: Sessions) -> Profile:
    """Profile the second of two equal calls: the first one loads what is missing."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
    operators = [
        (e.key, e.self_cpu_time_total / 1e6, e.count) for e in profiler.key_averages() if "::" in e.key
    ]
    operators += sessions.operators()
    parts = dict.fromkeys((*KINDS, _OTHER), 0.0)
    for name, operator_seconds, _ in operators:
        parts[kind_of(name)] += operator_seconds
    parts[BETWEEN] = max(0.0, seconds - sum(parts.values()))
    return Profile(seconds, parts, sum(count for *_, count in operators))


class Sessions:
    """ONNX Runtime's sessions that were opened in `profile_sessions`, each of which writes its own profile."""

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def operators(self) -> list[tuple[str, float, int]]:
        """(operator, seconds, 1) of each operator in the second half of each session's runs. Ends the profiling."""
        return [row for session in self.opened for row in _later_half(Path(session.end_profiling()))]


def _later_half(file: Path) -> Iterator[tuple[str, float, int]]:
    """The operators of the second of two equal calls, which both run a session equally often."""
    events = json.loads(file.read_text("utf-8"))
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(runs) % 2:
        raise BenchmarkError(f"a session ran {len(runs)} times in two equal calls; it cannot be profiled")
    for event in events:
        is_kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["ts"] >= runs[len(runs) // 2]:
            yield event["args"]["op_name"], event["dur"] / 1e6, 1


@contextmanager
def profile_sessions(folder: Path) -> Iterator[Sessions]:
    """Let sessions of ONNX Runtime that are opened in this block write their profiles to `folder`."""
    import onnxruntime

    sessions = Sessions()
    original = onnxruntime.InferenceSession

    def opened(model: Any, options: Any = None, **other: Any) -> Any:
        options = options or onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / f"session-{len(sessions.opened)}")
        sessions.opened.append(original(model, options, **other))
        return sessions.opened[-1]

    onnxruntime.InferenceSession = opened
    try:
        yield sessions
    finally:
        onnxruntime.InferenceSession = original
