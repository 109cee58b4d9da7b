"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.faults import disk_full
from latentrt import __version__
from latentrt.cli import main
from latentrt.runtime.image import read_parameters

HOSTILE = 'a, b: "c"\nNegative prompt: none\nSteps: 3, Seed: 1 日本 🙂 \\'

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(run_cli: Run, tiny: Callable[..., Path]) -> Run:
    """`generate` with the tiny SDXL checkpoint on the eager back end, two steps of 64x48, unless told otherwise."""
    common = ("--model", str(tiny("sdxl")), "--backend", "eager", "--steps", "2", "--size", "64x48")
    return lambda *arguments: run_cli("generate", *common, *arguments)


def test_an_image_is_written_and_named(generate: Run) -> None:
    code, out, err = generate("a red cat", "-o", "new/folder/cat.png", "--seed", "3")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "new/folder/cat.png  64x48, seed 3, eager"
    assert second.startswith("prepare ")
    with PIL.Image.open("new/folder/cat.png") as image:
        assert image.size == (64, 48)


def test_the_timestep_spacing_is_in_the_record(generate: Run) -> None:
    code, out, _ = generate("a red cat", "--timestep-spacing", "trailing", "--json")
    assert code == 0
    assert json.loads(out)["images"][0]["timestep_spacing"] == "trailing"


