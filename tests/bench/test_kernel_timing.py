"""Measuring and tuning dry: all but the GPU. Kernels run in Triton's interpreter, and the clock is a fake."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentrt import cli
from latentrt.bench import kernel_timing, kernel_tuning, verdicts
from latentrt.bench import kernels as timings
from latentrt.bench.kernel_timing import LOST, Timing
from latentrt.errors import BackendUnavailableError
from latentrt.kernels import aot, tuning
from latentrt.kernels._triton import forced
from latentrt.kernels.registry import Case, OpSpec, specs

ATTENTION = specs(["attention"])[0]
SMALL = [
    {"BLOCK_M": 16, "BLOCK_N": n, "num_warps": 4, "num_stages": 1} for n in (48, 16, 32)
]  # 48 cannot be compiled
SMALL_WIDE = [{**small, "BLOCK_D": 64, "BLOCK_V": 64} for small in SMALL]
FIRST, SECOND = "attention, one", "attention, two"
FALLEN = "neither a kernel of ours ran nor the libraries in its place"


def small_attention(**changes: Any) -> OpSpec:
    def inputs(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        return torch.randn(1, 20, 3, 1, 64, dtype=dtype, device=device).unbind(2)

    def fails(*_: object) -> None:
        raise RuntimeError("no such back end")

    # The second is called so often that it is the greater part of a forward.
    fields = {
        **vars(ATTENTION),
        "cases": [Case(name, inputs, 1e6, 5120, calls) for name, calls in (("one", 1), ("two", 3))],
        "candidates": {"attention_wide": SMALL_WIDE, "attention": SMALL},
        "baselines": {"itself": ATTENTION.reference, "broken": fails},
        **changes,
    }
    return OpSpec(**fields)


def fake_timer(
    calls: Mapping[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]], seconds: float
) -> dict[str, float | str]:
    """Runs each once; blocks of 32 are the quickest."""
    trial = next((c for name, c, _ in tuning._trials if name == "attention"), {})
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            for args in inputs:
                call(*args)
            found[name] = 10.0 if trial.get("BLOCK_N") == 32 else 19.0
        except RuntimeError as error:
            found[name] = f"RuntimeError: {error}"
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timing:
    machine = {"gpu": "A Fake", "commit": "c", "versions": {}}
    for module in (kernel_timing, verdicts):
        monkeypatch.setattr(module, "describe_machine", lambda: machine)
    return Timing(torch.device("cpu"), fake_timer, folder=tmp_path / "results")


BF16 = [torch.bfloat16]


def test_measuring(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate, launches counted, baselines that fail; what takes the most first."""
    path = here.folder / "kernels-a-fake.json"
    monkeypatch.setattr(sys, "argv", ["cli.py", "kernels", "--measure", "--out", "a folder"])
    with forced(), tuning.trying("attention", SMALL[1]):
        none = timings.measure(Timing(here.device, fake_timer, -1.0, here.folder), [small_attention()], BF16)
        assert none["rows"] == []
        assert none["left"] == [["attention", "two", "bfloat16"], ["attention", "one", "bfloat16"]]
        assert verdicts.of_kernels(here.folder) == (True, "2 left")
        result = timings.measure(here, [small_attention()], BF16)
    assert json.loads(path.read_text()) == result
    assert verdicts.of_kernels(here.folder) == (True, "")
    assert [row["case"] for row in result["rows"]] == ["two", "one"]
    assert result["left"] == []
    assert {"gpu", "commit", "versions", "sources", "tuned", "command"} <= result["machine"].keys()
    assert result["machine"]["command"] == "latentrt kernels --measure --out 'a folder'"
    row = result["rows"][0]
    assert row["correct"]
    assert row["launches"] == {"_attention": 1}
    assert row["tflops"] == pytest.approx(1e6 / 19e-6 / 1e12)
    assert row["share"] == pytest.approx(row["tflops"] / result["ceilings"]["bfloat16"])
    assert row["baselines"] == {"itself": 19.0, "broken": "RuntimeError: no such back end"}
    assert row["speedup_over_best"] == 1.0
    table = list(timings.lines(result))
    assert table[1].split() == [
        "attention,",
        "two,",
        "bfloat16",
        "19.0",
        "0",
        "TFLOP/s",
        f"{row['share']:.0%}",
        "1.00x",
        "itself",
    ]
    assert table[-1] == "0 left"
    copied = {**result, "rows": [{**row, "tflops": 0.0, "tbs": 3.4567, "share": 0.8}]}
    assert "3457 GB/s    80%" in list(timings.lines(copied))[1]
    assert "in bfloat16; copies" in table[-2]


