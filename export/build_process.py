"""Engines built in a child process: its progress shown, its memory estimated first, its death clean.

TensorRT's builder answers to nothing while it works: Ctrl-C waits for it, its progress callback is silent for
most of a build, and on some graphs it ends its process. So it has one of its own.

    parent -> child, stdin     the request, one line of JSON; then the pipe stays open, and its end is the end
    child -> parent, stdout    lines of JSON: {"phase": ...}, then {"done": ...} or {"error": ..., "kind": ...}
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from .. import errors
from ..errors import BuildError, LatentRTError
from ..runtime.engines import products
from ..runtime.host_memory import available_bytes
from .tensorrt import EngineRequest, build_engine

__all__ = ["build_bytes", "build_in_child", "estimated_bytes"]

# Peaks of builds by TensorRT for RTX 1.7, resident: 3.8 times the weights for SDXL's base UNet (5.1 GB), 3.4 times
# for the refiner's (4.5 GB), 0.6 GB for networks of a few megabytes.
_PER_WEIGHT_BYTE = 3.7
_ALWAYS = 600 << 20


def build_in_child(request: EngineRequest, *, expected_seconds: float | None = None) -> dict[str, Any]:
    """Build an engine as `tensorrt.build_engine` does, in a process of its own.

    Whatever ends this call, Ctrl-C included, ends the child. A child whose parent dies ends by itself.

    Args:
        expected_seconds: what such a build took last time, for the bar that is shown on a terminal.

    Returns:
        The figures of `build_engine`, with `seconds` for all of it.

    Raises:
        BuildError: too little memory is available, the model is rejected, or the child died.
        BackendUnavailableError: the product is not there.
        OSError: the engine cannot be written.
    """
    _require_memory(request)
    begun = time.perf_counter()
    with ExitStack() as stack:
        environment = dict(os.environ)
        if request.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = request.gpu
        if request.plugins:
            environment |= stack.enter_context(products.plugin_library(products.product(request.product)))
        stderr = stack.enter_context(tempfile.TemporaryFile())
        child = stack.enter_context(_child(stderr, environment))
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:  # it has died already, and is told of below
            with suppress(BrokenPipeError):
                child.stdin.close()
        answer = _watch(child, request.component, expected_seconds)
        code = child.wait()
        if answer is None:
            raise BuildError(_obituary(request, code, stderr))
    if "error" in answer:
        raise _error(answer)
    return {**answer["done"], "seconds": round(time.perf_counter() - begun, 3)}


def estimated_bytes(model: Path) -> int:
    """Peak memory of building the ONNX model at `model`, whose weights lie beside it."""
    return build_bytes(sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")))


def build_bytes(weights: int) -> int:
    """Peak memory of building a model of so many bytes of weights."""
    return int(_PER_WEIGHT_BYTE * weights) + _ALWAYS


def _require_memory(request: EngineRequest) -> None:
    needed, free = estimated_bytes(Path(request.model)), available_bytes()
    if free is not None and needed > free:
        raise BuildError(
            f"{request.component}: building its engine takes about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are available; end other programs, or build on a machine with more and copy the cache"
        )


@contextmanager
def _child(stderr: IO[bytes], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, killed when the block ends."""
    # -P: without the working directory on the path, which may hold a package of anyone's.
    command = [sys.executable, "-P", "-m", __name__]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is the parent's to handle
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _watch(child: subprocess.Popen[bytes], name: str, expected: float | None) -> dict[str, Any] | None:
    """Show the child's progress until it has answered; None when it ends without."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    last = "" if expected is None else f", last time {expected:.0f} s"
    layout = "{desc}: {elapsed}" + last if expected is None else "{desc}: |{bar:20}| {elapsed}" + last
    with tqdm(total=expected, bar_format=layout, leave=False, disable=None) as bar:  # on a terminal only
        bar.set_description(name)
        while True:
            try:
                line = lines.get(timeout=0.25)
            except queue.Empty:
                if expected is not None:
                    bar.n = min(bar.format_dict["elapsed"], expected)
                bar.refresh()
                continue
            if not line:
                return None
            message: dict[str, Any] = json.loads(line)
            if "phase" not in message:
                return message
            bar.set_description(f"{name}, {message['phase']}")


def _forward(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _error(answer: dict[str, Any]) -> Exception:
    if answer["kind"] == "OSError":
        return OSError(answer["errno"], answer["error"], answer["file"])
    kind: type[LatentRTError] = getattr(errors, answer["kind"])
    return kind(answer["error"])


def _obituary(request: EngineRequest, code: int, stderr: IO[bytes]) -> str:
    """Why a child that never answered did so, as far as can be seen from outside."""
    stderr.seek(0)
    said = stderr.read().decode(errors="replace").split("\n")
    last = " ".join(" ".join(said[-6:]).split()) or "it said nothing"
    if code >= 0:
        how, why = f"ended with status {code}", "this is a fault of latentrt or of its installation"
    else:
        how = f"was ended by {signal.Signals(-code).name}"
        why = "run this component on another back end, or build it in another dtype"
        if -code == signal.SIGKILL:
            needed = estimated_bytes(Path(request.model)) / 1e9
            why = f"memory ran out, if nobody killed it: it takes about {needed:.1f} GB"
    return f"{request.component}: the process that built its engine {how} ({last}); {why}"


# --- the child


def main() -> None:
    """Serve one request."""
    # What libraries print goes to stderr: stdout belongs to the protocol.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say({"done": build_engine(EngineRequest(**request), lambda phase: say({"phase": phase}))})
    except LatentRTError as error:
        say({"error": str(error), "kind": type(error).__name__})
    except OSError as error:
        say({"error": error.strerror, "kind": "OSError", "errno": error.errno, "file": error.filename})


def _end_with_parent() -> None:
    # Returns when the parent's end of the pipe is closed, by whatever. Not sys.stdin: its lock, which a waiting thread
    # holds, aborts an interpreter that ends.
    os.read(0, 1)
    os._exit(1)  # nothing gentler ends a process whose main thread is inside TensorRT's builder


if __name__ == "__main__":
    main()
