"""Writes README's figures from files of results.

    python -m latentrt.bench.readme                        # from what is in bench/results
    python -m latentrt.bench.readme out/bench/bench.json   # first makes that file the demo's result

They are the demo's figures with its profile (`demo_bench_cpu.json`); and, if there are such files, those of SDXL's
blocks on a CPU (`sdxl_blocks_cpu.json`) and of full size on a GPU (`bench.json` in `gpu-*`, or in a folder below).
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..errors import BenchmarkError
from ..kernels.atomic_file import write_atomic
from . import tables
from .cases import SIDES
from .machine import RESULTS, ROOT
from .markup import as_markdown, drop_empty_columns
from .proportions import read_blocks
from .proportions import table as blocks_table
from .report import PROFILE
from .results import CaseResult, Report, Row, read_report

__all__ = ["README", "main", "refreshed", "section"]

README = ROOT / "README.md"
_DEMO, _BLOCKS, _GPU = "demo_bench_cpu.json", "sdxl_blocks_cpu.json", "gpu-*/**/bench.json"
_OURS = "latentrt-onnxruntime"
_BEGIN, _END = "<!-- figures: python -m latentrt.bench.readme -->", "<!-- end of figures -->"


def section(demo: Report, results: Path) -> str:
    """The text between README's two marks.

    Args:
        demo: the demo's result.
        results: folder with the other files of results.

    Raises:
        BenchmarkError: the demo was not measured on a CPU and compared with diffusers, or a file cannot be read.
    """
    lines = [*_demo(demo), *_blocks(results / _BLOCKS)]
    for path in sorted(results.glob(_GPU)):
        lines += _on_gpu(read_report(path), path.relative_to(results.parent.parent))
    return "\n".join(lines).rstrip()


def _demo(report: Report) -> Iterator[str]:
    if gpu := report.machine.get("gpu"):
        raise BenchmarkError(
            f"the results are of {gpu}, and the demo's place is a CPU's; run latentrt bench --case demo --device cpu"
        )
    case = next((case for case in report.cases if case.case["name"] == "demo"), None)
    if case is None or not case.rows or not case.first(case.rows[0]) or case.rows[0].side != "diffusers":
        raise BenchmarkError(
            "the results hold no demo measured beside diffusers; run latentrt bench --case demo"
        )
    yield from _measured(report, case, "")
    if profile := tables.profile(case, (case.rows[0].side, _OURS)):
        yield from [*_wrapped(f"Where that comes from. {PROFILE}"), "", *as_markdown(profile), ""]


def _blocks(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    content = read_blocks(path)
    *table, _, words = blocks_table(content["blocks"], content["forward"])
    machine = content["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit']}"
    text = f"SDXL's own blocks at the shapes of 1024x1024, {content['rounds']} rounds on {where}. {words}"
    yield from [*_wrapped(text), "", *table, ""]


def _on_gpu(report: Report, source: Path) -> Iterator[str]:
    for case in report.cases if report.machine.get("gpu") else ():
        if any(case.first(row) for row in case.rows):
            yield from _measured(report, case, f" (`{source}`)")


def _measured(report: Report, case: CaseResult, source: str) -> Iterator[str]:
    """A paragraph on a case, and a table of its sides."""
    machine, c = report.machine, case.case
    where = f"{machine['processor']}, {machine['threads']} threads"
    if machine.get("gpu"):
        torch = machine.get("versions", {}).get("torch", "unknown")
        where = f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, PyTorch {torch}"
    figures = [b for row in case.rows if (b := case.first(row)) is not None]
    # The first side has more rounds if it was measured in several groups.
    fewest = min(figures, key=lambda b: len(b.seconds))
    duration = "" if report.seconds is None else f" The whole run took {report.seconds / 60:.0f} minutes."
    interrupted = "" if report.complete else " It was interrupted: these are the figures there were by then."
    parallel_builds = (
        f" Up to {case.builders} sides were built at the same time." if case.builders > 1 else ""
    )
    not_interleaved = f" {sentence}" if (sentence := tables.not_interleaved(case)) else ""
    turns = "sides that fit together taking turns" if not_interleaved else "the sides taking turns"
    text = (
        f"{where}, commit {machine['commit']}{source}: {c['summary']}, {c['steps']} steps, guidance {c['guidance']:g}, "
        f"{c['dtype']}, {turns} on the same noise; medians of {len(fewest.seconds)} rounds, ratios of "
        f"each round with an interval that covers {100 * fewest.median.cover:.0f} %. PSNR is of a side's "
        f"worst picture beside that of {case.reference}."
        f"{not_interleaved}{parallel_builds}{duration}{interrupted}"
    )
    head = ["side", "what it is", "seconds", f"against {case.rows[0].side}", "PSNR", "CLIP score", "FID"]
    table = [[*head, "peak MiB", "built in", "first image"], *(_row(case, row) for row in case.rows)]
    yield from [*_wrapped(text), "", *as_markdown(drop_empty_columns(table, 5)), ""]


def _row(case: CaseResult, row: Row) -> list[str]:
    plain = row.side.partition("@")[0]
    q = row.quality
    worst = [q.psnr] if q else []
    worst += [b.psnr for b in row.batches]
    judged = [
        f"{min(worst):.0f} dB" if worst else "-",
        "-" if q is None or q.clip is None else f"{q.clip:.1f}",
        "-" if q is None or q.fid is None else f"{q.fid:.4g}",
    ]
    about = [f"`{row.side}`", SIDES[plain].summary if plain in SIDES else "-"]
    figures = case.first(row)
    if figures is None:
        return [*about, f"{row.status}: {row.reason}", "-", *judged, "-", "-", "-"]
    built = "-" if row.build_seconds is None else f"{row.build_seconds:.0f} s"
    return [
        *about,
        f"{figures.median.value:.2f}",
        tables.against_first(case, row),
        *judged,
        tables.peak(figures.memory),
        "kept" if row.built_before else built,
        "-" if row.first_image_seconds is None else f"{row.first_image_seconds:.1f} s",
    ]


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, 118, break_on_hyphens=False)


def refreshed(readme: str, demo: Report, results: Path) -> str:
    """README's text with the figures of `demo` and of the files in `results`.

    Raises:
        BenchmarkError: it does not have the two marks.
    """
    marked = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
    if not marked.search(readme):
        raise BenchmarkError(f"README has no lines {_BEGIN} and {_END} to write figures between")
    return marked.sub(lambda _: f"{_BEGIN}\n{section(demo, results)}\n{_END}", readme)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write README's figures.")
    parser.add_argument("result", type=Path, nargs="?", help=f"takes the place of bench/results/{_DEMO}")
    args = parser.parse_args(argv)
    source = args.result or RESULTS / _DEMO
    text = refreshed(README.read_text("utf-8"), read_report(source), RESULTS)
    write_atomic(RESULTS / _DEMO, source.read_text("utf-8"))
    README.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