def test_measuring_goes_on_where_it_stopped(here: Timing) -> None:
    """A row that failed or was interrupted is run again, one that took the process along is not."""
    path = here.folder / "kernels-a-fake.json"
    calls: list[object] = []

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def died(*args: Any) -> None:
        calls.append(args)
        raise SystemExit

    with forced(), tuning.trying("attention", SMALL[1]):
        with pytest.raises(KeyboardInterrupt):
            timings.measure(here, [small_attention(op=interrupted)], BF16)
        left = json.loads(path.read_text())
        assert (left["rows"], [case for _, case, _ in left["left"]]) == ([], ["two", "one"])
        with pytest.raises(SystemExit):
            timings.measure(here, [small_attention(op=died)], BF16)
        assert [row["error"] for row in json.loads(path.read_text())["rows"]] == [LOST]
        fallen = timings.measure(here, [small_attention(op=ATTENTION.reference)], BF16)
        assert [row["error"] for row in fallen["rows"]] == [LOST, FALLEN]
        result = timings.measure(here, [small_attention()], BF16)
        assert [(row["case"], "us" in row) for row in result["rows"]] == [("two", False), ("one", True)]
        again = timings.measure(here, [small_attention(op=died)], BF16)
    assert again["rows"] == result["rows"]
    assert len(calls) == 1


def test_a_wrong_kernel_is_not_timed(here: Timing) -> None:
    def wrong(*args: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ATTENTION.op(*args)
        return out * 1.1

    with forced(), tuning.trying("attention", SMALL[1]):
        result = timings.measure(here, [small_attention(op=wrong)], BF16)
    assert [row["error"] for row in result["rows"]] == ["wrong result"] * 2
    found = verdicts.of_kernels(here.folder)
    assert not found.passed
    assert found.why.startswith("2 of 2 without a time: attention, two, bfloat16: wrong result; ")
    assert not any("us" in row for row in result["rows"])


def test_each_part_of_a_row_has_its_own_time(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a baseline is no reason to think that a kernel hangs."""
    begun: list[str] = []

    @contextmanager
    def watched(_: Timing) -> Iterator[None]:
        begun.append("")
        yield

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: torch.Tensor) -> torch.Tensor:
            begun[-1] += name
            out: torch.Tensor = ATTENTION.op(*args)
            return out

        return call

    monkeypatch.setattr(timings, "watched", watched)
    with forced(), tuning.trying("attention", SMALL[1]):
        spec = small_attention(op=noted("o"), baselines={"a": noted("a"), "b": noted("b")})
        result = timings.measure(here, [spec], BF16)
    assert all("us" in row for row in result["rows"])
    assert begun == ["o", "", "a", "b", "oab"] * 2


def test_a_lost_gpu_ends_the_run(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "answers", lambda _: False)
    result = timings.measure(here, [small_attention()], BF16)  # not forced: no kernel of ours runs
    assert len(result["rows"]) == 1
    assert result["left"] == [["attention", "one", "bfloat16"]]
    assert verdicts.of_kernels(here.folder).why.endswith(f"{FALLEN}; 1 left")


def test_tuning(here: Timing) -> None:
    """The quickest over both cases that share a key; what does not compile is passed over."""
    with forced():
        result = kernel_tuning.tune(here, [small_attention()], save=False)
    assert result["best"] == {"attention": {"16/d64-short": SMALL[2]}}
    assert result["left"] == []
    broken, slow, quick = (result["times"]["attention"]["16/d64-short"][json.dumps(c)] for c in SMALL)
    assert (slow, quick) == ({FIRST: 19.0, SECOND: 57.0}, {FIRST: 10.0, SECOND: 30.0})
    assert list(broken) == [FIRST]  # and not tried again at the other
    assert "power of 2" in broken[FIRST]
    assert list(kernel_tuning.lines(result)) == [
        f"attention 16/d64-short: {json.dumps(SMALL[2])}, 40.0 us in one forward",
        "left: none",
    ]


def test_the_library_may_be_the_quickest(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held against float64 and timed as any other candidate, is written down, and is said to be what runs."""

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        found = fake_timer(calls, inputs, seconds)
        by_library = ("attention", tuning.LIBRARY) in [(table, row) for table, row, _ in tuning._trials]
        return dict.fromkeys(found, 5.0) if by_library else found

    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args))
    spec = small_attention(candidates={"attention": [tuning.LIBRARY, *SMALL[1:]]})
    with forced():
        result = kernel_tuning.tune(Timing(here.device, timer, folder=here.folder), [spec])
        assert [args[2] for args in saved] == [{"16/d64-short": {"LIBRARY": 1}}]
        assert 'attention 16/d64-short: {"LIBRARY": 1}, 20.0 us' in next(kernel_tuning.lines(result))
        with tuning.trying("attention", tuning.LIBRARY):
            measured = timings.measure(here, [spec], BF16)
    assert [row["launches"] for row in measured["rows"]] == [{"library: attention": 1}] * 2
    assert next(line for line in timings.lines(measured) if "two" in line).endswith(
        "; by PyTorch's libraries"
    )


