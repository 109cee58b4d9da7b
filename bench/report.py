"""The report of a run: Markdown, and a self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image

from . import tables
from .compare import SECONDS_TOLERANCE, differences
from .markup import as_html, as_markdown
from .plots import Line, bars, lines
from .results import CaseResult, Report
from .side import Images, as_bytes
from .stats import COVER, Interval, ratio

__all__ = ["PROFILE", "STYLE", "html", "markdown", "save_pictures"]

_MIB = 2**20
_SAVED_PICTURES = 4
"""Pictures of each side in the report: with all of eleven sides at 1024x1024 no browser would open the page."""
_THUMBNAIL_PIXELS = 256
PROFILE = (
    "Milliseconds of one picture by kind of operator, with profilers at work, which cost time themselves; between "
    "operators is Python, and what a session of ONNX Runtime does besides its operators."
)
_GROWTH_NOTE = (
    "Peaks at the first batch size. What a picture leaves behind is the slope of the memory over the rounds, where a "
    "leak shows."
)
STYLE = """
:root{--ink:#1d2330;--soft:#626b7d;--line:#e3e6ec;--back:#fff;--card:#f6f7f9;--accent:#0072b2;--bad:#b00020;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#9aa3b5;--line:#343b49;--back:#14171d;--card:#1d222b;
--accent:#56b4e9;--bad:#ff8a8a}}
body{font:15px/1.55 system-ui,sans-serif;max-width:1120px;margin:2.5em auto;padding:0 1.2em;color:var(--ink);
background:var(--back)}
h1{font-size:1.7em;margin:0 0 .4em}
h2{font-size:1.3em;margin:2em 0 .4em;padding-top:.8em;border-top:1px solid var(--line)}
h3{font-size:1.05em;margin:2em 0 .5em}p{margin:.5em 0}.soft,small{color:var(--soft);font-size:13px}
.best{background:var(--card);border-left:4px solid var(--accent);padding:.7em 1em;font-size:1.1em;margin:1em 0}
.warn{color:var(--bad)}.wide{overflow-x:auto;margin:1em 0}code{font-size:13px;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:5px 8px;text-align:right;vertical-align:top}td{white-space:nowrap}th{color:var(--soft);font-weight:600}
.words{text-align:left}td:first-child{font-weight:600}tr+tr{border-top:1px solid var(--line)}
td small{display:block;font-size:11px}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.grid{stroke:var(--line)}.pictures{display:flex;flex-wrap:wrap;gap:10px;margin:10px 0}
figure{margin:0;font-size:12px;color:var(--soft)}figure img{width:150px;display:block;border-radius:4px}
"""


def markdown(report: Report, others: Sequence[Report] = ()) -> str:
    """Tables of every case, with those of other results for comparison."""
    out = ["# latentrt bench", "", *_about(report)]
    for case in report.cases:
        out += ["", f"## {_title(case)}", ""]
        if case.skipped:
            out.append(f"Skipped: {case.skipped}")
            continue
        out += [tables.settings(case), "", *as_markdown(tables.latency(case)), ""]
        if reasons := list(_failures(case)):
            out += [*(f"- **{side}** {reason}" for side, reason in reasons), ""]
        for words, table in (
            ("", tables.batches(case)),
            (_GROWTH_NOTE, tables.memory(case)),
            ("", tables.conditions(case)),
            (PROFILE, tables.profile(case)),
        ):
            if table:
                out += [*([words, ""] if words else []), *as_markdown(table), ""]
        for words, theirs in _other_results(report, case, others):
            out += [f"{words}:", "", *as_markdown(tables.latency(theirs)), ""]
        out.pop()
    return "\n".join(out) + "\n"


def html(
    report: Report, pictures: Mapping[str, Mapping[str, Sequence[bytes]]], others: Sequence[Report] = ()
) -> str:
    """The same tables with plots and pictures.

    Args:
        pictures: case -> side -> JPEG files, as `save_pictures` returns them.
    """
    about = (_inline(line) for line in _about(report) if line)
    body = ["<h1>latentrt bench</h1>", *(f'<p class="soft">{line}</p>' for line in about)]
    for case in report.cases:
        body.append(f"<h2>{escape(_title(case))}</h2>")
        if case.skipped:
            body.append(f'<p class="warn">Skipped: {escape(case.skipped)}</p>')
        else:
            body += _case(report, case, pictures.get(case.case["name"], {}), others)
    head = f'<meta charset="utf-8"><title>latentrt bench</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _case(
    report: Report, case: CaseResult, pictures: Mapping[str, Sequence[bytes]], others: Sequence[Report]
) -> Iterator[str]:
    if fastest := _fastest(case):
        yield f'<p class="best">{escape(fastest)}</p>'
    yield as_html(tables.latency(case))
    for side, reason in _failures(case):
        yield f'<p class="warn">{escape(f"{side} {reason}")}</p>'
    yield f'<p class="soft">{escape(tables.settings(case))}</p>'
    yield "<h3>Images a second, beside the worst timed picture's PSNR</h3>" + as_html(tables.batches(case))
    yield from _time_plots(case)
    if table := tables.profile(case):
        yield f"<h3>Where the time of a picture goes</h3>{_profile_plot(case)}{as_html(table)}"
        yield f'<p class="soft">{escape(PROFILE)}</p>'
    if table := tables.memory(case):
        yield f"<h3>Memory</h3>{as_html(table)}" + f'<p class="soft">{escape(_GROWTH_NOTE)}</p>'
        yield _memory_plot(case)
    yield "<h3>How each side was set up</h3>" + as_html(tables.conditions(case))
    for words, theirs in _other_results(report, case, others):
        yield f"<h3>{escape(words)}</h3>{as_html(tables.latency(theirs))}"
    yield from _picture_grid(pictures)


def save_pictures(folder: Path, pictures: Mapping[str, Images]) -> dict[str, list[bytes]]:
    """Write the first few pictures of each side as SIDE-0.png, SIDE-1.png, ...

    Returns:
        Side -> the same pictures for the HTML page: small JPEG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[bytes]] = {}
    for side, images in pictures.items():
        for k, picture in enumerate(as_bytes(images[:_SAVED_PICTURES])):
            image = PIL.Image.fromarray(picture)
            image.save(folder / f"{side}-{k}.png")
            image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            buffer = BytesIO()
            image.save(buffer, format="jpeg", quality=90, subsampling=0)
            found.setdefault(side, []).append(buffer.getvalue())
    return found