def test_the_same_seed_writes_the_same_pixels(generate: Run) -> None:
    for name in ("a.png", "b.png"):
        generate("a red cat", "-o", name, "--seed", "0")
    a, b = (np.asarray(PIL.Image.open(name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)


def test_json_is_all_there_is_on_stdout(generate: Run) -> None:
    code, out, err = generate(
        HOSTILE,
        "--json",
        "--count",
        "2",
        "--seed",
        "0",
        "--guidance",
        "3",
        "--negative",
        "dark",
        "--tiled-vae",
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [entry["file"] for entry in told["images"]] == ["image-1.png", "image-2.png"]
    assert [entry["seed"] for entry in told["images"]] == [0, 1]
    assert told["timings"]["total"] > 0
    for entry in told["images"]:
        file = entry.pop("file")
        assert read_parameters(file) == entry
        assert entry["prompt"] == HOSTILE
        assert (entry["guidance_scale"], entry["negative_prompt"]) == (3.0, "dark")
    a, b = (np.asarray(PIL.Image.open(f"image-{k}.png")) for k in (1, 2))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("prompt", [HOSTILE, "Steps: 3", "--", "-1", " x "])
def test_info_reads_back_what_generate_wrote(prompt: str, generate: Run, run_cli: Run) -> None:
    negative = "Negative prompt: x, y"
    code, _, _ = generate("--negative", negative, "--seed", "5", "--sampler", "ddim", "--", prompt)
    assert code == 0
    code, out, _ = run_cli("info", "image.png", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["prompt"], told["negative_prompt"]) == (prompt, negative)
    assert (told["seed"], told["sampler"], told["steps"]) == (5, "ddim", 2)
    code, out, _ = run_cli("info", "image.png")
    assert code == 0
    assert "sampler          ddim\n" in out


def test_metadata_can_be_left_out(generate: Run, run_cli: Run) -> None:
    assert generate("a red cat", "--no-metadata")[0] == 0
    code, _, err = run_cli("info", "image.png")
    assert code == 1
    assert err == "latentrt: 'image.png' carries no generation parameters\n"


def test_what_a_file_says_cannot_drive_the_terminal(run_cli: Run) -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("latentrt", json.dumps({"prompt": "\x1b[2Jtwo\nlines\x9b\x07", "\x1bkey": 1}))
    PIL.Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
    code, out, _ = run_cli("info", "x.png")
    assert code == 0
    assert r"\x1b[2Jtwo" in out
    assert not any(c in out for c in "\x1b\x9b\x07")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "--seed", "1"), "the prompt is empty; say what the picture should show"),
        ((" \n",), "the prompt is empty"),
        (("x", "-o", "cat.jpg"), "the output is 'cat.jpg'; latentrt writes PNG, so name it cat.png"),
        (("x", "-o", "cat"), "so name it cat.png"),
        (("x", "-o", "folder.png"), "the output 'folder.png' is a folder"),
        (("x", "-o", "file/x.png"), "the output 'file/x.png' cannot be written"),
        (("x", "--count", "0"), "--count is 0; it must be 1 to 1024"),
        (("x", "--count", "1000000000"), "--count is 1000000000; it must be 1 to 1024"),
        (("x", "--guidance", "nan"), "guidance_scale must be a finite number; got nan"),
        (("x", "--seed", "-1"), "seed is -1; it must be 0 to"),
        (("x", "--sampler", "heun"), "there is no sampler 'heun'; there are euler, euler-a"),
        (("x \udcff",), r"prompt is not text: 'x \udcff' holds half a character; give UTF-8"),
        (("x", "--refiner", "/no/refiner"), "'/no/refiner' is not a local folder or file"),
        (("x", "--model", "/no/model"), "'/no/model' is not a local folder or file"),
        (
            ("x", "--backend", "tensorflow"),
            "no back end 'tensorflow'; there are onnxruntime, eager, triton, tensorrt, tensorrt-rtx, and auto",
        ),
        (("x", "--steps", "0"), "num_inference_steps is 0"),
        (("x", "--steps", "1001"), "1001 steps were asked for; this schedule has 1 to 1000"),
        (("x", "--memory-limit", "much"), "memory_limit: 'much' is no amount of memory; write such as 20GB"),
        (("x", "--size", "60x64"), "width is 60; it must be a multiple of 8, such as 64"),
        (("x", "--size", "64x0"), "height is 0; it must be 8 to"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...], message: str, generate: Run, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    code, out, err = generate(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("latentrt: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("paint",), "invalid choice: 'paint'"),
        (("generate",), "PROMPT"),
        (("generate", "x", "--size", "64"), "'64' is not a size; write WIDTHxHEIGHT, such as 1024x1024"),
        (("generate", "x", "--size", "axb"), "'axb' is not a size"),
        (("generate", "x", "--steps", "1e3"), "invalid int value: '1e3'"),
        (("generate", "x", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("export", "demo", "-o", ""), "argument -o/--output: it is empty; name a folder, or write . for"),
        (("build", "demo"), "--engine"),
        (("build", "demo", "--engine", "onnx"), "invalid choice: 'onnx'"),
        (
            ("build", "demo", "--engine", "tensorrt", "--arch", "ada"),
            "'ada' is not an architecture; write sm_90",
        ),
    ],
)
def test_unusable_arguments(arguments: tuple[str, ...], message: str, run_cli: Run) -> None:
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_full_disk_is_one_line(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PIL.Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise disk_full()

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    code, out, err = generate("a red cat")
    assert (code, out, err) == (1, "", "latentrt: No space left on device\n")
    assert list(Path().iterdir()) == []


def test_a_long_prompt_warns_and_still_makes_the_image(
    generate: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate("red " * 2500)[0] == 0
    assert "the prompt has 2500 tokens and the text encoder reads 75; cut off: 'red" in caplog.text
    assert Path("image.png").exists()


def test_backends_are_listed(run_cli: Run) -> None:
    code, out, _ = run_cli("backends")
    assert code == 0
    assert "* onnxruntime   ONNX Runtime 1." in out
    assert f"  eager         PyTorch {torch.__version__}" in out
    rows = json.loads(run_cli("backends", "--json")[1])
    assert [row["name"] for row in rows if row["preferred"]] == ["onnxruntime"]
    assert all(row["available"] for row in rows if row["name"] in ("eager", "onnxruntime"))


def test_version(run_cli: Run) -> None:
    assert run_cli("--version") == (0, f"latentrt {__version__}\n", "")


def test_a_terminal_that_knows_only_ascii(run_cli: Run) -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("latentrt", json.dumps({"prompt": "日本"}))
    PIL.Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
    done = subprocess.run(
        [sys.executable, "-m", "latentrt.cli", "info", "x.png"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, "prompt  \\u65e5\\u672c\n")


def test_json_is_json_whatever_the_encoding(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stream cannot hold would be escaped as Python does it, which is not JSON."""
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("latentrt", json.dumps({"prompt": "é 日 🙂"}))
    PIL.Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(("info", "x.png", "--json")) == 0
    narrow.seek(0)
    assert json.loads(narrow.read()) == {"prompt": "é 日 🙂"}


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `>&-` leaves it, and some service managers: the work is done all the same."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["backends"]) == 0


def test_without_a_stderr_the_exit_status_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it comes on stdout, where results are."""
    monkeypatch.setattr(sys, "stderr", None)
    assert [main(("info", "/no/such.png")), main(("bench", "compare", "/no/a", "/no/b"))] == [1, 1]
    assert capsys.readouterr().out == ""


# A test run in the background of a shell has SIGINT ignored, and children inherit that. Every step is reported, and
# takes long enough for a signal to arrive before the last.
INTERRUPTIBLE = """
import signal, sys, time
from latentrt.runtime import denoise
signal.signal(signal.SIGINT, signal.default_int_handler)
step = denoise.DenoiseState.step
def reported(self, *arguments):
    step(self, *arguments)
    print("step", file=sys.stderr, flush=True)
    time.sleep(0.05)
denoise.DenoiseState.step = reported
from latentrt.cli import main
sys.exit(main())
"""


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    options = ("--backend", "eager", "--steps", "200", "--model", str(tiny("sdxl")))
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "-v", "generate", "x", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                if line == "step\n":
                    break
                said.append(line)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    *steps, last = err.splitlines()
    assert last == "latentrt: interrupted"
    assert set(steps) <= {"step"}
    assert len(steps) < 200
    assert "back end eager" in said[0]  # -v says what it is about to do
    assert all(line.startswith("latentrt: ") for line in said)
    assert list(tmp_path.iterdir()) == []
