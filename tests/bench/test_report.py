"""`bench/report.py` and `live.py`: results as text and as a page, and what a terminal shows meanwhile."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import PIL.Image
from helpers.planted_reports import MACHINE, noisy, report, row
from latentrt.bench import report as reports
from latentrt.bench.live import LiveTable
from latentrt.bench.side import as_bytes
from rich.console import Console


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_beside_it() -> None:
    made = report(status="invalid", reason="PSNR <12> dB", batches=[])
    page = reports.html(made, {"demo": {"diffusers": [b"jpeg"], "latentrt-eager": [b"jpeg"]}}, [report()])
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert len(tags.links) == 2
    assert page.count("<svg") == 2  # stages and memory; there is one batch size
    assert "PSNR &lt;12&gt; dB" in page
    assert "the &lt;demo&gt;" in page
    assert "<code>latentrt bench</code>" in page
    assert "Quickest" not in page  # what is invalid is not
    assert re.search(r"Quickest: latentrt-eager, (1\.9|2\.0)", reports.html(report(), {}))
    assert "Quickest" not in reports.html(report(2.1, 2.0), {})  # the first one is
    assert "Quickest" not in reports.html(report(2.0, 2.0), {})
    assert "Quickest" not in reports.html(report(rounds=5), {})  # too few for an interval
    assert "Quickest" in reports.html(report(rounds=6), {})
    nobody = replace(made.cases[0], rows=[made.cases[0].rows[1]])
    assert "<svg" not in reports.html(replace(made, cases=[nobody]), {})
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page)


def test_sides_of_a_result_without_groups_were_interleaved() -> None:
    """Results that are older than groups have none."""
    case = replace(report().cases[0], groups=[])
    assert case.is_interleaved(case.rows[1], 1)
    assert "not interleaved" not in reports.markdown(replace(report(), cases=[case]))


def test_a_case_that_options_changed_is_named_once() -> None:
    made = report()
    assert "## demo: the <demo>\n" in reports.markdown(made)
    changed = {**made.cases[0].case, "summary": "demo with size 64x64"}
    text = reports.markdown(replace(made, cases=[replace(made.cases[0], case=changed)]))
    assert "## demo with size 64x64\n" in text


def test_the_quickest_side_is_quicker_than_the_next_beyond_noise() -> None:
    base = noisy(2.0)

    def quickest(*seconds: list[float], groups: list[list[str]] | None = None) -> str:
        sides = [row(name, each, base) for name, each in zip(("a", "b", "c"), seconds, strict=False)]
        groups = [["diffusers", "a", "b", "c"]] if groups is None else groups
        made = replace(report().cases[0], rows=[row("diffusers", base, base), *sides], groups=groups)
        (text,) = re.findall(r"Quickest: [^<]*", reports.html(replace(report(), cases=[made]), {}))
        return text

    drift = [1 + 0.02 * k for k in range(15)]  # of the machine, in all sides of a round
    a, b, c = ([s * d for s, d in zip(noisy(1.0, seed=k), drift, strict=True)] for k in (1, 2, 4))
    near = [1.02 * seconds for seconds in a]
    assert re.search(r"^Quickest: a, [^;]*; not different beyond noise: b\.$", quickest(a, b))
    assert re.search(r"^Quickest: a, [^;]*\.$", quickest(a, near))  # in every round
    # Of rounds at other times the drift is noise too.
    apart = [["diffusers", "a"], ["diffusers", "b"]]
    assert re.search(r"not different beyond noise: b\.$", quickest(a, near, groups=apart))
    assert "not different" not in quickest(a, [1.5 * seconds for seconds in a], groups=apart)
    assert re.search(r"^Quickest: c, [^;]*; not different beyond noise: a, b\.$", quickest(a, b, c))


def test_the_quickest_side_is_said_to_be_not_interleaved_and_drift_decides_nothing() -> None:
    base = noisy(2.0)
    groups = [["diffusers"], ["a"], ["b"]]

    def quickest(a: float, b: float) -> str | None:
        sides = [row(name, noisy(each, seed=k), base) for k, (name, each) in enumerate((("a", a), ("b", b)))]
        made = replace(report().cases[0], rows=[row("diffusers", base, base), *sides], groups=groups)
        page = reports.html(replace(report(), cases=[made]), {})
        return next(iter(re.findall(r"Quickest: [^<]*", page)), None)

    marked = r"^Quickest: a, [0-9.]+ times as fast as diffusers \([0-9.]+ to [0-9.]+, not interleaved\)"
    assert re.search(marked + r"; not different beyond noise: b\.$", quickest(1.0, 1.2))
    assert re.search(marked + r"\.$", quickest(1.0, 1.4))
    assert quickest(1.8, 2.5) is None  # 1.11 times as fast, as one side may be an hour later
    groups = [
        ["diffusers", "b"],
        ["a"],
    ]  # where b is quicker in each round, a may be beyond it by drift alone
    assert re.search(
        r"^Quickest: b, 1\.[12]\d* times .*; not different beyond noise: a\.$", quickest(1.65, 1.7)
    )


def test_figures_name_their_block_sizes() -> None:
    """Of a GPU: the commit does not tell of them."""
    tuned = report(machine={**MACHINE, "gpu": "H200", "tuned": "0123abcd"})
    assert "Block sizes of kernels: 0123abcd, by the digest of `kernels/tuned`\n" in reports.markdown(tuned)
    assert "Block sizes" not in reports.markdown(report())


def test_few_pictures_are_kept_and_the_page_has_them_reduced(tmp_path: Path) -> None:
    """Noise, as random weights make it, which no format packs."""
    noise = np.random.default_rng(0).random((6, 512, 768, 3), np.float32)
    kept = reports.save_pictures(tmp_path, {"a": noise, "b": noise[:2]})
    assert {side: len(files) for side, files in kept.items()} == {"a": 4, "b": 2}
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        *(f"a-{k}.png" for k in range(4)),
        "b-0.png",
        "b-1.png",
    ]
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "a-3.png")), as_bytes(noise[3:4])[0])
    for data in kept["a"]:
        assert PIL.Image.open(BytesIO(data)).size == (256, 171)
        assert len(data) < 100_000


def test_results_beside_say_what_is_not_the_same() -> None:
    assert "Beside it: a, 2 threads, 8 GiB:" in reports.markdown(report(), [report()])
    other = replace(report(machine={**MACHINE, "commit": "d", "versions": {"torch": "3"}}), seed=5)
    other.cases[0].case["steps"] = 20
    told = "(here and there: steps 30 and 20; commit c and d; torch 2 and 3; seed 0 and 5)"
    assert told in reports.markdown(report(), [other])
    assert told in reports.html(report(), {}, [other])


def test_a_terminal_sees_what_each_side_is_at() -> None:
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=60)
        with LiveTable("demo", ["diffusers", "ours"], console) as live:
            live.update("ours", "round 3 of 9")
        drawn = console.file.getvalue()
        assert ("round 3 of 9" in drawn) == terminal
        assert ("waiting" in drawn) == terminal
        assert ("\x1b[?25h" in drawn) == terminal  # the cursor is back
