"""A report for people: Markdown, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image

from .features import as_bytes
from .plots import Line, bars, lines
from .results import CaseResult, Memory, Report, Row
from .side import Images
from .stats import LEAST_ROUNDS

__all__ = ["STYLE", "html", "markdown", "png_bytes", "profile_lines", "save_pictures"]

_MIB = 2**20
_GPU = ("gpu", "gpu by turns")
"""What memory of a GPU is called, see `nvml.GpuShare`."""
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
td:first-child,th:first-child{text-align:left}td:first-child{font-weight:600}tr+tr{border-top:1px solid var(--line)}
td small{display:block;font-size:11px}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.grid{stroke:var(--line)}.pictures{display:flex;flex-wrap:wrap;gap:10px;margin:10px 0}
figure{margin:0;font-size:12px;color:var(--soft)}figure img{width:150px;display:block;border-radius:4px}
"""


def markdown(report: Report, beside: Sequence[Report] = ()) -> str:
    """Tables of every case; results of other machines beside them."""
    out = ["# latentrt bench", "", *_about(report)]
    for case in report.cases:
        out += ["", f"## {_title(case)}", ""]
        if case.skipped:
            out.append(f"Skipped: {case.skipped}")
            continue
        out += [_settings(case), ""]
        out += _markdown_table(_latency_table(case))
        out += ["", *_markdown_table(_batch_table(case))]
        if lines_ := profile_lines(case):
            out += ["", *lines_]
        out += [f"- **{row.side}** {row.status}: {row.reason}" for row in case.rows if row.reason]
        for other in beside:
            for theirs in other.cases:
                if theirs.case["name"] == case.case["name"] and not theirs.skipped:
                    out += ["", f"Beside it, {_machine(other.machine)}:", ""]
                    out += _markdown_table(_latency_table(theirs))
    return "\n".join(out) + "\n"


