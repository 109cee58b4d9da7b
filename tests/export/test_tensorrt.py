"""The builder of TensorRT for RTX, for real and without a GPU, on models of a few nodes; and its process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pytest
from helpers import tiny_onnx
from helpers.waiting import until
from latentrt.errors import BuildError
from latentrt.export import build_process
from latentrt.export.build_process import build_in_child
from latentrt.export.tensorrt import EngineRequest, build_engine
from onnx import helper

SHAPES = {"x": [[1, 8], [2, 8], [4, 8]]}


def nothing(phase: str) -> None:
    pass


@pytest.fixture
def request_(tmp_path: Path) -> EngineRequest:
    """To build one ReLU."""
    model = tiny_onnx.relu(tmp_path / "model.onnx")
    return EngineRequest("unet", "tensorrt-rtx", model, str(tmp_path / "model.plan"), (SHAPES,), (89,))


# --- in this process


def test_an_engine_is_built(request_: EngineRequest) -> None:
    phases: list[str] = []
    figures = build_engine(request_, phases.append)
    plan = Path(request_.plan).read_bytes()
    assert len(plan) == figures["engine_bytes"] > 1000
    assert figures["layers"] == 1
    assert figures["plugin_layers"] == 0
    assert figures["build_seconds"] > 0
    assert figures["peak_memory_bytes"] > 50e6
    assert phases[0] == "reading the model"
    assert phases[-1] == "writing the engine"
    assert "Building engine" in phases


@pytest.mark.parametrize(
    "option",
    [
        {"archs": (80, 86, 89, 120)},
        {"weight_streaming": True},
        {"tf32": True},
        {"profiles": (SHAPES, {"x": [[8, 8], [8, 8], [8, 8]]})},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_build_another_engine(request_: EngineRequest, option: dict[str, Any]) -> None:
    build_engine(request_, nothing)
    plain = Path(request_.plan).read_bytes()
    build_engine(replace(request_, **option), nothing)
    assert Path(request_.plan).read_bytes() != plain


def test_a_rejected_node_is_named(request_: EngineRequest) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="/relu"),
        helper.make_node("GroupNormSilu", ["a"], ["y"], name="/mid/norm", domain="latentrt"),
    ]
    tiny_onnx.save(Path(request_.model), nodes, latentrt=1)
    with pytest.raises(
        BuildError,
        match=r"unet: TensorRT for RTX 1\.\S+ rejects node '/mid/norm' \(GroupNormSilu\): .*Plugin not found.*"
        r"; run this component on another back end \(`latentrt backends`\)",
    ):
        build_engine(request_, nothing)
    assert not Path(request_.plan).exists()


def test_a_node_rejected_within_a_function_is_named_with_it(request_: EngineRequest) -> None:
    import onnx

    node = helper.make_node("Outer", ["x"], ["y"], name="/mid/outer", domain="latentrt")
    tiny_onnx.save(Path(request_.model), [node], latentrt=1)
    model = onnx.load(request_.model)
    body = [helper.make_node("Inner", ["a"], ["b"], name="inner", domain="latentrt")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("latentrt", 1)]
    model.functions.append(helper.make_function("latentrt", "Outer", ["a"], ["b"], body, opsets))
    onnx.save(model, request_.model)
    with pytest.raises(BuildError, match=r"rejects node '\S*inner' \(Inner, in the function .*Outer"):
        build_engine(request_, nothing)


def test_a_damaged_model_is_refused(request_: EngineRequest) -> None:
    Path(request_.model).write_bytes(b"not a model")
    with pytest.raises(BuildError, match=r"unet: .* rejects the file: .*Failed to parse"):
        build_engine(request_, nothing)
    Path(request_.model).unlink()
    with pytest.raises(BuildError, match=r"unet: .* finds no model at .*model.onnx; export it again"):
        build_engine(request_, nothing)


def test_sizes_that_no_engine_takes(request_: EngineRequest) -> None:
    upside_down = {"x": [[4, 8], [2, 8], [1, 8]]}
    with pytest.raises(
        BuildError, match=r"refuses the sizes .*MIN<=OPT<=MAX.*; build it for other sizes"
    ) as caught:
        build_engine(replace(request_, profiles=(upside_down,)), nothing)
    assert "cudaError" not in str(caught.value)  # what it says without a driver explains nothing
    other = {"x": [[1, 9], [2, 9], [4, 9]]}
    with pytest.raises(
        BuildError, match=r"unet: .* cannot build it: .*; run this component on another back end"
    ):
        build_engine(replace(request_, profiles=(other,)), nothing)


# --- in a process of its own


def test_the_child_builds_the_same_engine(
    request_: EngineRequest, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    figures = build_in_child(request_)
    assert Path(request_.plan).stat().st_size == figures["engine_bytes"]
    assert figures["seconds"] >= figures["build_seconds"]
    assert figures["peak_memory_bytes"] < 400e6  # neither torch nor the parent is in it
    out, err = capfd.readouterr()
    assert out == ""
    assert "unet" in err


@pytest.mark.parametrize("gpu", [None, "GPU-0b5e"])
def test_which_gpus_the_child_sees(
    gpu: str | None, request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, seen = build_process._child, []

    def started(stderr: IO[bytes], environment: dict[str, str]) -> AbstractContextManager[Any]:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return child(stderr, environment)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(build_process, "_child", started)
    build_in_child(replace(request_, gpu=gpu))
    assert seen == [gpu or "3,1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"


def test_the_child_ends_by_itself_while_the_parent_lives(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    build_in_child(request_)
    assert [child.returncode for child in started] == [0]


def test_the_childs_errors_are_the_parents(request_: EngineRequest) -> None:
    Path(request_.model).write_bytes(b"not a model")
    with pytest.raises(BuildError, match=r"rejects the file"):
        build_in_child(request_)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
def test_a_full_disk_in_the_child(request_: EngineRequest) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        build_in_child(replace(request_, plan="/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def children() -> list[int]:
    """Processes that are building."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"latentrt.export.build_process" in command and state != "Z":
            found.append(int(folder.name))
    return found