def _about(report: Report) -> list[str]:
    machine = report.machine
    lines_ = [
        _machine(machine),
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()),
        f"Commit {machine.get('commit', 'unknown')}, seed {report.seed}, `{report.command}`",
    ]
    if tuned := machine.get("tuned"):
        lines_.append(f"Block sizes of kernels: {tuned}, by the digest of `kernels/tuned`")
    load = report.conditions.get("load")
    if load:
        lines_.append(
            f"Load of the machine when it began and ended: {load[0]:.2f} and {load[-1]:.2f} processes"
        )
    if report.seconds is not None:
        lines_.append(f"Measured in {report.seconds / 60:.0f} minutes")
    if not report.complete:
        lines_.append("**Interrupted: these are the figures there were by then.**")
    return [line for text in lines_ for line in (text, "")]


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, " if machine.get("gpu") else ""
    processor = f"{machine.get('processor', 'unknown processor')}, {machine.get('threads')} threads"
    return f"{gpu}{processor}, {machine.get('memory_gib')} GiB"


def _fastest(case: CaseResult) -> str:
    """A sentence on the fastest side and on those that do not differ from it beyond noise.

    Empty if no side is faster than the first one beyond noise. Between rounds at different times, the machine's drift
    is noise too.
    """
    if not case.rows:
        return ""
    first = case.rows[0].side
    figures_of = {
        row.side: (figures, figures.speedup)
        for row in case.rows[1:]
        if (figures := case.first(row)) is not None and figures.speedup is not None
    }
    not_interleaved = {
        side for side, (x, _) in figures_of.items() if not case.are_interleaved({first, side}, x.batch)
    }
    faster_than_first = {
        side: speedup.value
        for side, (_, speedup) in figures_of.items()
        if _is_above_1(speedup) and (side not in not_interleaved or speedup.value > 1 + SECONDS_TOLERANCE)
    }
    if not faster_than_first:
        return ""
    fastest = max(faster_than_first, key=faster_than_first.__getitem__)
    figures, speedup = figures_of.pop(fastest)
    mark = ", not interleaved" if fastest in not_interleaved else ""
    text = f"{speedup.value:.2f} times as fast as {first} ({speedup.low:.2f} to {speedup.high:.2f}{mark})"
    equal = []
    for side, (side_figures, side_speedup) in figures_of.items():
        if case.are_interleaved({side, fastest}, figures.batch):
            rounds = min(len(side_figures.seconds), len(figures.seconds))
            is_slower = _is_above_1(ratio(side_figures.seconds[:rounds], figures.seconds[:rounds]))
        else:
            drift = SECONDS_TOLERANCE if {side, fastest} & not_interleaved else 0.0
            is_slower = side_speedup.high < speedup.low and speedup.value > (1 + drift) * side_speedup.value
        if not is_slower:
            equal.append(side)
    if not equal:
        return f"Quickest: {fastest}, {text}."
    return f"Quickest: {fastest}, {text}; not different beyond noise: {', '.join(equal)}."