def html(
    report: Report, pictures: Mapping[str, Mapping[str, Sequence[bytes]]], beside: Sequence[Report] = ()
) -> str:
    """The same with plots and the pictures.

    Args:
        pictures: case -> side -> PNG files.
    """
    about = (_inline(line) for line in _about(report) if line)
    body = ["<h1>latentrt bench</h1>", *(f'<p class="soft">{line}</p>' for line in about)]
    for case in report.cases:
        body.append(f"<h2>{escape(_title(case))}</h2>")
        if case.skipped:
            body.append(f'<p class="warn">Skipped: {escape(case.skipped)}</p>')
            continue
        if best := _best(case):
            body.append(f'<p class="best">{escape(best)}</p>')
        body.append(_html_table(_latency_table(case)))
        body += [
            f'<p class="warn">{escape(f"{row.side} {row.status}: {row.reason}")}</p>'
            for row in case.rows
            if row.reason
        ]
        body.append(f'<p class="soft">{escape(_settings(case))}</p>')
        body += ["<h3>Images a second</h3>", _html_table(_batch_table(case))]
        if table := _profile_table(case):
            body += ["<h3>Where the time of a picture goes</h3>", _profile_plot(case), _html_table(table)]
            body.append(f'<p class="soft">{escape(_PROFILE)}</p>')
        for title, plot in _plots(case):
            body.append(f"<h3>{escape(title)}</h3>{plot}")
        for other in beside:
            body += [
                f"<h3>Beside it: {escape(_machine(other.machine))}</h3>{_html_table(_latency_table(theirs))}"
                for theirs in other.cases
                if theirs.case["name"] == case.case["name"] and not theirs.skipped
            ]
        body += _grid(pictures.get(case.case["name"], {}))
    head = f'<meta charset="utf-8"><title>latentrt bench</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def save_pictures(folder: Path, pictures: Mapping[str, Images]) -> dict[str, list[bytes]]:
    """Write SIDE-0.png, SIDE-1.png, ...; the files' bytes by side."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[bytes]] = {}
    for side, images in pictures.items():
        for k, picture in enumerate(as_bytes(images)):
            data = png_bytes(PIL.Image.fromarray(picture))
            (folder / f"{side}-{k}.png").write_bytes(data)
            found.setdefault(side, []).append(data)
    return found


def png_bytes(image: PIL.Image.Image) -> bytes:
    """As a PNG file holds it."""
    buffer = BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _about(report: Report) -> list[str]:
    machine = report.machine
    lines_ = [
        _machine(machine),
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()),
        f"Commit {machine.get('commit', 'unknown')}, seed {report.seed}, `{report.command}`",
    ]
    load = report.conditions.get("load")
    if load:
        lines_.append(
            f"Load of the machine when it began and ended: {load[0]:.2f} and {load[-1]:.2f} processes"
        )
    if not report.complete:
        lines_.append("**Interrupted: these are the figures there were by then.**")
    return [line for text in lines_ for line in (text, "")]


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, " if machine.get("gpu") else ""
    processor = f"{machine.get('processor', 'unknown processor')}, {machine.get('threads')} threads"
    return f"{gpu}{processor}, {machine.get('memory_gib')} GiB"


def _best(case: CaseResult) -> str:
    """The quickest side, if it is another one than what it is compared with."""
    speedups = {row.side: row.batches[0].speedup for row in case.rows[1:] if row.batches}
    found = {side: interval for side, interval in speedups.items() if interval is not None}
    if not found:
        return ""
    side = max(found, key=lambda name: found[name].value)
    r = found[side]
    return f"Quickest: {side}, {r.value:.2f} times {case.rows[0].side}'s speed ({r.low:.2f} to {r.high:.2f})."


def _title(case: CaseResult) -> str:
    return f"{case.case['name']}: {case.case['summary']}"


def _settings(case: CaseResult) -> str:
    c = case.case
    size = "the model's own size" if c["size"] is None else f"{c['size'][1]}x{c['size'][0]}"
    steps = " + ".join(str(count) for count in case.steps.values())
    return (
        f"{size}, {c['steps']} steps ({steps}), guidance {c['guidance']:g}, {c['dtype']}; pictures held against "
        f"{case.reference}, gate {case.gate!r}. Seconds are medians (p10, p90); the speedup is of paired rounds, with "
        f"the interval of its median{_cover(case)}. {_judged(case)}"
    ).rstrip()


def _cover(case: CaseResult) -> str:
    """What intervals hold; all have as many rounds, unless it was interrupted."""
    covers = [b.latency.median.cover for row in case.rows for b in row.batches]
    if not covers:
        return ""
    few = f"; 95 % needs {LEAST_ROUNDS} rounds" if min(covers) < 0.95 else ""
    return f" ({100 * min(covers):.1f} %{few})"


def _judged(case: CaseResult) -> str:
    """Whose figures CLIP score, FID and LPIPS are."""
    qualities = [row.quality for row in case.rows if row.quality]
    told = []
    for name, field in (("LPIPS", "lpips_by"), ("CLIP score", "clip_by"), ("FID", "fid_by")):
        by = next((getattr(q, field) for q in qualities if getattr(q, field)), None)
        if by is not None:
            told.append(f"{name} is by {by}.")
        elif name == "FID" and qualities:
            told.append(f"{qualities[0].pictures} pictures are too few for FID, or nobody judges it.")
    return " ".join(told)


Table = list[list[str]]


def _latency_table(case: CaseResult) -> Table:
    """Of the first batch size; a side that is not measured has no times."""
    head = ["side", "seconds", f"against {case.rows[0].side}" if case.rows else "", "text ms", "base step ms"]
    head += ["refiner step ms", "VAE ms", "build s", "first image s", "peak MiB", "J/image"]
    table = [[*head, "PSNR dB", "SSIM", "LPIPS", "CLIP", "FID"]]
    for row in case.rows:
        table.append([row.side, *_times(row), *_quality(row)])
    known = [k for k in range(len(table[0])) if k < 2 or any(line[k] != "-" for line in table[1:])]
    return [[line[k] for k in known] for line in table]


def _times(row: Row) -> list[str]:
    if not row.batches:
        return [row.status if row.status != "measured" else "-", *["-"] * 9]
    b = row.batches[0]
    s, r = b.latency, b.speedup
    stage = [_ms(b.stages.get(name)) for name in ("text", "base_step", "refiner_step", "decode")]
    return [
        f"{s.median.value:.3f}\n({s.p10:.3f}, {s.p90:.3f})",
        "-" if r is None else "1" if r.low == r.high else f"{r.value:.2f} x\n({r.low:.2f} to {r.high:.2f})",
        *stage,
        "kept" if row.built_before else _number(row.build_seconds, ".1f"),
        _number(row.first_image_seconds, ".1f"),
        _peak(b.memory),
        _number(b.joules_per_image, ".0f"),
    ]


def _quality(row: Row) -> list[str]:
    q = row.quality
    if q is None:
        return ["-"] * 5
    forms = (("psnr", ".1f"), ("ssim", ".4f"), ("lpips", ".4f"), ("clip", ".2f"), ("fid", ".2f"))
    return [_number(getattr(q, name), form) for name, form in forms]


def _batch_table(case: CaseResult) -> Table:
    """Images a second, by batch size."""
    sizes = list(dict.fromkeys(b.batch for row in case.rows for b in row.batches))
    table = [["images/s", *(f"batch {size}" for size in sizes)]]
    for row in case.rows:
        by_size = {b.batch: b.images_per_second for b in row.batches}
        if by_size:
            table.append([row.side, *(_number(by_size.get(size), ".3g") for size in sizes)])
    return table


_PROFILE = (
    "Milliseconds of one picture by kind of operator, with profilers at work, which cost time themselves; between "
    "operators is Python, and what a session of ONNX Runtime does besides its operators."
)


def profile_lines(case: CaseResult) -> list[str]:
    """Where the time of a picture goes, in Markdown; nothing where that was not asked for."""
    table = _profile_table(case)
    return [_PROFILE, "", *_markdown_table(table)] if table else []


def _profile_table(case: CaseResult) -> Table:
    """Kinds down, sides across; empty where none was profiled."""
    found = {row.side: row.profile for row in case.rows if row.profile}
    if not found:
        return []
    kinds = dict.fromkeys(kind for profile in found.values() for kind in profile.parts)
    table = [["ms", *found]]
    table += [[kind, *(f"{1e3 * p.parts.get(kind, 0.0):.1f}" for p in found.values())] for kind in kinds]
    table.append(["in all", *(f"{1e3 * p.seconds:.1f}" for p in found.values())])
    return [*table, ["operators called", *(f"{p.operators:,}" for p in found.values())]]


def _profile_plot(case: CaseResult) -> str:
    return bars(
        {row.side: {k: 1e3 * s for k, s in row.profile.parts.items()} for row in case.rows if row.profile},
        "ms",
    )


def _plots(case: CaseResult) -> Iterator[tuple[str, str]]:
    measured = [row for row in case.rows if row.batches]
    if not measured:
        return
    stages = {}
    for row in measured:
        figures = row.batches[0]
        whole = figures.latency.median.value
        parts = {
            name: s for name, s in figures.stages.items() if not name.endswith("_step") and s > whole / 200
        }
        parts["other"] = max(0.0, whole - sum(parts.values()))
        stages[row.side] = {name: 1e3 * seconds for name, seconds in parts.items()}
    yield "Stages of one call", bars(stages, "ms")
    by_batch: list[Line] = [
        (row.side, [b.batch for b in row.batches], [b.latency.median.value for b in row.batches])
        for row in measured
    ]
    yield "Latency against batch size", lines(by_batch, "images", "seconds")
    series = {name for r in measured for b in r.batches if b.memory for name in b.memory.series}
    kind = next((name for name in _GPU if name in series), "resident")
    timeline: list[Line] = []
    for row in measured:
        memory = row.batches[0].memory
        if memory is not None and kind in memory.series:
            mib = [value / _MIB for value in memory.series[kind]]
            timeline.append((row.side, memory.series["seconds"], mib))
    if timeline:
        yield f"Memory during one call ({kind})", lines(timeline, "s", "MiB")


def _grid(pictures: Mapping[str, Sequence[bytes]]) -> Iterator[str]:
    if pictures:
        yield "<h3>The same prompts and seeds</h3>"
    for k in range(max(map(len, pictures.values()), default=0)):
        figures = []
        for side, files in pictures.items():
            if k < len(files):
                data = base64.b64encode(files[k]).decode()
                figures.append(
                    f'<figure><img alt="" src="data:image/png;base64,{data}">{escape(side)}</figure>'
                )
        yield f'<div class="pictures">{"".join(figures)}</div>'


def _markdown_table(table: Table) -> list[str]:
    head, *rows = table
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows),
    ]


def _html_table(table: Table) -> str:
    head, *rows = table
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def _html_cell(cell: str) -> str:
    """What is on a second line is smaller."""
    first, _, second = cell.partition("\n")
    return f"<td>{escape(first)}{f'<small>{escape(second)}</small>' if second else ''}</td>"


def _inline(line: str) -> str:
    """Markdown's code and bold, as far as this module writes them."""
    line = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(line))
    return re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", line)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _peak(memory: Memory | None) -> str:
    if memory is None:
        return "-"
    kind = next(name for name in (*_GPU, "allocated", "resident") if name in memory.peaks)
    how = {"gpu by turns": " by turns", "allocated": " by PyTorch"}.get(kind, "")
    return f"{memory.peaks[kind] / _MIB:,.0f}{how}"
