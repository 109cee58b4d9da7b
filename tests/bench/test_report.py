"""Results: written, read again, and shown."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
from helpers.planted_reports import MACHINE, noisy, report, row, with_figures
from helpers.planted_sides import planted
from latentrt.bench import report as reports
from latentrt.bench.cases import Case
from latentrt.bench.compare import compare
from latentrt.bench.gates import GATES, Quality
from latentrt.bench.live import LiveTable
from latentrt.bench.machine import RESULTS
from latentrt.bench.plots import bars, lines
from latentrt.bench.results import Report, read_report, write_report
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import as_bytes
from latentrt.bench.stats import growth, median, ratio
from latentrt.bench.worker import Worker
from latentrt.cli import build_parser
from latentrt.errors import BenchmarkError
from rich.console import Console

Run = Callable[..., tuple[int, str, str]]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = report()
    write_report(tmp_path / "new" / "a.json", made)
    read = read_report(tmp_path / "new" / "a.json")
    again = json.loads(json.dumps(asdict(made)))
    assert json.loads(json.dumps(asdict(read))) == again
    assert isinstance(read.cases[0].rows[0].batches[0].median.value, float)
    assert json.loads((tmp_path / "new" / "a.json").read_text())["schema"] == 3


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    write_report(tmp_path / "a.json", report(quality=Quality(1, float("-inf"), -1.0)))
    assert "Infinity" not in (tmp_path / "a.json").read_text()
    assert np.isnan(read_report(tmp_path / "a.json").cases[0].rows[1].quality.psnr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no results of `latentrt bench`"),
        ('{"schema": 1, "rows": []}', "holds no results of `latentrt bench`"),
        (
            '{"benchmark": "latentrt bench", "schema": 99}',
            "has schema 99 and this version reads 2 and 3; measure again",
        ),
        ('{"benchmark": "latentrt bench", "schema": 3}', "is damaged: .*Report lacks command"),
        (
            '{"benchmark": "latentrt bench", "schema": 3, "command": "", "machine": {}, "seed": 0, "cases": 3}',
            "is damaged",
        ),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_report(tmp_path / "x.json")


def test_published_results_of_schema_2_are_read() -> None:
    """Its other fields are of the same rounds."""
    path = RESULTS / "demo_bench_xeon.json"
    written, read = json.loads(path.read_text()), read_report(path)
    assert written["schema"] == 2
    for case, rows in zip(read.cases, (case["rows"] for case in written["cases"]), strict=True):
        for made, theirs in zip(case.rows, rows, strict=True):
            assert all(case.is_interleaved(made, figures.batch) for figures in made.batches)
            for figures, old in zip(made.batches, theirs["batches"], strict=True):
                assert asdict(figures.median) == pytest.approx(old["latency"]["median"])
                assert figures.memory.growths["resident"] == old["memory"]["growth"]


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


def cells(text: str, head: str, side: str = "latentrt-eager") -> dict[str, str]:
    """The side's row of the Markdown table that begins with `head`."""
    lines = iter(text.splitlines())
    names = next(line for line in lines if line.startswith(f"| {head} |"))
    values = next(line for line in lines if line.startswith(f"| {side} |"))
    split = ([cell.strip() for cell in line.strip("|").split("|")] for line in (names, values))
    return dict(zip(*split, strict=True))


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
            live.tell("ours", "round 3 of 9")
        drawn = console.file.getvalue()
        assert ("round 3 of 9" in drawn) == terminal
        assert ("waiting" in drawn) == terminal
        assert ("\x1b[?25h" in drawn) == terminal  # the cursor is back


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
    monkeypatch.setattr("latentrt.bench.room._free_memory", lambda device: 4 << 30)
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


def test_statistics() -> None:
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 21)  # of the machine, which meets both sides
    found = ratio(list(2 * drift * rng.normal(1, 0.01, 21)), list(drift * rng.normal(1, 0.01, 21)))
    assert 1.97 < found.low < 2 < found.high < 2.03
    assert (median([1.0]).low, median([1.0]).value) == (1, 1)
    assert growth([5, 7, 9, 400, 13]) == pytest.approx(2.0)
    assert growth([5, 9, 15, 400, 19], at=[0, 2, 5, 6, 7]) == pytest.approx(2.0)
    assert growth([5]) == 0
    assert median([1.0] * 3000).cover == pytest.approx(0.95, abs=0.005)
    with pytest.raises(ValueError, match="3 rounds beside 2"):
        ratio([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("rounds", "cover"),
    [(3, 0.75), (5, 0.9375), (6, 0.96875), (7, 0.984375), (9, 0.9609375), (15, 0.96484375)],
)
def test_intervals_cover_what_they_say(rounds: int, cover: float) -> None:
    """The true ratio lies in the interval as often as it tells, by simulation of times with a long tail."""
    rng = np.random.default_rng(rounds)
    inside = 0
    for times in rng.lognormal(0, 0.3, (2000, 2, rounds)):
        found = ratio(list(2 * times[0]), list(times[1]))
        inside += found.low <= 2 <= found.high
    assert found.cover == cover
    assert inside / 2000 == pytest.approx(cover, abs=3 * (cover * (1 - cover) / 2000) ** 0.5)


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
