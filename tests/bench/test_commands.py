"""`bench/commands.py` and `suite.py`: what the command line refuses before anything is measured, and what it
lists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from latentrt.bench.gates import GATES

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "demos"), "no case 'demos'; there are demo, demo-base, sdxl"),
        (("--side", "pytorch"), "no side 'pytorch'; there are diffusers, diffusers-compile"),
        (("--side", "diffusers@int8"), "no dtype 'int8'; there are float32, float16, bfloat16"),
        (("--side", "diffusers", "--side", "diffusers"), "a side is named twice"),
        (("--metric", "mse"), "no metric 'mse'; there are psnr, ssim, lpips, clip, fid"),
        (("--metric", "lpips"), "metric 'lpips' of case 'demo' needs AlexNet's weights: --lpips FILE"),
        (("--inception", "empty.txt"), "--inception is for FID, which needs true pictures: give --truth"),
        (("--gate", "mlperf"), "gate 'mlperf' cannot judge without --clip, --inception, --truth"),
        (
            ("--gate", "mlperf", "--clip", "a", "--inception", "b", "--truth", "c"),
            "gate 'mlperf' judges 5000 pictures, and --pictures is 4",
        ),
        (("--steps", "0"), "case demo: 0 steps; at least 1 is needed"),
        (("--high-noise-frac", "1.5"), "case demo: high_noise_frac is 1.5; it can be 0 to 1"),
        (("--guidance", "nan"), "case demo: guidance is nan"),
        (("--patience", "0"), "patience of 0 s; each must be above 0"),
        (("--gate", "none"), "no gate 'none'; there are eager, mlperf"),
        (("--device", "cuda"), "sees no CUDA device"),
        (("--device", "tpu"), "device is 'tpu'; it can be 'cpu', 'cuda'"),
        (("--rounds", "0"), "0 rounds of 4 pictures"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompts; write one a line"),
        (("--beside", "empty.txt"), "empty.txt is not JSON"),
        (("--case", "sdxl"), "sdxl: diffusers needs about 11.5 GiB and 4.0 GiB are free on cpu"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...], message: str, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.bench.grouping._free_memory", lambda device: 4 << 30)
    Path("empty.txt").touch()
    code, _, err = run_cli("bench", *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_what_there_is_is_listed(run_cli: Run) -> None:
    code, out, _ = run_cli("bench", "list")
    assert code == 0
    for name in ("demo", "sdxl-refiner", "diffusers-max-autotune", "latentrt-onnxruntime", "mlperf", *GATES):
        assert re.search(rf"^    {name} ", out, re.MULTILINE)
    assert re.search(r"^    diffusers-reduce-overhead +torch.compile with", out, re.MULTILINE)
