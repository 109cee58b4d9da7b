"""A case's results as tables of text, which `report` shows as Markdown and HTML, and `readme` in part."""

from __future__ import annotations

from .markup import Table, drop_empty_columns
from .results import CaseResult, Memory, Row
from .stats import COVER, LEAST_ROUNDS

__all__ = [
    "KINDS",
    "against_first",
    "batches",
    "conditions",
    "latency",
    "main_kind",
    "memory",
    "not_interleaved",
    "peak",
    "profile",
    "settings",
]

KINDS = {
    "gpu": "GPU",
    "gpu by turns": "GPU by turns",
    "reserved": "reserved by PyTorch",
    "allocated": "PyTorch's tensors",
    "resident": "host",
}
"""Kind of memory (see `monitor.Series`) -> its name for people. The most informative one is first."""
_MIB = 2**20
_STAGES = {"text": "text", "base": "base", "refiner": "refiner", "decode": "VAE"}


def against_first(case: CaseResult, row: Row) -> str:
    """A side's speedup over the case's first side, at the first batch size."""
    if row is case.rows[0]:
        return "1"
    figures = case.first(row)
    if figures is None or figures.speedup is None:
        return "-"
    r = figures.speedup
    mark = "" if case.is_interleaved(row, figures.batch) else ", not interleaved"
    return f"{r.value:.2f} x\n({r.low:.2f} to {r.high:.2f}{mark})"


def not_interleaved(case: CaseResult) -> str:
    """A sentence on the sides whose speedup compares rounds at different times; empty if there are none."""
    batches = {
        b.batch
        for row in case.rows
        for b in row.batches
        if b.speedup is not None and not case.is_interleaved(row, b.batch)
    }
    if not batches:
        return ""
    sizes = ", ".join(map(str, sorted(batches)))
    return (
        f"Sides that are not interleaved (at batch {sizes}) did not fit together with {case.rows[0].side}: they ran at "
        "another time, and their speedups include how the machine changed meanwhile."
    )


def settings(case: CaseResult) -> str:
    """The case's settings, and how to read the figures."""
    c = case.case
    size = "the model's own size" if c["size"] is None else f"{c['size'][1]}x{c['size'][0]}"
    steps = " + ".join(str(count) for count in case.steps.values())
    text = (
        f"{size}, {c['steps']} steps ({steps}), guidance {c['guidance']:g}, {c['dtype']}; pictures compared with "
        f"{case.reference}{_own_reference(case)}, gate {case.gate!r}. Seconds are medians (fastest to slowest); the "
        f"speedup is of paired rounds, with the interval of its median{_coverage(case)}."
    )
    return " ".join(filter(None, [text, not_interleaved(case), _networks(case)]))


def _own_reference(case: CaseResult) -> str:
    """A warning that the reference is latentrt's own, and would share its mistakes."""
    own = (case.reference or "").startswith("latentrt-")
    return " (latentrt's own: there is no diffusers beside it to tell whether that is right)" if own else ""


def _coverage(case: CaseResult) -> str:
    """The coverage of the intervals. All have the same number of rounds, unless the run was interrupted."""
    covers = [b.median.cover for row in case.rows for b in row.batches]
    if not covers:
        return ""
    few = f"; 95 % needs {LEAST_ROUNDS} rounds" if min(covers) < COVER else ""
    return f" ({100 * min(covers):.1f} %{few})"


def _networks(case: CaseResult) -> str:
    """By which networks CLIP score, FID and LPIPS were measured."""
    qualities = [row.quality for row in case.rows if row.quality]
    sentences = []
    for name, field in (("LPIPS", "lpips_by"), ("CLIP score", "clip_by"), ("FID", "fid_by")):
        by = next((getattr(q, field) for q in qualities if getattr(q, field)), None)
        if by is not None:
            sentences.append(f"{name} is by {by}.")
        elif name == "FID" and qualities:
            sentences.append(
                f"{qualities[0].pictures} pictures are too few for FID, or no network measures it."
            )
    if any("(" in cell for row in case.rows for cell in _quality(row)):
        sentences.append("In parentheses: of the reference's pictures.")
    return " ".join(sentences)


def latency(case: CaseResult) -> Table:
    """All figures at the first batch size. A side that was not measured has no times."""
    head = ["side", "seconds", f"against {case.rows[0].side}" if case.rows else "", "text ms", "base step ms"]
    head += ["refiner step ms", "VAE ms", "build s", "first image s", "peak MiB", "J/image"]
    table = [[*head, "PSNR dB", "SSIM", "LPIPS", "CLIP", "FID"]]
    table += [[row.side, *_times(case, row), *_quality(row)] for row in case.rows]
    return drop_empty_columns(table, 2)


def _times(case: CaseResult, row: Row) -> list[str]:
    b = case.first(row)
    if b is None:
        return [row.status if row.status != "measured" else "-", *["-"] * 9]
    stage = [_ms(b.stages.get(name)) for name in ("text", "base_step", "refiner_step", "decode")]
    return [
        f"{b.median.value:.3f}\n({min(b.seconds):.3f} to {max(b.seconds):.3f})",
        against_first(case, row),
        *stage,
        "kept" if row.built_before else _number(row.build_seconds, ".1f"),
        _number(row.first_image_seconds, ".1f"),
        peak(b.memory),
        _number(b.joules_per_image, ".0f"),
    ]


