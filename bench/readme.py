"""README's figures of the demo, from a file of results, so that nobody types them.

python -m latentrt.bench.readme                        # from bench/results/demo_bench_cpu.json
python -m latentrt.bench.readme out/bench/bench.json   # puts that file in its place first
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from pathlib import Path

from ..errors import BenchmarkError
from . import report as reports
from .cases import SIDES
from .results import Report, Row, read_report

__all__ = ["README", "RESULT", "main", "refreshed", "section"]

_ROOT = Path(__file__).resolve().parents[1]
README = _ROOT / "README.md"
RESULT = _ROOT / "bench" / "results" / "demo_bench_cpu.json"
_BEGIN, _END = "<!-- figures: python -m latentrt.bench.readme -->", "<!-- end of figures -->"


def section(report: Report) -> str:
    """What README says of the demo's case.

    Raises:
        BenchmarkError: the demo was not measured, or not beside diffusers.
    """
    case = next((case for case in report.cases if case.case["name"] == "demo"), None)
    if case is None or not case.rows or not case.rows[0].batches or case.rows[0].side != "diffusers":
        raise BenchmarkError(
            "the results hold no demo measured beside diffusers; run latentrt bench --case demo"
        )
    machine, c = report.machine, case.case
    first = case.rows[0].batches[0]
    measured = [row for row in case.rows if row.batches]
    worst = min(row.batches[0].psnr for row in measured if row.side != "diffusers")
    words = (
        f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit']}: base + refiner, "
        f"{c['steps']} steps, guidance {c['guidance']:g}, {c['dtype']}, the sides taking turns on the same noise; "
        f"medians of {len(first.seconds)} rounds, ratios of each round with an interval that covers "
        f"{100 * first.latency.median.cover:.0f} %. The worst timed picture of any side has a PSNR of {worst:.0f} dB "
        "beside eager diffusers'."
    )
    table = [
        "| side | what it is | seconds | against diffusers | built in | first image |",
        "| --- |" + " --- |" * 5,
    ]
    table += [_row(row) for row in case.rows]
    profile = reports.profile_lines(case)
    return "\n".join(
        [*textwrap.wrap(words, 118, break_on_hyphens=False), "", *table, *(["", *profile] if profile else [])]
    )


def _row(row: Row) -> str:
    plain = row.side.partition("@")[0]
    what = SIDES[plain].summary if plain in SIDES else ""
    if not row.batches:
        return f"| `{row.side}` | {what} | {row.status}: {row.reason} | - | - | - |"
    figures = row.batches[0]
    r = figures.speedup
    against = (
        "-" if r is None else "1" if r.low == r.high else f"{r.value:.2f} x ({r.low:.2f} to {r.high:.2f})"
    )
    built = "-" if row.build_seconds is None else f"{row.build_seconds:.0f} s"
    begun = "-" if row.first_image_seconds is None else f"{row.first_image_seconds:.1f} s"
    return f"| `{row.side}` | {what} | {figures.latency.median.value:.2f} | {against} | {built} | {begun} |"


def refreshed(readme: str, report: Report) -> str:
    """README's text with the figures of `report`.

    Raises:
        BenchmarkError: it has no place for them.
    """
    place = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
    if not place.search(readme):
        raise BenchmarkError(f"README has no lines {_BEGIN} and {_END} to write figures between")
    return place.sub(lambda _: f"{_BEGIN}\n{section(report)}\n{_END}", readme)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write README's figures of the demo.")
    parser.add_argument(
        "result", type=Path, nargs="?", help="takes the place of bench/results/demo_bench_cpu.json"
    )
    args = parser.parse_args(argv)
    report = read_report(args.result or RESULT)
    text = refreshed(README.read_text("utf-8"), report)
    if args.result is not None:
        shutil.copyfile(args.result, RESULT)
    README.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
