"""`bench/tables.py`: what each table shows of a side, and what it withholds."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.planted_reports import MACHINE, report, with_figures
from helpers.planted_sides import planted
from latentrt.bench import report as reports
from latentrt.bench.cases import Case
from latentrt.bench.compare import compare
from latentrt.bench.gates import GATES, Quality
from latentrt.bench.results import Report
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.worker import Worker
from latentrt.cli import build_parser


def cells(text: str, head: str, side: str = "latentrt-eager") -> dict[str, str]:
    """The side's row of the Markdown table that begins with `head`."""
    lines = iter(text.splitlines())
    names = next(line for line in lines if line.startswith(f"| {head} |"))
    values = next(line for line in lines if line.startswith(f"| {side} |"))
    split = ([cell.strip() for cell in line.strip("|").split("|")] for line in (names, values))
    return dict(zip(*split, strict=True))


def test_tables_show_what_was_found_and_what_was_withheld() -> None:
    text = reports.markdown(report())
    found = cells(text, "side")
    assert float(found["seconds"].split()[0]) == pytest.approx(1.0, rel=0.02)
    seconds = report().cases[0].rows[1].batches[0].seconds  # 99 % of 9 rounds would be the slowest
    assert found["seconds"].partition(" ")[2] == f"({min(seconds):.3f} to {max(seconds):.3f})"
    assert "Seconds are medians (fastest to slowest)" in text
    assert float(found["against diffusers"].split()[0]) == pytest.approx(2.0, rel=0.02)
    assert (found["text ms"], found["base step ms"], found["VAE ms"]) == ("100.0", "20.0", "100.0")
    assert (found["build s"], found["first image s"]) == ("30.0", "10.0")
    assert (found["PSNR dB"], found["SSIM"]) == ("120.0", "1.0000")
    assert not {"LPIPS", "FID", "J/image", "refiner step ms"} & found.keys()  # nobody has them
    assert cells(text, "images/s")["batch 1"].endswith("(120 dB)")
    assert "the interval of its median (96.5 %)." in text
    assert "| kept |" in reports.markdown(report(built_before=True, build_seconds=None))
    judged = Quality(60, 120.0, 1.0, clip=31.7, clip_reference=31.704, fid=23.1, fid_reference=22.9)
    text = reports.markdown(report(quality=judged))
    assert (cells(text, "side")["CLIP"], cells(text, "side")["FID"]) == ("31.70", "23.1 (22.9)")
    assert "In parentheses: of the reference's pictures." in text
    hidden = reports.markdown(report(status="invalid", reason="PSNR 12 dB", batches=[]))
    assert cells(hidden, "side")["seconds"] == "invalid"
    assert " x (" not in hidden
    assert "\n\n- **latentrt-eager** invalid: PSNR 12 dB\n\n" in hidden


def test_tables_do_not_mix_batch_sizes() -> None:
    """A side that there was room for at another size only is told at that one."""
    made = with_figures(report(reason="batch 1 needs about 40.0 GiB"), batch=4)
    text = reports.markdown(made)
    found = cells(text, "side")
    assert (found["seconds"], found["against diffusers"], found["peak MiB"]) == ("-", "-", "-")
    assert cells(text, "images/s")["batch 4"].endswith("(120 dB)")
    assert "| latentrt-eager |" not in text[text.index("| MiB") : text.index("| side | set up")]
    assert "Quickest" not in reports.html(made, {})
    assert build_parser().parse_args(["bench", "--batch", "4,1,4"]).batch == (1, 4)


def test_only_the_first_side_is_1_by_definition() -> None:
    """With one round every interval is a point."""
    text = reports.markdown(report(1.0, 2.0, rounds=1))
    against = cells(text, "side")["against diffusers"]
    assert re.fullmatch(r"(1\.9\d|2\.\d\d) x \((\S+) to \2\)", against)
    assert cells(text, "side", "diffusers")["against diffusers"] == "1"
    assert "(0.0 %; 95 % needs 6 rounds)" in text


def test_memory_and_conditions_have_tables() -> None:
    peaks = {"allocated": 4e8, "resident": 5e8}
    by_stage = {"text": {"allocated": 1e8}, "decode": {"allocated": 4e8}}
    series = {"seconds": [0.0, 1.0], "allocated": [1e8, 4e8], "resident": [5e8, 5e8]}
    memory = {"peaks": peaks, "by_stage": by_stage, "series": series}
    memory |= {"at_rest": {"allocated": 2e8}, "growths": {"allocated": 8 * 2.0**20, "resident": 32 * 2.0**20}}
    made = with_figures(
        report(settings="channels_last"),
        memory=memory,
        busy_elsewhere=[0.1, 1.4, 0.0],
        gpu=[{"sm_mhz": 1500.0}, {"sm_mhz": 1980.0}, {}],
    )
    text = reports.markdown(made)
    found = cells(text, "MiB")
    assert found["peak, PyTorch's tensors"] == "381"
    assert (found["peak, host"], found["in text"], found["in VAE"]) == ("477", "95", "381")
    assert (found["at rest"], found["left by a picture"], found["left on the host"]) == (
        "191",
        "+8.0",
        "+32.0",
    )
    assert cells(text, "MiB", "diffusers")["left on the host"] == "+0.0"
    found = cells(text, "side | set up")
    assert (found["set up"], found["others kept busy, cores"]) == ("channels_last", "1.40")
    assert found["GPU's MHz"] == "1500 to 1980"
    # A GPU without NVML: what PyTorch allocated is plotted, not the host's memory.
    assert "Memory during one call (PyTorch's tensors)" in reports.html(made, {})


class OnAGpu(Worker):
    """A stand-in for one, on which the side keeps what it keeps on the host."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        made = super().run(*args, **kwargs)
        allocated = {"allocated": made.memory["resident"]}
        trace = made.trace and replace(made.trace, peaks={**made.trace.peaks, **allocated})
        return replace(made, memory={"resident": 1e9, **allocated}, trace=trace)


@pytest.mark.parametrize(("kind", "host"), [("resident", Worker), ("allocated", OnAGpu)])
def test_a_planted_leak_shows_in_the_report_and_in_a_comparison(
    kind: str, host: type[Worker], tmp_path: Path
) -> None:
    case = Case("planted", "nothing real", "none", steps=1)

    def measured(leak_bytes: int) -> Report:
        gc.collect()  # what other tests left would be freed between two pictures
        run = CaseRun(
            case,
            [replace(planted("kept", leak_bytes=leak_bytes), name="kept")],
            Plan(["a"], GATES["eager"], rounds=7, pictures=1),
            steps={"base": 1},
            device="cpu",
            folder=tmp_path,
            open_host=host,
        )
        run.measure()
        return Report("", MACHINE, 0, [run.result()])

    tight, leaky = measured(0), measured(32 << 20)  # beside which what libraries take is nothing
    left = [float(cells(reports.markdown(r), "MiB", "kept")["left by a picture"]) for r in (tight, leaky)]
    assert abs(left[0]) < 4
    assert left[1] == pytest.approx(32, rel=0.25)
    worse = {c.what for c in compare(tight, leaky) if c.verdict == "worse"}
    assert f"batch 1, {kind} memory left by a picture" in worse
