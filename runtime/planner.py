"""Plans from a model's own shapes: nothing is loaded, no weight is read, and no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import RequestError
from .denoise import DenoiseState, LoopKind
from .engines.base import Component, Engine, Program
from .engines.lazy import EngineLoader
from .expert import Expert, check_fit
from .footprint import Footprint, Tracker, follow, measure
from .loading import load_expert, load_vae
from .memory import Network, Plan, Stage
from .request import check_side
from .sampler import SamplerTable, build_table, step_range
from .weights import open_outline

__all__ = ["Planner"]

_META = torch.device("meta")


class Planner:
    """Plans for one model, and a refiner.

    A network is followed through one forward for every batch and size that is asked for, which takes up to a second;
    what was found is kept.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        refiner: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        variant: str | None = None,
        backend: Literal["triton", "eager"] = "triton",
        arch: int = 90,
    ) -> None:
        """
        Args:
            model, refiner, variant: as in `Pipeline.from_pretrained`; or "sdxl" and "sdxl-refiner", the published
                configurations. A second text encoder of the same configuration and shapes counts as shared.
            dtype: of the weights; the VAE has another where float16 would overflow.
            backend: whose modules and buffers.
            arch: the architecture whose kernels are planned, such as 90.

        Raises:
            CheckpointError: it is not there, damaged, or not understood.
        """
        loader = EngineLoader(backend, torch.device("cpu"), dtype, None, graphs=False)
        checkpoint = open_outline(model, variant=variant)
        self._base = load_expert(checkpoint, loader)
        self._vae = load_vae(checkpoint, loader)
        self._refiner: Expert | None = None
        if refiner is not None:
            name = {"demo": "demo-refiner", "sdxl": "sdxl-refiner"}.get(os.fspath(refiner), refiner)
            second = load_expert(open_outline(name, variant=variant), loader)
            self._refiner = second.sharing(self._base)
        check_fit(self._base, self._refiner, self._vae.channels)
        self._dtype = str(dtype).removeprefix("torch.")
        self._backend = loader.backend
        self._arch = arch
        self._modules: dict[str, nn.Module] = {}
        self._engines: dict[str, Engine] = {}
        self._footprints: dict[tuple[str, int, int, int], Footprint] = {}

    @property
    def _experts(self) -> dict[str, Expert]:
        if self._refiner is None:
            return {self._base.name: self._base}
        return {"base": self._base, "refiner": self._refiner}

    def plan(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        steps: int = 30,
        guidance_scale: float = 5.0,
        sampler: str | None = None,
        high_noise_frac: float = 0.8,
        from_image: bool = False,
    ) -> Plan:
        """What one request takes.

        Args:
            height, width: in pixels; the model's own by default.
            batch: images, each with a prompt of its own and no negative prompt.
            steps, guidance_scale, sampler, high_noise_frac: as in `Pipeline.__call__`.
            from_image: it starts from a picture, so the VAE's encoder runs too.

        Raises:
            RequestError: an argument cannot be met.
        """
        scale = self._vae.scale
        side = self._base.config.sample_size or (128, 128)
        height = check_side("height", side[0] * scale if height is None else height, scale)
        width = check_side("width", side[1] * scale if width is None else width, scale)
        if not 1 <= batch <= 1024:
            raise RequestError(f"batch is {batch}; it must be 1 to 1024")

        networks: dict[str, Network] = {}
        text: dict[str, int] = {}
        buffers: dict[str, int] = {}
        stages: list[Stage] = []
        tables = {
            name: self._table(name, expert, sampler, steps, high_noise_frac)
            for name, expert in self._experts.items()
        }
        for name, table in tables.items():
            if not len(table):  # nothing of this expert runs
                continue
            expert = self._experts[name]
            guided = guidance_scale > 1 and expert.config.time_cond_proj_dim is None
            for encoder in expert.encoders:
                key = self._key(name, encoder.engine.component)
                networks[key] = self._network(key, encoder.engine.component, batch, height, width)
                text[key] = text.get(key, 0) + (2 if guided and not expert.zero_negative else 1)
            component = expert.unet.component
            key = self._key(name, component)
            rows = 2 * batch if guided else batch
            shape = (batch, self._vae.channels, height // scale, width // scale)
            kind = LoopKind.of(shape, table, guided, component.dtype)
            loop = _Loop(self._engine(key, component), kind, _inputs(component, rows, height, width))
            buffers |= {f"{name} {part}": nbytes for part, nbytes in loop.buffers.items()}
            networks[key] = self._network(key, component, rows, height, width, loop)
            stages.append(Stage(name, "denoise", {key: len(table)}))
        # A picture in float32, once by itself and once in the batch.
        image_bytes = 2 * 4 * batch * 3 * height * width
        for half in (self._vae.encoder, self._vae.decoder):
            name = half.component.name
            networks[name] = self._network(name, half.component, 1, height, width)
        stages.append(Stage("decode", "pixels", {"vae_decoder": batch}, image_bytes))
        if from_image:
            stages.insert(0, Stage("encode", "pixels", {"vae_encoder": batch}, image_bytes))
        stages.insert(0, Stage("text", "text", text))
        sources = " + ".join(expert.source for expert in self._experts.values())
        subject = f"{sources} at {width}x{height}, batch {batch}, {self._dtype}"
        return Plan(subject, networks, tuple(stages), buffers)

    def _key(self, expert: str, component: Component) -> str:
        """The component's name; with the refiner's before it where the base has another of that name."""
        if expert != "refiner" or self._refiner is None:
            return component.name
        shared = [encoder.engine.component for encoder in self._base.encoders]
        return component.name if component in shared else f"refiner {component.name}"

    def _network(
        self,
        key: str,
        component: Component,
        rows: int,
        height: int,
        width: int,
        loop: _Loop | None = None,
    ) -> Network:
        """One forward; for a UNet its memory is that of a step of the loop, which has more in its buffers."""
        found = self._footprints.get((key, rows, height, width))
        if found is None:
            inputs = list(_inputs(component, rows, height, width).values())
            found = measure(self._module(key, component), inputs, self._arch)
            if loop is not None:
                step = follow(loop.step, self._arch)
                found = replace(
                    found, activation_bytes=step.peak, scratch_bytes=step.scratch, pool_bytes=step.pool
                )
            self._footprints[key, rows, height, width] = found
        return Network(str(component.dtype).removeprefix("torch."), rows, found)

    def _module(self, key: str, component: Component) -> nn.Module:
        """On the meta device, laid out as on a GPU."""
        if key not in self._modules:
            module = component.build()
            self._modules[key] = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._modules[key]

    def _engine(self, key: str, component: Component) -> Engine:
        """The back end's own, over the same module."""
        if key not in self._engines:
            module = self._module(key, component)
            outline = replace(component, build=lambda: module)
            self._engines[key] = self._backend.load(outline, device=_META, cache_dir=None)
        return self._engines[key]

    def _table(
        self, name: str, expert: Expert, sampler: str | None, steps: int, high_noise_frac: float
    ) -> SamplerTable:
        """The steps that an expert takes."""
        config = expert.sampler(sampler)
        start = end = None
        if self._refiner is not None:
            start, end = (high_noise_frac, None) if name == "refiner" else (None, high_noise_frac)
        first, last = step_range(config, steps, denoising_start=start, denoising_end=end)
        return build_table(config, steps, begin=first, end=last)


def _inputs(component: Component, rows: int, height: int, width: int) -> dict[str, Tensor]:
    """The inputs of a forward by name, on the meta device; sizes in pixels."""
    scale = component.latent_scale
    sizes = {
        "batch": rows,
        "height": height // scale,
        "width": width // scale,
        "image_height": height,
        "image_width": width,
    }
    inputs = {}
    for spec in component.inputs:
        tensor = torch.empty(spec.shape(sizes), dtype=spec.dtype, device=_META)
        inputs[spec.name] = (
            tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        )
    return inputs


class _Loop:
    """The denoising loop's static tensors on the meta device, and one step over them.

    Attributes:
        buffers: bytes by what they are for.
    """

    def __init__(self, engine: Engine, kind: LoopKind, inputs: Mapping[str, Tensor]) -> None:
        told = {name: x for name, x in inputs.items() if name not in ("sample", "timestep")}
        with Tracker() as tracker:
            self._state = DenoiseState(kind, _META)
        self.buffers = {"loop": tracker.live, "conditioning": sum(x.nbytes for x in told.values())}
        state = self._state
        with Tracker() as tracker:
            self._program: Program = engine.bind(
                {"sample": state.sample, "timestep": state.timestep, **told},
                {"prediction": state.prediction},
                timesteps=state.timesteps,
            )
        self.buffers["keys, values, times"] = tracker.live

    def step(self) -> None:
        """Take one."""
        self._state.step(self._program.run)
