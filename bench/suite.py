"""A whole run of `latentrt bench`: cases one after another, with the report written after each."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..errors import RequestError
from ..runtime.weights import open_checkpoint
from .cases import Case, SideSpec, unavailable_reason
from .features import ClipFeatures, MetricNetworks, demo_networks, demo_prompts, read_truth
from .grouping import free_space, group_sides, shortage
from .host import Host, OwnProcess, job_for
from .inception import InceptionFeatures
from .live import LiveTable
from .lpips import Lpips
from .machine import describe_machine
from .models import resolve_models
from .nvml import open_nvml
from .quality import pictures_for_fid
from .report import html, markdown, save_pictures
from .results import CaseResult, Report, read_report, write_report
from .run import CaseRun, Plan
from .worker import Job

__all__ = ["METRICS", "Settings", "Suite"]

METRICS = ("psnr", "ssim", "lpips", "clip", "fid")
_PARTIAL_REPORT = "bench.partial.json"
_METRIC_NEEDS = {
    "lpips": "AlexNet's weights: --lpips FILE",
    "clip": "a CLIP model: --clip DIR",
    "fid": "true pictures and a network that sees them: --truth DIR, and --inception FILE or --clip DIR",
}
_DEFAULT_PROMPTS = (
    "an astronaut riding a horse on mars",
    "a cup of coffee on a wooden table by a window in the morning",
    "a lighthouse on a cliff in a storm, oil painting",
    "a red bicycle leaning against a yellow wall",
)


@dataclass(frozen=True)
class Settings:
    """Options of a run, besides its cases and sides.

    Attributes:
        plan: how much to measure; if it has no prompts, each case uses its own.
        out: folder of the report.
        command: for the report.
        metrics: names of `METRICS`; each must have its weights. If empty, all that have weights are measured. PSNR and
            SSIM always are.
        clip: folder of a CLIP model, for CLIP score.
        inception: file of Inception's weights, for FID; without it FID is over CLIP's features.
        truth: folder of true pictures for FID, or file of their statistics.
        lpips: file of AlexNet's weights.
        work: permanent folder for random weights, exports and compiled code; a temporary one if None.
        beside: files of other results, to show beside these.
        patience: seconds after which a side that does not answer has failed.
    """

    plan: Plan
    device: torch.device
    out: Path
    command: str
    metrics: Sequence[str] = ()
    clip: Path | None = None
    inception: Path | None = None
    truth: Path | None = None
    lpips: Path | None = None
    work: Path | None = None
    beside: Sequence[Path] = ()
    patience: float = 1800.0


class Suite:
    """Cases to run, and their results so far."""

    def __init__(
        self,
        cases: Sequence[tuple[Case, list[SideSpec]]],
        settings: Settings,
        open_host: Callable[[Job], Host] | None = None,
    ) -> None:
        unknown = [name for name in settings.metrics if name not in METRICS]
        if unknown:
            raise RequestError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        plan = settings.plan
        if min(plan.rounds, plan.pictures, plan.builders) < 1 or not settings.patience > 0:
            raise RequestError(
                f"{plan.rounds} rounds of {plan.pictures} pictures, {plan.builders} builders, patience of "
                f"{settings.patience:g} s; each must be above 0"
            )
        if plan.profile and settings.device.type != "cpu":
            raise RequestError(
                "--profile tells a CPU's operators apart; on a GPU take a trace by Nsight Systems"
            )
        self._check_gate(settings)
        self._cases = cases
        self._settings = settings
        threads = torch.get_num_threads()
        self._open_host = open_host or (
            lambda job: OwnProcess(job, threads=threads, patience=settings.patience)
        )
        self._other_reports = [read_report(path) for path in settings.beside]
        self._results: list[CaseResult] = []
        self._pictures: dict[str, dict[str, list[bytes]]] = {}
        self._load = [os.getloadavg()[0]]
        self._started = time.perf_counter()
        self._machine = describe_machine(settings.device)
        nvml = open_nvml(settings.device)
        if nvml is not None:
            self._machine |= {"driver": nvml.driver(), "gpu_state": nvml.state()}

    def run(self) -> Report:
        """Run every case. After an interruption or an error the results so far are written before it is raised again.

        Raises:
            RequestError: the gate cannot judge a case; nothing is measured.
        """
        gate = self._settings.plan.gate
        checked = [(case, sides, self._networks_for(case)) for case, sides in self._cases]
        for case, _, networks in checked:
            if why := gate.refusal(case, networks):
                raise RequestError(f"gate {gate.name!r} cannot judge case {case.name!r}: {why}")
        complete = False
        try:
            for case, sides, networks in checked:
                self._run_case(case, sides, networks)
            complete = True
        finally:
            report = self._report(complete=complete)
            if complete or self._results:
                self._write(report)
        return report

    def _run_case(self, case: Case, sides: list[SideSpec], networks: MetricNetworks) -> None:
        settings = self._settings
        prompts = settings.plan.prompts or (demo_prompts(64) if case.model == "demo" else _DEFAULT_PROMPTS)
        unavailable = {side.name: unavailable_reason(side, settings.device, case.dtype) for side in sides}
        unavailable = {name: why for name, why in unavailable.items() if why}
        available = [side for side in sides if side.name not in unavailable]
        with tempfile.TemporaryDirectory(prefix="latentrt-bench-") as scratch:
            folder = settings.work or Path(scratch)
            reason = "; ".join(f"{name}: {why}" for name, why in unavailable.items())
            if available:
                reason = shortage(case, available, settings.device, folder)
            if reason:
                empty = CaseResult(asdict(case), {}, settings.plan.gate.name, None, [], reason)
                self._results.append(empty)
                return
            local_case = resolve_models(case, folder, settings.device)
            device, keep_builds = str(settings.device), settings.work is not None
            jobs = [
                job_for(local_case, side, device, folder / case.name) for side in available if side.builds
            ]
            built = {job.side.name for job in jobs if job.is_built()}
            free = free_space(settings.device, folder, keep_builds=keep_builds)
            with LiveTable(case.name, [side.name for side in sides]) as live:
                run = CaseRun(
                    local_case,
                    sides,
                    replace(settings.plan, prompts=prompts),
                    steps=local_case.split_steps(open_checkpoint(local_case.model).config("scheduler")),
                    device=device,
                    folder=folder / case.name,
                    open_host=self._open_host,
                    networks=networks,
                    on_progress=live.update,
                    on_result=lambda: self._write_partial(replace(run.result(), case=asdict(case))),
                    grouping=group_sides(local_case, available, free, built),
                    unavailable=unavailable,
                    keep_builds=keep_builds,
                )
                try:
                    run.measure()
                finally:
                    self._results.append(replace(run.result(), case=asdict(case)))
                    pictures = settings.out / "pictures" / case.name
                    self._pictures[case.name] = save_pictures(pictures, run.pictures)
        self._write(self._report(complete=False))

    def _write_partial(self, so_far: CaseResult) -> None:
        """Save the results so far, in case the process is killed; pictures are saved when the case ends.

        They have a file of their own, so that an earlier run's report stays whole until this run has a whole one.
        """
        report = replace(self._report(complete=False), cases=[*self._results, so_far])
        write_report(self._settings.out / _PARTIAL_REPORT, report)

    @staticmethod
    def _check_gate(settings: Settings) -> None:
        """Check that the gate has what it needs, before hours are spent on pictures that it cannot judge.

        Raises:
            RequestError: something is missing.
        """
        gate = settings.plan.gate
        missing = [f"--{name}" for name in gate.required_settings if getattr(settings, name) is None]
        if missing:
            raise RequestError(f"gate {gate.name!r} cannot judge without {', '.join(missing)}")
        if settings.plan.pictures < gate.min_pictures:
            raise RequestError(
                f"gate {gate.name!r} judges {gate.min_pictures} pictures, and --pictures is {settings.plan.pictures}"
            )
        prompts = len(settings.plan.prompts)
        # Without prompts the case's own few would be used in turn.
        if max(prompts, 1) < gate.min_pictures:
            raise RequestError(
                f"gate {gate.name!r} judges {gate.min_pictures} pictures, each of a prompt of its own, and there are "
                f"{prompts} prompts; give them by --prompts"
            )
        missing = [name for name in gate.networks if settings.metrics and name not in settings.metrics]
        if missing:
            raise RequestError(
                f"gate {gate.name!r} judges by {' and '.join(missing)}; give --metric for it, or for none"
            )
        if settings.inception is not None and settings.truth is None:
            raise RequestError("--inception is for FID, which needs true pictures: give --truth as well")

    def _networks_for(self, case: Case) -> MetricNetworks:
        """The networks of the weights that were given. The demo's own networks are only for the demo's world.

        Raises:
            RequestError: a metric that was requested by name has no network or too few pictures.
        """
        s = self._settings
        networks = (
            demo_networks() if case.model == "demo" and _needs_networks(s.metrics) else MetricNetworks()
        )
        if s.clip is not None:
            clip = ClipFeatures(s.clip)
            networks = replace(networks, clip=clip)
            if s.truth is not None:
                networks = replace(networks, fid=clip, truth=None)
        if s.inception is not None:
            networks = replace(networks, fid=InceptionFeatures(s.inception), truth=None)
        if networks.fid is not None and networks.truth is None and s.truth is not None:
            networks = replace(networks, truth=read_truth(s.truth, networks.fid))
        if s.lpips is not None:
            networks = replace(networks, lpips=Lpips(s.lpips))
        for name, needed in _METRIC_NEEDS.items():
            if name in s.metrics and getattr(networks, name) is None:
                raise RequestError(f"metric {name!r} of case {case.name!r} needs {needed}")
            if s.metrics and name not in s.metrics:
                networks = replace(networks, **{name: None})
        if "fid" in s.metrics and networks.fid is not None and networks.truth is not None:
            least, planned = pictures_for_fid(len(networks.truth.mean)), max(s.plan.pictures, *case.batches)
            if planned < least:
                raise RequestError(
                    f"metric 'fid' of case {case.name!r} by {networks.fid.name} takes at least {least} pictures, and "
                    f"there are {planned}; give --pictures {least}"
                )
        return networks

    def _report(self, *, complete: bool) -> Report:
        return Report(
            command=self._settings.command,
            machine=self._machine,
            seed=self._settings.plan.seed,
            cases=self._results,
            complete=complete,
            conditions={"load": [*self._load, os.getloadavg()[0]]},
            seconds=time.perf_counter() - self._started,
        )

    def _write(self, report: Report) -> None:
        out = self._settings.out
        write_report(out / "bench.json", report)
        (out / "bench.md").write_text(markdown(report, self._other_reports), "utf-8")
        (out / "bench.html").write_text(html(report, self._pictures, self._other_reports), "utf-8")
        (out / _PARTIAL_REPORT).unlink(missing_ok=True)


def _needs_networks(metrics: Sequence[str]) -> bool:
    return not metrics or not {"clip", "fid"}.isdisjoint(metrics)
