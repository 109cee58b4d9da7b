"""Two kinds of plots as SVG text: stacked bars and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["Line", "bars", "lines"]

Line = tuple[str, Sequence[float], Sequence[float]]
"""(name, x, y)."""

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")
_DASHES = ("", "7 4", "2 3")
"""Dashes of lines when all colours are used; bars become paler instead."""
_WIDTH, _LEFT, _RIGHT, _ROW = 860, 210, 90, 26


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Stacked horizontal bars: one for each row, with its parts side by side and their sum at the end."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    longest = max((sum(row.values()) for row in rows.values()), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    shapes = []
    for k, (name, row) in enumerate(rows.items()):
        top, x = k * _ROW, float(_LEFT)
        shapes.append(_text(_LEFT - 8, top + 17, name, "end"))
        for part, value in row.items():
            width = max(0.0, value * scale)
            title = f"<title>{escape(name)}, {escape(part)}: {_three_digits(value)} {escape(unit)}</title>"
            box = (
                f'x="{x:.1f}" y="{top + 4}" width="{width:.1f}" height="18" {_fill_style(parts.index(part))}'
            )
            shapes.append(f"<rect {box}>{title}</rect>")
            x += width
        shapes.append(_text(x + 6, top + 17, f"{_three_digits(sum(row.values()))} {unit}", "start"))
    return _svg(shapes, len(rows) * _ROW, parts, _bar_sample)


def lines(series: Sequence[Line], x_unit: str, y_unit: str) -> str:
    """One line for each series; both axes begin at 0."""
    height = 260
    right = _axis_end(max((max(x, default=0) for _, x, _ in series), default=0))
    top = _axis_end(max((max(y, default=0) for _, _, y in series), default=0))
    across, down = (_WIDTH - 80 - _RIGHT) / right, (height - 40) / top
    shapes = []
    for k in range(5):
        x, y = right * k / 4, top * k / 4
        at = height - 20 - y * down
        shapes.append(f'<line x1="80" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        shapes.append(_text(72, at + 4, f"{y:g}", "end"))
        shapes.append(_text(80 + x * across, height - 4, f"{x:g}", "middle"))
    shapes.append(_text(_WIDTH - _RIGHT + 18, height - 4, x_unit, "start"))
    shapes.append(_text(8, 12, y_unit, "start"))
    for k, (name, xs, ys) in enumerate(series):
        points = [(80 + x * across, height - 20 - y * down) for x, y in zip(xs, ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        title = f"<title>{escape(name)}</title>"
        shapes.append(f'<polyline points="{path}" fill="none" {_stroke_style(k)}>{title}</polyline>')
        if len(points) <= 16:
            fill = _COLOURS[k % len(_COLOURS)]
            shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"/>' for x, y in points]
    return _svg(shapes, height, [name for name, _, _ in series], _line_sample)


def _fill_style(k: int) -> str:
    """SVG attributes of the k-th part of bars."""
    cycle, k = divmod(k, len(_COLOURS))
    return f'fill="{_COLOURS[k]}"' + (f' fill-opacity="{0.55**cycle:.2f}"' if cycle else "")


def _stroke_style(k: int) -> str:
    """SVG attributes of the k-th line."""
    cycle, k = divmod(k, len(_COLOURS))
    dash = _DASHES[cycle % len(_DASHES)]
    return f'stroke="{_COLOURS[k]}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _bar_sample(k: int, x: float, y: float) -> str:
    return f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" {_fill_style(k)}/>'


def _line_sample(k: int, x: float, y: float) -> str:
    return f'<line x1="{x - 6:.1f}" x2="{x + 13:.1f}" y1="{y - 4:.1f}" y2="{y - 4:.1f}" {_stroke_style(k)}/>'


def _svg(
    shapes: list[str], height: int, legend: Sequence[str], sample: Callable[[int, float, float], str]
) -> str:
    x, y = 80.0, height + 22
    for k, name in enumerate(legend):
        width = 32 + 7.6 * len(name)
        if x + width > _WIDTH:
            x, y = 80.0, y + 20
        shapes.append(sample(k, x, y))
        shapes.append(_text(x + 17, y, name, "start"))
        x += width
    return f'<svg viewBox="0 0 {_WIDTH} {y + 8}" role="img">{"".join(shapes)}</svg>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _three_digits(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _axis_end(value: float) -> float:
    """The next larger of 1, 2, 4, 8 times a power of ten, so that quarters of it are short numbers."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-9))
