"""latentrt as a side of the benchmark, on one of its back ends.

In eager PyTorch its modules stand in for diffusers' where that is not installed, so they run as people run those:
without CUDA graphs, each network in the layout that is faster, and on a GPU with a float16 model's VAE in bfloat16, as
both diffusers' side and the Triton back end decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..runtime.engines.base import Component, Engine
from ..runtime.engines.eager import EagerBackend, EagerEngine
from ..runtime.parts import load_parts
from ..runtime.pipeline import Pipeline
from .cases import Case, reference_side
from .monitor import Span
from .side import Layout, Side, SideOutput, choose_layout, layout_text, now, try_convolutions, vae_in

__all__ = ["open_side"]


class LatentrtSide(Side):
    """One pipeline; engines are loaded by the first call."""

    def __init__(self, case: Case, pipe: Pipeline) -> None:
        self._case = case
        self._pipe = pipe
        convolutions = try_convolutions(pipe.device) if pipe.backend in ("eager", "triton") else ""
        self.settings = f"back end {pipe.backend}, {vae_in(pipe.vae.dtype)}{convolutions}"

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        case = self._case
        height, width = case.size or (None, None)
        result = self._pipe(
            list(prompts),
            seed=list(seeds),
            height=height,
            width=width,
            negative_prompt=case.negative,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            high_noise_frac=case.high_noise_frac,
            output_type="np",
        )
        return SideOutput(result.images, _spans(result.timings, now(self._pipe.device)))


class _Eager(LatentrtSide):
    """The modules as they are, each network in the layout that is faster here."""

    def __init__(self, case: Case, pipe: Pipeline) -> None:
        super().__init__(case, pipe)
        self.settings += ", no CUDA graphs" if pipe.device.type == "cuda" else ""

    def tune(self, layout: Layout | None = None) -> None:
        self.layout = choose_layout(self, self._load_in, self._pipe.device, layout)
        self.settings += f", {layout_text(self.layout)}"

    def _load_in(self, layout: Layout) -> None:
        """Anew, from the files: no layout is to take another one's memory as well."""
        loader = self._pipe._loader
        loader.move(loader.device)
        loader.backend = _LaidOut(layout)


class _LaidOut(EagerBackend):
    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        network = "VAE" if component.name.startswith("vae") else "UNet"  # text encoders have no convolutions
        channels_last = self._layout[network] == "channels_last"
        return (_ChannelsLastEngine if channels_last else EagerEngine)(component, device)


class _ChannelsLastEngine(EagerEngine):
    def _lay_out(self, module: nn.Module) -> Sequence[Tensor]:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ()


def _spans(timings: dict[str, float], end: float) -> list[Span]:
    """Stages follow one another without a gap, and the last one ends with the call."""
    begin = end - timings["total"]
    spans = []
    for name, seconds in timings.items():
        if name != "total":
            spans.append(Span(name, begin, begin + seconds))
            begin += seconds
    return spans


def open_side(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    *,
    backend: str,
    graphs: bool | None = None,
) -> LatentrtSide:
    """Load the case's checkpoints; exports and engines are kept in `folder`."""
    eager = backend == "eager"
    stands_in = eager and device.type == "cuda" and reference_side() == "latentrt-eager"
    parts = load_parts(
        case.model,
        case.refiner,
        backend=backend,
        dtype=dtype,
        device=device,
        cache_dir=folder / "cache",
        graphs=False if eager else graphs,
        upcast=torch.bfloat16 if stands_in else None,
    )
    pipe = Pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    return (_Eager if eager else LatentrtSide)(case, pipe)