def test_tuning_goes_on_where_it_stopped(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the candidate that hung, not past one that was interrupted; nothing is written down before all cases were
    timed."""
    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args))
    timed: list[int] = []

    def stops(*args: Any) -> dict[str, float | str]:
        timed.append(tuning._trials[-1][1]["BLOCK_N"])
        if timed == [16, 16, 32]:
            raise SystemExit  # as if the process had been ended
        if timed == [16]:
            raise KeyboardInterrupt
        return fake_timer(*args)

    with forced():
        for ended in (KeyboardInterrupt, SystemExit):
            with pytest.raises(ended):
                kernel_tuning.tune(Timing(here.device, stops, folder=here.folder), [small_attention()])
        assert not saved
        assert verdicts.of_tuning(here.folder) == (True, "left: attention")
        assert verdicts.is_left(here.folder, "tuning")
        result = kernel_tuning.tune(Timing(here.device, stops, folder=here.folder), [small_attention()])
    assert timed == [16, 16, 32, 16]  # the other case of the one that is left
    times = result["times"]["attention"]["16/d64-short"]
    assert times[json.dumps(SMALL[2])] == {FIRST: LOST}
    arch, table, best, measured_on = saved[0]
    assert (arch, table, best) == (80, "attention", {"16/d64-short": SMALL[1]})
    assert measured_on["gpu"] == "A Fake"
    assert verdicts.of_tuning(here.folder) == (True, "")
    assert not verdicts.is_left(here.folder, "tuning")
    assert verdicts.is_left(here.folder, "kernels")  # which nobody has timed


@pytest.fixture
def block_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Copies of kernels/tuned: the one that kernels read, and the one that an earlier run left."""
    folders = tmp_path / "read", tmp_path / "left"
    for folder in folders:
        shutil.copytree(tuning.FOLDER, folder)
    monkeypatch.setattr(tuning, "FOLDER", folders[0])
    return folders


def leave(folder: Path, table: str, rows: dict[str, Any], measured_on: dict[str, Any]) -> None:
    """As a run leaves its block sizes of sm_90."""
    file = folder / "sm_90.json"
    content = json.loads(file.read_text())
    content["tables"].setdefault(table, {}).update(rows)
    content["measured_on"][table] = {**measured_on, "keys": sorted(rows)}
    file.write_text(json.dumps(content))


NEW = dict(ATTENTION.candidates["attention"][-1])
KEY = "16/d64"


def test_block_sizes_of_an_earlier_run_are_taken(block_sizes: tuple[Path, Path]) -> None:
    """The sources came anew, and with them what is reasoned."""
    read, left = block_sizes
    before = {path.name: path.read_text() for path in read.iterdir()}
    assert kernel_tuning.take_tuned(left.parent / "none") == []
    assert kernel_tuning.take_tuned(left) == []  # nothing is measured there
    assert {path.name: path.read_text() for path in read.iterdir()} == before
    measured = {"gpu": "A", "sources": kernel_timing.sources()}
    leave(left, "attention", {KEY: NEW}, measured)
    assert kernel_tuning.take_tuned(left) == ["attention of sm_90"]
    assert tuning.constants("attention", 90, torch.float16, "d64") == NEW
    found = tuning.load(90)
    assert found["measured_on"] == {"attention": {**measured, "keys": [KEY]}}
    reasoned = json.loads(before["sm_90.json"])["tables"]
    assert {**found["tables"]["attention"], KEY: None} == {**reasoned["attention"], KEY: None}
    assert {k: v for k, v in found["tables"].items() if k != "attention"} == {
        k: v for k, v in reasoned.items() if k != "attention"
    }
    assert kernel_tuning.take_tuned(left) == []


def test_block_sizes_of_other_sources_or_forms_are_not_taken(block_sizes: tuple[Path, Path]) -> None:
    read, left = block_sizes
    before = tuning.load(90)
    leave(left, "attention", {KEY: NEW}, {"gpu": "A", "sources": "others"})
    for arch, text in {
        80: '{"arch": 80, "tab',
        86: "[]",
        89: '{"arch": 89}',
        100: '{"tables": {}, "measured_on": {"attention": {"sources": "%s", "keys": ["16/d64"]}}}',
        120: '{"tables": {}, "measured_on": {"attention": 7}}',
    }.items():
        (left / f"sm_{arch}.json").write_text(text.replace("%s", kernel_timing.sources()))
    (left / "sm_70.json").write_text("{}")
    assert kernel_tuning.take_tuned(left) == []
    assert tuning.load(90) == before
    assert {path.name for path in read.iterdir()} == {f"sm_{arch}.json" for arch in tuning.architectures()}


def test_operators_that_share_a_table_are_tuned_together() -> None:
    uses = kernel_tuning._tables(specs(["group_norm", "group_norm_silu"]), 90)["group_norm"]
    assert {use.spec.name for use in uses} == {"group_norm", "group_norm_silu"}
    assert {use.key for use in uses} == {"16/channels_last"}


def test_levels_of_the_unet_are_tuned_apart() -> None:
    """Of 4,096 tokens and of 1,024, and a text's keys: each chooses its own block sizes."""
    uses = kernel_tuning._tables(specs(["attention"]), 90)["attention"]
    keys = {use.case.name.partition(",")[0]: use.key for use in uses}
    assert keys == {
        "self 4096 x 10 heads": "16/d64-long",
        "self 1024 x 20 heads": "16/d64",
        "cross 4096 x 77": "16/d64-short",
        "cross 1024 x 77": "16/d64-short",
    }


def test_both_variants_of_a_kernel_are_tried() -> None:
    tried = {
        launch.kernel.name
        for r in kernel_tuning.tuned_requests(specs(["attention", "linear_geglu"]), 90)
        for launch in aot._launches(r)
    }
    assert tried == {
        "_attention",
        "_attention_wide",
        "_attention_tma",
        "_exponentials",
        "_geglu_kernel",
        "_linear_geglu_kernel",
        "_linear_geglu_tma_kernel",
    }


def test_no_candidate_runs(here: Timing, caplog: pytest.LogCaptureFixture) -> None:
    with forced():
        result = kernel_tuning.tune(here, [small_attention(candidates={"attention": SMALL[:1]})])
    assert (result["best"], result["left"]) == ({}, ["attention"])
    assert "no candidate of attention runs in all cases" in caplog.text


class FakeEvent:
    """Events of a GPU whose every replay takes as long as the graph says."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, stop: FakeEvent) -> float:
        return stop.at - self.at


def test_the_timer_replays_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds of a replay of two calls, to microseconds of one; what cannot be recorded is told of."""
    recorded: list[object] = []
    replays: list[float] = []

    class FakeGraph:
        def replay(self) -> None:
            replays.append(self.ms)  # type: ignore[attr-defined]
            FakeEvent.now += self.ms  # type: ignore[attr-defined]

    @contextmanager
    def capture(graph: Any, stream: object) -> Iterator[None]:
        recorded.clear()
        yield
        graph.ms = sum(recorded)  # type: ignore[arg-type]

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": on,
        "graph": capture,
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def fails(*_: object) -> None:
        raise ValueError("not for this shape")

    calls = {"ours": recorded.append, "theirs": lambda ms: recorded.append(3 * ms), "none": fails}
    assert kernel_timing.cuda_microseconds(calls, [(0.5,), (1.5,)], 0.0) == {
        "ours": pytest.approx(1000.0),
        "theirs": pytest.approx(3000.0),
        "none": "ValueError: not for this shape",
    }
    assert replays == [2.0, 6.0] * 7


def test_a_dry_run_compiles_what_the_real_one_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[aot.Request] = []

    def attempts(requests: list[aot.Request], processes: int, seconds: float) -> list[Any]:
        asked.extend(requests)
        return ["does not compile", *[[] for _ in requests[1:]]]

    monkeypatch.setattr(aot, "attempts", attempts)
    assert cli.main(["kernels", "--measure", "--dry-run", "--op", "attention", "--arch", "sm_90"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"op": "attention", "trial": None, "error": "does not compile"}
    assert len(rows) == len(asked) == 2 * len(ATTENTION.cases)
    assert cli.main(["kernels", "--tune", "--dry-run", "--op", "attention"]) == 0
    assert all(r.trial for r in asked[len(rows) :])
    asked.clear()
    capsys.readouterr()
    command = ["kernels", "--dry-run", "--op", "attention", "--dtype", "float16"]
    assert cli.main([*command, "--measure"]) == 0
    assert {r.args[0].dtype for r in asked} == {torch.float16}
    assert cli.main([*command, "--tune"]) == 1
    assert "--tune finds what serves both half types, by bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--tune", "--measure"])


