"""The verdict on a back end: what it computes beside eager PyTorch in float32, component by component and in pictures.

Both sides get the same inputs: drawn in the precision the back end runs in, and exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.engines.base import Backend, Component, Engine, example_inputs
from ..runtime.engines.eager import EagerBackend
from ..runtime.engines.registry import choose
from ..runtime.engines.sizes import SizePolicy, profiles_for
from ..runtime.loading import load_components, select_components
from ..runtime.manifests import VERDICT, write_beside
from ..runtime.pipeline import Pipeline
from ..runtime.place import dtype_name, release_memory
from ..runtime.weights import open_checkpoint, refiner_source
from .measures import psnr, relative_error, ssim

__all__ = ["LIMITS", "Limits", "Verdict", "verify_component", "verify_model"]

_PROMPT = "a red circle left of a blue square"
_STEPS = 8


@dataclass(frozen=True)
class Limits:
    """What passes.

    Attributes:
        relative_error: the largest max|a - b| / max|b| of an output.
        psnr: the least, in dB, over the range of the reference, or [0, 1] of pictures.
        ssim: the least, of pictures.
    """

    relative_error: float
    psnr: float
    ssim: float | None = None


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16

# In float32 both sides differ by the order of their sums. Half types round each weight and activation, to 2^-11
# (float16) or 2^-8 (bfloat16) of its value, which adds up over layers. A picture adds up all its steps, and an edge
# that moves by half a pixel is a large error at few places. The demo on eager PyTorch in bfloat16 has 0.8 % and 57 dB
# for components, 1.7 % in the decoder and 1.9 %, 56 dB and 0.9997 in its picture; deeper models have more.
_NETWORK = {_F32: Limits(1e-4, 80), _F16: Limits(1e-2, 50), _BF16: Limits(5e-2, 38)}
LIMITS: Mapping[str, Mapping[torch.dtype, Limits]] = {
    "text_encoder": _NETWORK,
    "text_encoder_2": _NETWORK,
    "unet": _NETWORK,
    "vae_encoder": _NETWORK,
    "vae_decoder": {
        _F32: Limits(1e-4, 80, 0.9999),
        _F16: Limits(2e-2, 50, 0.999),
        _BF16: Limits(8e-2, 38, 0.99),
    },
    "pipeline": {
        _F32: Limits(1e-3, 70, 0.9999),
        _F16: Limits(0.1, 45, 0.995),
        _BF16: Limits(0.3, 35, 0.98),
    },
}


@dataclass(frozen=True)
class Verdict:
    """How one part did.

    Attributes:
        part: a component's name, with "refiner " before it for a refiner's; or "pipeline".
        backend: its name and version.
        device: where both sides ran.
        dtype: of the back end's weights and activations.
        sizes: of the inputs; pixels for a pipeline.
        relative_error, psnr, ssim: as in `Limits`, of the worst output; ssim of pictures only.
    """

    part: str
    backend: str
    device: str
    dtype: str
    sizes: Mapping[str, int]
    relative_error: float
    psnr: float
    ssim: float | None
    limits: Limits

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit; empty where it passes."""
        limits, found = self.limits, []
        if not self.relative_error <= limits.relative_error:  # so that nan fails
            found.append(f"relative error {self.relative_error:.2g}, limit {limits.relative_error:g}")
        if not self.psnr >= limits.psnr:
            found.append(f"PSNR {self.psnr:.1f} dB, at least {limits.psnr:g}")
        if limits.ssim is not None and not (self.ssim is not None and self.ssim >= limits.ssim):
            found.append(f"SSIM {self.ssim}, at least {limits.ssim:g}")
        return found

    def __str__(self) -> str:
        at = "x".join(str(size) for size in self.sizes.values())
        similar = "" if self.ssim is None else f"  SSIM {self.ssim:.5f}"
        state = "FAILED" if self.failures else "passed"
        measured = f"relative error {self.relative_error:.1e}  PSNR {self.psnr:5.1f} dB{similar}"
        return f"{state}  {self.part:<24}{self.dtype:<9} {at:<10} {measured}"

    def to_json(self) -> dict[str, Any]:
        """Numbers that JSON lacks are null."""
        measured = {"relative_error": self.relative_error, "psnr": self.psnr, "ssim": self.ssim}
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in measured.items()}
        return {**asdict(self), **finite, "passed": not self.failures}


def verify_model(
    model: str,
    refiner: str | None,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    components: Sequence[str] = (),
    variant: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    cache_dir: Path | None = None,
) -> Iterator[Verdict]:
    """Compare every component and then whole pictures with eager PyTorch in float32, telling of each as it is there.

    What is exported or built for it stays in the cache, with the verdict beside it.

    Args:
        model, refiner: as `Pipeline.from_pretrained` takes them. Of a refiner, components that the model does not have.
        backend: a name that `latentrt backends` lists, or "auto".
        components: only these, and no pictures; all by default.
        size: (height, width) in pixels; the model's own by default.
        batch: images at once, with guidance.

    Raises:
        RequestError: a size or component there is not.
        BackendUnavailableError: it cannot run here.
        CheckpointError, BackendError, ExportError, BuildError, CacheError: what each says.
    """
    taken = choose(backend, device, dtype)
    second = None if refiner is None else refiner_source(refiner)
    found: dict[str, tuple[Component, Component]] = {}
    known: set[str] = set()
    for prefix, source in (("", model), ("refiner ", second)):
        if source is None:
            continue
        checkpoint = open_checkpoint(source, variant=variant, cache_dir=cache_dir)
        exact = load_components(checkpoint, torch.float32)
        for name, component in load_components(checkpoint, dtype, upcast=taken.upcast).items():
            if component.fingerprint not in known:
                known.add(component.fingerprint)
                found[prefix + name] = (component, exact[name])
    wanted = select_components(found, components, model)
    # All of them first: a size that one cannot have is said before the others are compared.
    sizes = {part: _sizes(component, size, batch) for part, (component, _) in wanted.items()}
    for part, (component, exact_component) in wanted.items():
        yield verify_component(
            component,
            exact_component,
            taken,
            device=device,
            sizes=sizes[part],
            part=part,
            cache_dir=cache_dir,
        )
    if not components:
        load = partial(
            Pipeline.from_pretrained, model, refiner, variant=variant, device=device, cache_dir=cache_dir
        )
        yield _verify_pipeline(load, taken, device, dtype, size=size, batch=batch)


