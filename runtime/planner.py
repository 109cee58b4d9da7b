"""Plans from a model's own shapes: nothing is loaded, no weight is read, and no GPU is needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import RequestError
from .checks import check_number
from .denoise import DenoiseState, LoopKind
from .engines.base import Component, Engine
from .engines.eager import EagerEngine
from .engines.lazy import EngineLoader, LazyEngine
from .engines.registry import get_backend
from .expert import Expert, check_fit
from .footprint import Footprint, Tracker, follow, measure
from .loading import load_expert, load_refiner, load_vae
from .memory import Network, Plan, PlannedStage
from .parts import Parts
from .place import dtype_name
from .request import GenerationRequest, check_side
from .stages import Stage, stage_names, stages_of
from .vae import Tiles
from .weights import open_outline, refiner_source

__all__ = ["PlanSize", "Planner"]

_META = torch.device("meta")


@dataclass(frozen=True)
class PlanSize:
    """What a plan depends on beside its loops.

    Attributes:
        height, width: in pixels.
        batch: images, each with a prompt of its own.
        encoded, decoded: whether it starts from an image; whether it ends in one.
        tile: latents along a side of the tiles in which it is decoded; None for whole images.
    """

    height: int
    width: int
    batch: int
    encoded: bool
    decoded: bool = True
    tile: int | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> PlanSize:
        """That of a request."""
        return cls(
            request.height,
            request.width,
            request.batch,
            encoded=request.starts_from_pixels,
            decoded=request.output_type != "latent",
            tile=request.tile,
        )


class Planner:
    """Plans for one model, and a refiner.

    Each network is followed through one forward for each batch and size, which takes up to a second. Results are
    cached, so that another plan of the same kind takes microseconds. Thread-safe.
    """

    def __init__(
        self, parts: Parts, *, backend: Literal["triton", "eager"] = "triton", arch: int = 90
    ) -> None:
        """
        Args:
            parts: whose components are planned; their engines are not touched.
            backend: whose modules and buffers.
            arch: the architecture whose kernels are planned, such as 90.
        """
        self._parts, self._vae = parts, parts.vae
        self._dtype = dtype_name(parts.loader.dtype)
        self._backend = get_backend(backend)
        self._arch = arch
        self._modules: dict[str, nn.Module] = {}
        self._engines: dict[str, EagerEngine] = {}
        self._footprints: dict[Hashable, Footprint] = {}
        self._plans: dict[Hashable, Plan] = {}
        self._lock = threading.RLock()

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        refiner: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        variant: str | None = None,
        backend: Literal["triton", "eager"] = "triton",
        arch: int = 90,
    ) -> Planner:
        """A planner of checkpoints.

        Args:
            model, refiner, variant: as in `Pipeline.from_pretrained`; or "sdxl" and "sdxl-refiner", the published
                configurations. A second text encoder of the same configuration and shapes counts as shared.
            dtype, backend, arch: as for a planner.

        Raises:
            CheckpointError: it is not there, damaged, or not understood.
        """
        loader = EngineLoader(backend, torch.device("cpu"), dtype, None, graphs=False)
        checkpoint = open_outline(model, variant=variant)
        base, vae = load_expert(checkpoint, loader), load_vae(checkpoint, loader)
        second: Expert | None = None
        if refiner is not None:
            name = "sdxl-refiner" if os.fspath(refiner) == "sdxl" else refiner_source(refiner)
            second = load_refiner(open_outline(name, variant=variant), base, loader)
        check_fit(base, second, vae.channels)
        return cls(Parts(base, second, vae, loader), backend=backend, arch=arch)

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
            from_image: it starts from an image, so the VAE's encoder runs too.

        Raises:
            RequestError: an argument cannot be met.
        """
        scale = self._vae.scale
        own_height, own_width = self._parts.base.config.latent_size
        height = check_side("height", own_height * scale if height is None else height, scale)
        width = check_side("width", own_width * scale if width is None else width, scale)
        if not 1 <= batch <= 1024:
            raise RequestError(f"batch is {batch}; it must be 1 to 1024")
        guidance_scale = check_number("guidance_scale", guidance_scale, -1e4, 1e4)
        high_noise_frac = check_number("high_noise_frac", high_noise_frac, 0, 1)
        stages = stages_of(self._parts.experts, sampler, steps=steps, high_noise_frac=high_noise_frac)
        size = PlanSize(height, width, batch, encoded=from_image)
        return self.of_stages(stages, size, guided=guidance_scale > 1)

    def of_stages(self, stages: Sequence[Stage], size: PlanSize, *, guided: bool) -> Plan:
        """What a request takes whose schedule is divided so.

        Args:
            stages: of this planner's experts.
            size: of its images.
            guided: whether its guidance scale is above 1.
        """
        scale = self._vae.scale
        shape = (size.batch, self._vae.channels, size.height // scale, size.width // scale)
        loops = []
        for stage in stages:  # also one that takes no steps: its networks are loaded all the same
            expert = stage.expert
            kind = LoopKind.of(shape, stage.table, expert.uses_cfg(guided), expert.unet.component.dtype)
            loops.append((stage.name, expert, kind))
        key = (tuple((name, kind) for name, _, kind in loops), size)
        with self._lock:
            if key not in self._plans:
                with torch.inference_mode(False):
                    self._plans[key] = self._build(loops, size)
            plan = self._plans[key]
        # What is cached has one step in each loop: their number differs from request to request, and costs no memory.
        steps = {stage.name: len(stage.table) for stage in stages}
        counted = [
            replace(stage, calls=dict.fromkeys(stage.calls, steps[stage.name]))
            if stage.kind == "denoise"
            else stage
            for stage in plan.stages
        ]
        return replace(plan, stages=tuple(counted))

    def _build(self, loops: Sequence[tuple[str, Expert, LoopKind]], size: PlanSize) -> Plan:
        height, width, batch = size.height, size.width, size.batch
        networks: dict[str, Network] = {}
        texts: dict[str, set[str]] = {}  # by encoder; one that experts share encodes each of them once
        buffers: dict[str, int] = {}
        stages: list[PlannedStage] = []
        for name, expert, kind in loops:
            for encoder in expert.encoders:
                key = self._key(expert, encoder.engine.component)
                networks[key] = self._network(key, encoder.engine.component, batch, height, width)
                negative = {"negative"} if kind.cfg and not expert.zero_negative else set()
                texts[key] = texts.get(key, set()) | {"prompt"} | negative
            component = expert.unet.component
            key = self._key(expert, component)
            rows = 2 * batch if kind.cfg else batch
            inputs = _inputs(component, rows, height, width)
            loop = _LoopOnMeta(self._engine(key, component), component, kind, inputs)
            buffers |= {f"{name} {part}": nbytes for part, nbytes in loop.buffers.items()}
            networks[key] = self._network(key, component, rows, height, width, loop)
            stages.append(PlannedStage(name, "denoise", {key: 1}, follow(loop.prepare, self._arch).peak))
        # An image in float32, once by itself and once in the batch.
        image_bytes = 2 * 4 * batch * 3 * height * width
        scale = self._vae.scale
        down, across = (Tiles.of(side // scale, size.tile, scale) for side in (height, width))
        sizes = {
            self._vae.encoder: (height, width),
            self._vae.decoder: (down.size * scale, across.size * scale),
        }
        for half, (rows, columns) in sizes.items():
            name = half.component.name
            networks[name] = self._network(name, half.component, 1, rows, columns)
        if size.decoded:
            calls = batch * len(down.starts) * len(across.starts)
            stages.append(PlannedStage("decode", "pixels", {"vae_decoder": calls}, image_bytes))
        if size.encoded:
            stages.insert(0, PlannedStage("encode", "pixels", {"vae_encoder": batch}, image_bytes))
        stages.insert(0, PlannedStage("text", "text", {key: len(found) for key, found in texts.items()}))
        subject = f"{self._sources} at {width}x{height}, batch {batch}, {self._dtype}"
        return Plan(subject, networks, tuple(stages), buffers)

    def of_weights(self) -> Plan:
        """The least that any request needs: the weights, without the VAE's encoder."""
        networks: dict[str, Network] = {}
        stages: list[PlannedStage] = []
        text: dict[str, int] = {}
        with self._lock, torch.inference_mode(False):
            for name, expert in stage_names(self._parts.experts).items():
                for encoder in expert.encoders:
                    text[self._weighed(networks, expert, encoder.engine.component)] = 1
                stages.append(
                    PlannedStage(name, "denoise", {self._weighed(networks, expert, expert.unet.component): 1})
                )
            decoder = self._weighed(networks, self._parts.base, self._vae.decoder.component)
            stages.append(PlannedStage("decode", "pixels", {decoder: 1}))
        stages.insert(0, PlannedStage("text", "text", text))
        return Plan(f"the weights of {self._sources}, {self._dtype},", networks, tuple(stages), {})

    def engines(self) -> dict[str, LazyEngine]:
        """The experts' and the VAE's engines, by their networks' names in plans."""
        experts = self._parts.experts
        found = {self._key(expert, x.component): x for expert in experts for x in expert.engines()}
        return found | {half.component.name: half for half in (self._vae.encoder, self._vae.decoder)}

    def _weighed(self, networks: dict[str, Network], expert: Expert, component: Component) -> str:
        """Add a network, with its weights only, to `networks`; returns its name."""
        key = self._key(expert, component)
        parameters = list(self._module(key, component).parameters())
        numbers, nbytes = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        held = self._engine(key, component).weight_bytes
        networks[key] = Network(dtype_name(component.dtype), 1, Footprint(numbers, nbytes, held))
        return key

    @property
    def _sources(self) -> str:
        return " + ".join(expert.source for expert in self._parts.experts)

    def _key(self, expert: Expert, component: Component) -> str:
        """The component's name; one that only the refiner has is prefixed with "refiner"."""
        if expert is not self._parts.refiner:
            return component.name
        shared = [encoder.engine.component for encoder in self._parts.base.encoders]
        return component.name if component in shared else f"refiner {component.name}"

    def _network(
        self,
        key: str,
        component: Component,
        rows: int,
        height: int,
        width: int,
        loop: _LoopOnMeta | None = None,
    ) -> Network:
        """One forward. FLOPs and weights are the model's; memory is the back end's, which repacks weights. For a UNet
        that is the memory of a whole step of `loop`, sampler and guidance included, so it differs by kind."""
        of = (key, rows, height, width, None if loop is None else loop.kind)
        found = self._footprints.get(of)
        if found is None:
            inputs = _inputs(component, rows, height, width)
            engine = self._engine(key, component)
            run = (lambda: engine(inputs)) if loop is None else loop.step
            found = measure(self._module(key, component), list(inputs.values()), self._arch, run)
            found = replace(found, held_bytes=engine.weight_bytes)
            self._footprints[of] = found
        return Network(dtype_name(component.dtype), rows, found)

    def _module(self, key: str, component: Component) -> nn.Module:
        """The module on the meta device, in channels last."""
        if key not in self._modules:
            module = component.on_meta()
            self._modules[key] = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._modules[key]

    def _engine(self, key: str, component: Component) -> EagerEngine:
        """The back end's own engine on the meta device, its weights repacked."""
        if key not in self._engines:
            outline = replace(component, build=component.on_meta)
            engine = self._backend.load(outline, device=_META, cache_dir=None)
            assert isinstance(engine, EagerEngine)
            self._engines[key] = engine
        return self._engines[key]


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


class _LoopOnMeta:
    """The denoising loop's static tensors on the meta device, and the work over them.

    Attributes:
        buffers: bytes of the static tensors, by what they are for.
    """

    def __init__(
        self, engine: Engine, component: Component, kind: LoopKind, inputs: Mapping[str, Tensor]
    ) -> None:
        constants = {name: x for name, x in inputs.items() if name not in ("sample", "timestep")}
        self.kind = kind
        with Tracker() as tracker:
            self._state = DenoiseState(kind, _META)
        self.buffers = {"loop": tracker.live, "conditioning": sum(x.nbytes for x in constants.values())}
        with Tracker() as tracker:
            self._program = self._state.bind(engine, component, constants)
        self.buffers["keys, values, times"] = tracker.live

    def prepare(self) -> None:
        """Prepare a request. Not captured, so its temporaries are outside the graph pool."""
        self._program.prepare()

    def step(self) -> None:
        """One denoising step."""
        self._state.step(self._program.run)
