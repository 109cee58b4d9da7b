"""Engines of a whole checkpoint, component by component: what `latentrt build` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..errors import BackendUnavailableError, RequestError
from ..runtime.cache import Store, cache_root
from ..runtime.cache_contents import contents
from ..runtime.engine_store import EngineTarget, StoredEngine
from ..runtime.engines import products
from ..runtime.engines.sizes import SizePolicy, profiles_for
from ..runtime.engines.split import in_parts
from ..runtime.engines.tensorrt import TensorRTBackend, TensorRTRTXBackend
from ..runtime.loading import load_components, select_components
from ..runtime.place import dtype_name
from ..runtime.prepare import Rebuild, find_or_build_engine
from ..runtime.weights import open_checkpoint
from .verify import Verdict, verify_component

__all__ = ["Built", "build_engines", "local_archs", "target_archs"]


@dataclass(frozen=True)
class Built:
    """One component's engine.

    Attributes:
        seconds: what it took to have it: to export and build it, or to find it.
        verdict: what it computes beside PyTorch; None where it was found, or cannot run here.
        earlier: what `latentrt verify` kept with it, where it was found; None where it never ran.
    """

    component: str
    dtype: str
    engine: StoredEngine
    seconds: float
    verdict: Verdict | None = None
    earlier: Mapping[str, Any] | None = None

    @property
    def judged(self) -> str | None:
        """What is known of what it computes, in a line."""
        if self.verdict is not None:
            return str(self.verdict)
        if self.earlier is None:
            return None
        state = "passed" if self.earlier.get("passed") else "FAILED"
        return (
            f"{state}  when it was verified, on {self.earlier.get('backend')}, {self.earlier.get('device')}"
        )

    @property
    def failures(self) -> list[str]:
        """What that has against it."""
        if self.verdict is not None:
            return self.verdict.failures
        failed = self.earlier is not None and not self.earlier.get("passed")
        return ["it failed when it was verified; `latentrt verify` says by how much"] if failed else []

    def to_json(self) -> dict[str, Any]:
        return {
            "component": self.component,
            "dtype": self.dtype,
            "built": self.engine.built,
            "seconds": round(self.seconds, 3),
            "profiles": [str(profile) for profile in self.engine.profiles],
            "key": self.engine.key,
            "file": str(self.engine.plan),
            "figures": dict(self.engine.figures),
            "verdict": self.earlier if self.verdict is None else self.verdict.to_json(),
        }


def build_engines(
    model: str,
    target: EngineTarget,
    *,
    dtype: torch.dtype,
    sizes: Sequence[str] = (),
    batch: str = "1..4",
    components: Sequence[str] = (),
    variant: str | None = None,
    split: bool = False,
    rebuild: Rebuild = "auto",
) -> Iterator[Built]:
    """Build the engines of a checkpoint, one after the other, telling of each as it is there.

    What was built is compared with PyTorch where it can run: see `verify.verify_component`.

    Args:
        model: as `Pipeline.from_pretrained` takes it.
        target: product, architectures, options.
        sizes, batch: as `SizePolicy.parse` takes them; sizes around the model's own by default.
        components: only these; all by default.
        variant: of the weight files.
        split: a UNet as its parts, `unet.prompt`, `unet.time` and `unet.step`.

    Raises:
        RequestError: a size or component there is not.
        CheckpointError, BackendError, ExportError, BuildError, CacheError: what each says.
    """
    asked = SizePolicy.parse(sizes or ("1024x1024",), batch)  # said before weights are looked for
    checkpoint = open_checkpoint(model, variant=variant)
    found = load_components(checkpoint, dtype, upcast=_backend_of(target).upcast)
    wanted = list(select_components(found, components, model).values())
    policies = [asked if sizes else replace(SizePolicy.around(c), batch=asked.batch) for c in wanted]
    for component, policy in zip(wanted, policies, strict=True):
        profiles_for(component, policy)  # what is wrong with a size is said before minutes of work
    backend = _backend_here(target, dtype, split=split)
    exact = load_components(checkpoint, torch.float32)
    for component, policy in zip(wanted, policies, strict=True):
        parts = in_parts(component) if split else (component,)
        stored: list[StoredEngine] = []
        for part in parts:
            begun = time.perf_counter()
            made = find_or_build_engine(part, target, policy, cache_dir=None, rebuild=rebuild)
            seconds = time.perf_counter() - begun
            stored.append(made)
            verdict = None
            if part is parts[-1] and backend is not None and any(one.built for one in stored):
                # The whole runs now: these engines, not what the cache would give for other sizes or options.
                verdict = verify_component(
                    component,
                    exact[component.name],
                    backend,
                    device=torch.device("cuda"),
                    sizes={name: axis.best for name, axis in profiles_for(component, policy)[0].axes.items()},
                    cache_dir=None,
                    load=partial(backend.load_stored, component, stored, torch.device("cuda")),
                )
            earlier = None if made.built or verdict is not None else _kept_verdict(made)
            yield Built(part.name, dtype_name(part.dtype), made, seconds, verdict, earlier)


def _kept_verdict(made: StoredEngine) -> Mapping[str, Any] | None:
    entries = contents(Store(cache_root()))
    return next((entry.verdict for entry in entries if entry.key == made.key), None)


def _backend_of(target: EngineTarget) -> type[TensorRTBackend]:
    return TensorRTBackend if target.product == "tensorrt" else TensorRTRTXBackend


def _backend_here(target: EngineTarget, dtype: torch.dtype, *, split: bool) -> TensorRTBackend | None:
    """What runs such engines, if this machine can."""
    kind = _backend_of(target)
    backend, device = kind(with_plugins=tuple(target.plugins), split=split), torch.device("cuda")
    if not backend.availability(device, dtype).ok:
        return None
    return backend if set(local_archs(target.product)) <= set(target.archs) else None


def target_archs(product: str, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """The architectures to build for: those asked for, or that of this machine's GPU.

    Raises:
        RequestError: there is no GPU, or the product builds for it alone and others are asked for.
    """
    kind = products.product(product)
    if asked and not kind.needs_gpu:
        return asked
    here = local_archs(product)
    if asked and asked != here:
        wanted, found = (", ".join(f"sm_{arch}" for arch in archs) for archs in (asked, here))
        raise RequestError(
            f"{kind.title} builds for the GPU it runs on, which is {found} here, not for {wanted}; leave --arch out, "
            "build on such a GPU, or build with tensorrt-rtx"
        )
    return here


def local_archs(product: str) -> tuple[int, ...]:
    """The architecture of this machine's GPU.

    Raises:
        RequestError: there is none.
    """
    if not torch.cuda.is_available():
        other = products.product("tensorrt-rtx")
        try:
            known = ", ".join(f"sm_{arch}" for arch in products.architectures(products.load(other)))
            remedy = f"--engine tensorrt-rtx --arch with one or several of {known}"
        except BackendUnavailableError:
            remedy = f"{other.install}, and see `latentrt build --help`"
        raise RequestError(
            f"there is no GPU here to build {product} engines for; tensorrt-rtx builds for others: {remedy}"
        )
    major, minor = torch.cuda.get_device_capability()
    return (10 * major + minor,)