def verify_component(
    component: Component,
    exact: Component,
    backend: Backend,
    *,
    device: torch.device,
    sizes: Mapping[str, int],
    cache_dir: Path | None,
    part: str | None = None,
    load: Callable[[], Engine] | None = None,
) -> Verdict:
    """Compare one component with itself in float32, and keep the verdict beside what the back end loaded.

    Args:
        component: in the precision to be judged.
        exact: the same in float32.
        sizes: of the named dimensions of its inputs.
        part: what to call it; its name by default.
        load: gives the engine to judge; by default it is the one that the back end takes unasked.
    """
    inputs = {
        spec.name: x.to(device)
        for spec, x in zip(component.inputs, example_inputs(component, sizes), strict=True)
    }
    with _float32_is_float32():
        eager = partial(EagerBackend().load, exact, device=device, cache_dir=cache_dir)
        wanted = _run_once(eager, inputs)[0]
    load = load or partial(backend.load, component, device=device, cache_dir=cache_dir)
    precision = _precision(component, device)
    with _precisely(precision):
        got, entry = _run_once(load, inputs)
    pictures = component.name == "vae_decoder"
    verdict = Verdict(
        part=part or component.name,
        backend=_title(backend, device, component.dtype),
        device=_device_name(device),
        dtype=dtype_name(component.dtype),
        sizes=dict(sizes),
        relative_error=_worst([relative_error(got[name], wanted[name]) for name in wanted]),
        psnr=-_worst([-psnr(got[name], wanted[name]) for name in wanted]),
        # The decoder's values are in [-1, 1].
        ssim=ssim(got["image"] / 2 + 0.5, wanted["image"] / 2 + 0.5) if pictures else None,
        limits=LIMITS[component.name][precision],
    )
    if entry is not None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        write_beside(entry, VERDICT, {**verdict.to_json(), "created": at})
    return verdict


def _run_once(
    load: Callable[[], Engine], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Path | None]:
    """Its outputs and the store's entry it came from; nothing stays in memory: two full-size UNets may not fit."""
    engine = load()
    try:
        with torch.inference_mode():
            return engine(inputs), engine.entry
    finally:
        engine.close()
        del engine
        release_memory()


def _verify_pipeline(
    load: Callable[..., Pipeline],
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: tuple[int, int] | None,
    batch: int,
) -> Verdict:
    """Compare whole pictures; `load` takes the back end and dtype that are left to choose."""

    def picture(name: str, precision: torch.dtype) -> Tensor:
        pipe = load(backend=name, dtype=precision)
        pipe.set_progress_bar_config(disable=True)
        height, width = size or (None, None)
        result = pipe(
            _PROMPT,
            height=height,
            width=width,
            num_inference_steps=_STEPS,
            num_images_per_prompt=batch,
            seed=0,
            output_type="pt",
        )
        images: Tensor = result.images
        return images.cpu()

    with _float32_is_float32():
        wanted = picture("eager", torch.float32)
    release_memory()
    with _precisely(dtype):
        got = picture(backend.name, dtype)
    return Verdict(
        part="pipeline",
        backend=_title(backend, device, dtype),
        device=_device_name(device),
        dtype=dtype_name(dtype),
        sizes={"height": wanted.shape[2], "width": wanted.shape[3]},
        relative_error=relative_error(got, wanted),
        psnr=psnr(got, wanted, peak=1.0),
        ssim=ssim(got, wanted),
        limits=LIMITS["pipeline"][dtype],
    )


def _sizes(component: Component, size: tuple[int, int] | None, batch: int) -> dict[str, int]:
    """What a picture of the model's own size, or of another one, makes of the inputs' named dimensions."""
    height, width = size or (component.native_size, component.native_size)
    (profile,) = profiles_for(component, SizePolicy.parse([f"{width}x{height}"], str(batch)))
    return {name: axis.best for name, axis in profile.axes.items()}


def _worst(errors: Sequence[float]) -> float:
    """The largest; nan where one is."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@contextmanager
def _float32_is_float32() -> Iterator[None]:
    """PyTorch convolves float32 in TF32 on a GPU unless told not to, and multiplies in it where told to."""
    multiplied = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = multiplied


def _precision(component: Component, device: torch.device) -> torch.dtype:
    """The dtype by whose limits it is judged: TF32, which only GPUs have, has as many bits of mantissa as float16."""
    return _F16 if component.tf32 and device.type == "cuda" else component.dtype


def _precisely(dtype: torch.dtype) -> AbstractContextManager[None]:
    """As what is judged runs: where float32's limits apply, without TF32; else under the process's own settings."""
    return _float32_is_float32() if dtype == torch.float32 else nullcontext()


def _title(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    return f"{backend.name} ({backend.availability(device, dtype).reason})"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