def own_child(parent: int) -> int | None:
    def parent_of(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0

    return next((pid for pid in children() if parent_of(pid) == parent), None)


def test_a_child_that_dies_names_its_signal(request_: EngineRequest) -> None:
    def kill() -> None:
        os.kill(until(lambda: own_child(os.getpid())), signal.SIGKILL)

    slow = replace(
        request_, model=tiny_onnx.chain(Path(request_.model), 30), profiles=(tiny_onnx.CHAIN_SHAPES,)
    )
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(
        BuildError,
        match=r"unet: the process that built its engine was ended by SIGKILL \(it said nothing\); memory ran out, if "
        r"nobody killed it: it takes about 0\.6 GB",
    ):
        build_in_child(slow)
    thread.join()


@pytest.mark.parametrize("early", [False, True], ids=["later", "before it was asked"])
def test_output_of_a_broken_child_is_in_the_error(
    early: bool, request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once_it_died(request: EngineRequest) -> dict[str, Any]:
        if early:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return asdict(request)

    monkeypatch.setattr(build_process, "asdict", once_it_died)
    monkeypatch.setattr(build_process, "__name__", "latentrt.no_such_module")
    with pytest.raises(
        BuildError, match=r"ended with status 1 \(.*No module named latentrt.no_such_module\); this is"
    ):
        build_in_child(request_)


# In the background of a shell SIGINT is ignored, and children inherit that.
PARENT = textwrap.dedent("""
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pathlib import Path
    from latentrt.export.build_process import build_in_child
    from latentrt.export.tensorrt import EngineRequest
    from latentrt.runtime.cache import Store

    root, model, shapes = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])

    def build(folder):
        plan = str(folder / "model.plan")
        return build_in_child(EngineRequest("unet", "tensorrt-rtx", model, plan, (shapes,), (89,)))

    try:
        Store(root).get_or_build("ab" * 32, {"name": "unet"}, build)
    except KeyboardInterrupt:
        sys.exit(130)
""")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_whatever_ends_the_parent_ends_the_child(tmp_path: Path, how: signal.Signals) -> None:
    model = tiny_onnx.chain(tmp_path / "model.onnx", 300)  # which takes longer than the test gives it
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "cache"), model, repr(tiny_onnx.CHAIN_SHAPES)]
    )
    child = until(lambda: own_child(parent.pid))
    # In the middle of the build, where TensorRT answers to nothing.
    until(lambda: "tensorrt" in Path(f"/proc/{child}/maps").read_text())
    time.sleep(1)
    parent.send_signal(how)
    assert parent.wait(20) == (130 if how == signal.SIGINT else -how)
    until(lambda: child not in children(), 20)
    if how == signal.SIGINT:
        assert list((tmp_path / "cache" / "partial").iterdir()) == []
    assert list((tmp_path / "cache" / "entries").iterdir()) == []


# --- memory


def test_too_little_memory_is_refused_before_the_start(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(f"{request_.model}.data").write_bytes(b"")
    os.truncate(f"{request_.model}.data", 5_135_000_000)  # SDXL's base UNet; sparse
    monkeypatch.setattr(build_process, "available_bytes", lambda: 8_000_000_000)
    monkeypatch.setattr(build_process, "_child", lambda *_: pytest.fail("it was started"))
    with pytest.raises(
        BuildError,
        match=r"unet: building its engine takes about 19\.6 GB of memory and 8\.0 GB are available; end other programs",
    ):
        build_in_child(request_)


def test_the_estimate_covers_what_was_measured(tmp_path: Path) -> None:
    """Weights and peaks of SDXL's two UNets; the estimate may not be so high that 24 GB look too small either."""
    for weights, peak in ((5.135e9, 19.3e9), (4.519e9, 15.2e9)):
        (tmp_path / "model.onnx").write_bytes(b"")
        os.truncate(tmp_path / "model.onnx", int(weights))
        assert peak < build_process.estimated_bytes(tmp_path / "model.onnx") < 1.2 * peak


def test_unknown_free_memory_does_not_refuse_a_build(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(f"{request_.model}.data").write_bytes(b"")
    os.truncate(f"{request_.model}.data", 5_135_000_000_000)
    monkeypatch.setattr(build_process, "available_bytes", lambda: None)
    build_process._require_memory(request_)