def test_timing_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="timed on a CUDA GPU"):
        kernel_timing.require_gpu()
    assert cli.main(["kernels", "--measure"]) == 1
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_the_command_says_what_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"op": "geglu", "case": "one", "dtype": "bfloat16", "us": 1.0, "tflops": 0, "tbs": 1, "share": 0.5}
    good |= {"baselines": {}, "launches": {"_geglu_kernel": 1}}
    bad = {"op": "geglu", "case": "two", "dtype": "bfloat16", "error": "wrong result"}
    result: dict[str, Any] = {"rows": [good], "left": [], "ceilings": {"copy": 4.0}}
    monkeypatch.setattr(kernel_timing, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(timings, "measure", lambda *_: result)
    assert cli.main(["kernels", "--measure"]) == 0
    result["rows"].append(bad)
    capsys.readouterr()
    assert cli.main(["kernels", "--measure"]) == 1
    out, err = capsys.readouterr()
    assert "geglu, one" in out
    assert "1 of 2 without a time: geglu, two, bfloat16: wrong result" in err


def test_a_hang_is_given_up() -> None:
    """In a process of its own, because it ends it."""
    import subprocess
    import sys

    program = (
        "import time, torch\n"
        "from latentrt.bench import kernel_timing as t\n"
        "with t.watched(t.Timing(torch.device('cuda'), None), 0.2): time.sleep(3600)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