def _is_above_1(value: Interval) -> bool:
    return value.cover >= COVER and value.low > 1


def _title(case: CaseResult) -> str:
    name, summary = case.case["name"], case.case["summary"]
    return str(summary) if summary.startswith(f"{name} with ") else f"{name}: {summary}"


def _failures(case: CaseResult) -> Iterator[tuple[str, str]]:
    for row in case.rows:
        if row.reason:
            yield row.side, f"{row.status}: {row.reason}"


def _other_results(
    report: Report, case: CaseResult, others: Sequence[Report]
) -> Iterator[tuple[str, CaseResult]]:
    """The same case in other results, each with a title: the machine, and which settings differ."""
    for other in others:
        for theirs in other.cases:
            if theirs.case["name"] == case.case["name"] and not theirs.skipped:
                found = differences(report, case, other, theirs)
                suffix = f" (here and there: {'; '.join(found)})" if found else ""
                yield f"Beside it: {_machine(other.machine)}{suffix}", theirs


def _profile_plot(case: CaseResult) -> str:
    return bars(
        {row.side: {k: 1e3 * s for k, s in row.profile.parts.items()} for row in case.rows if row.profile},
        "ms",
    )


def _time_plots(case: CaseResult) -> Iterator[str]:
    measured = [row for row in case.rows if row.batches]
    if not measured:
        return
    stages = {}
    for row in measured:
        figures = case.first(row)
        if figures is None:
            continue
        whole = figures.median.value
        parts = {
            name: s for name, s in figures.stages.items() if not name.endswith("_step") and s > whole / 200
        }
        parts["other"] = max(0.0, whole - sum(parts.values()))
        stages[row.side] = {name: 1e3 * seconds for name, seconds in parts.items()}
    yield f"<h3>Stages of one call</h3>{bars(stages, 'ms')}"
    by_batch: list[Line] = [
        (row.side, [b.batch for b in row.batches], [b.median.value for b in row.batches]) for row in measured
    ]
    if any(len(row.batches) > 1 for row in measured):
        yield f"<h3>Latency against batch size</h3>{lines(by_batch, 'images', 'seconds')}"


def _memory_plot(case: CaseResult) -> str:
    kind = tables.main_kind(case)
    timeline: list[Line] = []
    for row in case.rows:
        figures = case.first(row)
        memory = None if figures is None else figures.memory
        if memory is not None and kind in memory.series:
            mib = [value / _MIB for value in memory.series[kind]]
            timeline.append((row.side, memory.series["seconds"], mib))
    if kind is None or not timeline:
        return ""
    return f"<h3>Memory during one call ({tables.KINDS[kind]})</h3>{lines(timeline, 's', 'MiB')}"


def _picture_grid(pictures: Mapping[str, Sequence[bytes]]) -> Iterator[str]:
    if pictures:
        yield "<h3>The same prompts and seeds</h3>"
        yield '<p class="soft">Reduced; whole ones are in the folder pictures.</p>'
    for k in range(max(map(len, pictures.values()), default=0)):
        figures = []
        for side, files in pictures.items():
            if k < len(files):
                data = base64.b64encode(files[k]).decode()
                figures.append(
                    f'<figure><img alt="" src="data:image/jpeg;base64,{data}">{escape(side)}</figure>'
                )
        yield f'<div class="pictures">{"".join(figures)}</div>'


def _inline(line: str) -> str:
    """HTML of a line of Markdown, with the code and bold text that this module writes."""
    line = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(line))
    return re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", line)
