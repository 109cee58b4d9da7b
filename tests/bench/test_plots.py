"""`bench/plots.py`: bars and lines as SVG."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from latentrt.bench.plots import bars, lines


def test_plots_draw_what_they_are_given() -> None:
    svg = ElementTree.fromstring(bars({"a <b>": {"x": 1.0, "y": 3.0}, "c": {"x": 2.0}}, "ms"))
    drawn = [r for r in svg.iter("rect") if r.find("title") is not None]
    widths = [float(r.get("width")) for r in drawn]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.01)
    assert float(drawn[1].get("x")) == pytest.approx(float(drawn[0].get("x")) + widths[0], abs=0.2)
    assert "4 ms" in [t.text for t in svg.iter("text")]
    svg = ElementTree.fromstring(lines([("a", [1, 2, 4], [0.5, 1.0, 2.0]), ("none", [], [])], "images", "s"))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)
    assert slopes[0] < 0  # up is less in SVG
    # More sides than colours are told apart all the same.
    many = [(f"side {k}", [0, 1], [0, k]) for k in range(11)]
    svg = ElementTree.fromstring(lines(many, "images", "s"))
    looks = {(p.get("stroke"), p.get("stroke-dasharray")) for p in svg.findall("polyline")}
    assert len(looks) == 11
    assert looks == {
        (p.get("stroke"), p.get("stroke-dasharray")) for p in svg.findall("line")[5:]
    }  # the legend
    svg = ElementTree.fromstring(bars({"a": {str(k): 1.0 for k in range(11)}}, "ms"))
    drawn = [r for r in svg.iter("rect") if r.find("title") is not None]
    assert len({(r.get("fill"), r.get("fill-opacity")) for r in drawn}) == 11
    ElementTree.fromstring(bars({}, "ms"))
    ElementTree.fromstring(lines([], "x", "y"))