def _quality(row: Row) -> list[str]:
    q = row.quality
    if q is None:
        return ["-"] * 5
    forms = (("psnr", ".1f"), ("ssim", ".4f"), ("lpips", ".4f"))
    return [
        *(_number(getattr(q, name), form) for name, form in forms),
        _beside_reference(q.clip, q.clip_reference, ".2f"),
        _beside_reference(q.fid, q.fid_reference, ".4g"),
    ]


def _beside_reference(value: float | None, reference: float | None, form: str) -> str:
    """A value, with that of the reference's pictures in parentheses if it differs."""
    own, other = _number(value, form), _number(reference, form)
    return own if reference is None or own == other else f"{own}\n({other})"


def batches(case: CaseResult) -> Table:
    """Images a second by batch size, each with the PSNR of its worst timed picture."""
    sizes = list(dict.fromkeys(b.batch for row in case.rows for b in row.batches))
    table = [["images/s", *(f"batch {size}" for size in sizes)]]
    for row in case.rows:
        cells = {b.batch: f"{b.images_per_second:.3g}\n({b.psnr:.0f} dB)" for b in row.batches}
        if cells:
            table.append([row.side, *(cells.get(size, "-") for size in sizes)])
    return table


def conditions(case: CaseResult) -> Table:
    """How each side was configured, and the conditions of its rounds: most cores used by others, and the GPU's clock
    during the calls."""
    table = [["side", "set up", "dtype", "others kept busy, cores", "GPU's MHz"]]
    for row in case.rows:
        busy = max((value for b in row.batches for value in b.busy_elsewhere), default=None)
        clocks = [state["sm_mhz"] for b in row.batches for state in b.gpu if "sm_mhz" in state]
        clock_range = f"{min(clocks):.0f} to {max(clocks):.0f}" if clocks else "-"
        table.append([row.side, row.settings or "-", row.dtype, _number(busy, ".2f"), clock_range])
    return drop_empty_columns(table, 3)


def main_kind(case: CaseResult) -> str | None:
    """The most informative kind of memory that any side has; None if none was sampled."""
    sampled = {kind for row in case.rows for b in row.batches if b.memory for kind in b.memory.peaks}
    return next((kind for kind in KINDS if kind in sampled), None)


def memory(case: CaseResult) -> Table:
    """MiB at the first batch size; empty if no memory was sampled.

    Columns are the peak of each kind; and for the main kind the peak in each stage, the memory between runs, and its
    growth with each picture, which is shown for the host too.
    """
    main = main_kind(case)
    if main is None:
        return []
    head = [f"peak, {name}" for name in KINDS.values()] + [f"in {name}" for name in _STAGES.values()]
    table = [["MiB", *head, "at rest", "left by a picture", "left on the host"]]
    for row in case.rows:
        first = case.first(row)
        m = None if first is None else first.memory
        if m is not None:
            cells = [m.peaks.get(kind) for kind in KINDS]
            cells += [m.by_stage.get(stage, {}).get(main) for stage in _STAGES]
            cells.append(m.at_rest.get(main))
            growths = [m.growths.get(main), m.growths.get("resident") if main != "resident" else None]
            formatted = [_mib(value, ",.0f") for value in cells] + [_mib(value, "+.1f") for value in growths]
            table.append([row.side, *formatted])
    return drop_empty_columns(table, 1)


def profile(case: CaseResult, sides: tuple[str, ...] = ()) -> Table:
    """Milliseconds of each kind of operator (rows) for each side (columns); empty if no side was profiled.

    Args:
        sides: only these; all that were profiled if empty.
    """
    rows = [row for row in case.rows if row.profile and (not sides or row.side in sides)]
    profiles = {row.side: row.profile for row in rows if row.profile}
    if not profiles:
        return []
    kinds = dict.fromkeys(kind for p in profiles.values() for kind in p.parts)
    table = [["ms", *profiles]]
    table += [[kind, *(f"{1e3 * p.parts.get(kind, 0.0):.1f}" for p in profiles.values())] for kind in kinds]
    table.append(["in all", *(f"{1e3 * p.seconds:.1f}" for p in profiles.values())])
    timed = [_ms(b.median.value if (b := case.first(row)) else None) for row in rows]
    table.append(["without profilers", *timed])
    return [*table, ["operators called", *(f"{p.operators:,}" for p in profiles.values())]]


def peak(memory: Memory | None) -> str:
    """The peak of the most informative kind in MiB, with its name unless it is the whole process's."""
    kind = next((name for name in KINDS if memory and name in memory.peaks), None)
    if memory is None or kind is None:
        return "-"
    suffix = {"gpu by turns": " by turns", "reserved": " by PyTorch", "allocated": " of tensors"}.get(
        kind, ""
    )
    return f"{memory.peaks[kind] / _MIB:,.0f}{suffix}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _mib(value: float | None, form: str) -> str:
    return "-" if value is None else format(value / _MIB, form)
