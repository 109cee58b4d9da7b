"""A whole run of `latentrt bench`: cases one after another, and what was found written after each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..errors import BackendUnavailableError, RequestError
from ..runtime.weights import open_checkpoint
from . import report
from .cases import Case, SideSpec
from .features import ClipFeatures, DemoFeatures, Features, demo_prompts
from .gates import Gate
from .host import Host, Job, OwnProcess
from .live import LiveTable
from .machine import describe_machine
from .models import located, too_little
from .nvml import open_nvml
from .results import CaseResult, Report, read_report, write_report
from .run import CaseRun, Plan

__all__ = ["METRICS", "Settings", "Suite", "device_named"]

METRICS = ("psnr", "ssim", "clip", "fid")
_PROMPTS = (
    "an astronaut riding a horse on mars",
    "a cup of coffee on a wooden table by a window in the morning",
    "a lighthouse on a cliff in a storm, oil painting",
    "a red bicycle leaning against a yellow wall",
)


@dataclass(frozen=True)
class Settings:
    """What is asked for, besides cases and sides.

    Attributes:
        prompts: in place of the case's own.
        metrics: of `METRICS`; the first two are always measured.
        clip, truth: folders of a CLIP model and of true pictures.
        out: folder of the report.
        work: folder for random weights, exports and compiled code, kept; a temporary one where None.
        beside: results to show beside.
        command: for the report.
    """

    gate: Gate
    device: torch.device
    out: Path
    command: str
    prompts: Sequence[str] = ()
    metrics: Sequence[str] = METRICS
    clip: Path | None = None
    truth: Path | None = None
    rounds: int = 7
    pictures: int = 4
    seed: int = 0
    work: Path | None = None
    beside: Sequence[Path] = ()


class Suite:
    """Cases to run, and what came of them so far."""

    def __init__(
        self,
        work: Sequence[tuple[Case, list[SideSpec]]],
        settings: Settings,
        open_host: Callable[[Job], Host] | None = None,
    ) -> None:
        unknown = [name for name in settings.metrics if name not in METRICS]
        if unknown:
            raise RequestError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if settings.rounds < 1 or settings.pictures < 1:
            raise RequestError(
                f"{settings.rounds} rounds of {settings.pictures} pictures; both must be at least 1"
            )
        self._work = work
        self._settings = settings
        threads = torch.get_num_threads()
        self._open_host = open_host or (lambda job: OwnProcess(job, threads=threads))
        self._beside = [read_report(path) for path in settings.beside]
        self._results: list[CaseResult] = []
        self._pictures: dict[str, dict[str, list[bytes]]] = {}
        self._load = [os.getloadavg()[0]]
        self._machine = describe_machine()
        nvml = open_nvml(settings.device)
        if nvml is not None:
            self._machine |= {"driver": nvml.driver(), "gpu_state": nvml.state()}

    def run(self) -> Report:
        """Every case; what was measured before an interruption is written all the same, and the interruption goes on.

        Raises:
            KeyboardInterrupt: after the report is written.
        """
        try:
            for case, sides in self._work:
                self._run_case(case, sides)
        except KeyboardInterrupt:
            self._write(complete=False)
            raise
        return self._write(complete=True)

    def _run_case(self, case: Case, sides: list[SideSpec]) -> None:
        settings = self._settings
        reason = too_little(case, sides, settings.device)
        if reason:
            empty = CaseResult(asdict(case), {}, settings.gate.name, None, [], reason)
            self._results.append(empty)
            return
        demo = case.model == "demo"
        prompts = settings.prompts or (demo_prompts(64) if demo else _PROMPTS)
        with tempfile.TemporaryDirectory(prefix="latentrt-bench-") as scratch:
            folder = settings.work or Path(scratch)
            here = located(case, folder)
            with LiveTable(case.name, [side.name for side in sides]) as live:
                run = CaseRun(
                    here,
                    sides,
                    Plan(prompts, settings.gate, settings.rounds, settings.pictures, settings.seed),
                    steps=here.split_steps(open_checkpoint(here.model).config("scheduler")),
                    device=str(settings.device),
                    folder=folder / case.name,
                    open_host=self._open_host,
                    features=self._features(demo),
                    tell=live.tell,
                )
                try:
                    run.measure()
                finally:
                    self._results.append(replace(run.result(), case=asdict(case)))
                    pictures = settings.out / "pictures" / case.name
                    self._pictures[case.name] = report.save_pictures(pictures, run.pictures)
        self._write(complete=False)

    def _features(self, demo: bool) -> Features | None:
        """The network for CLIP score and FID; the demo's knows the demo's world only."""
        settings = self._settings
        if not {"clip", "fid"} & set(settings.metrics):
            return None
        if settings.clip is not None:
            return ClipFeatures(settings.clip, settings.truth)
        return DemoFeatures() if demo else None

    def _write(self, *, complete: bool) -> Report:
        out = self._settings.out
        made = Report(
            command=self._settings.command,
            machine=self._machine,
            seed=self._settings.seed,
            cases=self._results,
            complete=complete,
            conditions={"load": [*self._load, os.getloadavg()[0]]},
        )
        write_report(out / "bench.json", made)
        (out / "bench.md").write_text(report.markdown(made, self._beside), "utf-8")
        (out / "bench.html").write_text(report.html(made, self._pictures, self._beside), "utf-8")
        return made


def device_named(name: str | None) -> torch.device:
    """`cuda` where there is one, else `cpu`, by default.

    Raises:
        BackendUnavailableError: a GPU is asked for and PyTorch sees none.
        RequestError: no such kind of device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise RequestError(f"--device is {name!r}; it can be cpu, cuda or cuda:1 and so on")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"--device is {name!r} and PyTorch {torch.__version__} sees no CUDA device; use --device cpu"
        )
    return torch.device(name)
