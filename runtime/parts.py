"""The parts of a pipeline, from the arguments of `from_pretrained`."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RequestError, UnsafeWeightsError
from .cache import cache_root
from .checks import check_flag, shown
from .engines.lazy import EngineLoader, LazyEngine
from .expert import Expert, check_fit
from .hub import weight_names
from .loading import load_expert, load_refiner, load_vae
from .memory import check_policy
from .place import parse_bytes, parse_device, parse_dtype
from .request import GenerationRequest
from .text_encoder import TextEncoder
from .vae import VAE
from .weights import open_checkpoint, refiner_source

__all__ = ["Parts", "dtype_for", "load_parts"]


@dataclass(frozen=True)
class Parts:
    """What a pipeline consists of.

    Attributes:
        base, refiner, vae: its networks.
        loader: of their engines.
        memory_limit, loop_memory: bytes, as in `Pipeline.from_pretrained`.
    """

    base: Expert
    refiner: Expert | None
    vae: VAE
    loader: EngineLoader
    memory_limit: int | None = None
    loop_memory: int | None = None

    @property
    def experts(self) -> list[Expert]:
        """The base, and the refiner if there is one."""
        return [self.base] if self.refiner is None else [self.base, self.refiner]

    def engines(self) -> list[LazyEngine]:
        """Every engine of the pipeline, in load order."""
        return [*(x for expert in self.experts for x in expert.engines()), self.vae.encoder, self.vae.decoder]

    def request(self, arguments: Mapping[str, Any]) -> GenerationRequest:
        """The request of a call with these arguments, all by name, with the model's defaults.

        Raises:
            RequestError: as of `GenerationRequest.create`.
        """
        config, scale = self.base.config, self.vae.scale
        defaults = {
            "guidance_scale": 5.0 if config.takes_sizes else 7.5,
            "strength": 0.3 if config.takes_sizes else 0.8,
        }
        height, width = config.latent_size
        return GenerationRequest.create(
            {**arguments, **{name: x for name, x in defaults.items() if arguments[name] is None}},
            default_size=(height * scale, width * scale),
            latent_scale=scale,
            latent_channels=self.vae.channels,
        )


def dtype_for(device: torch.device, dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype from itself or its name; by default float32 on the CPU and float16 elsewhere.

    Raises:
        RequestError: the project has no models of it.
    """
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else "float16"
    return parse_dtype(dtype)


def load_parts(
    model: str | os.PathLike[str],
    refiner: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    graphs: bool | None = None,
    memory: str = "resident",
    memory_limit: int | str | None = None,
    loop_memory: int | str | None = None,
    use_safetensors: bool | None = None,
    text_encoder: TextEncoder | None = None,
    text_encoder_2: TextEncoder | None = None,
    vae: VAE | None = None,
    scheduler: Mapping[str, Any] | None = None,
    upcast: torch.dtype | None = None,
) -> Parts:
    """Load the parts. Arguments and errors are those of `Pipeline.from_pretrained`, but for one.

    Args:
        upcast: of a VAE that overflows in float16; by default the back end's `upcast`.
    """
    _check_names(model=model, refiner=refiner, cache_dir=cache_dir, variant=variant, revision=revision)
    if use_safetensors is not None and not check_flag("use_safetensors", use_safetensors):
        raise UnsafeWeightsError(
            "use_safetensors=False asks for pickled weights, which can run code; leave it out"
        )
    if dtype is not None and torch_dtype is not None and parse_dtype(dtype) != parse_dtype(torch_dtype):
        raise RequestError(f"dtype is {dtype} and torch_dtype {torch_dtype}; give one of them")
    shared = ((text_encoder, TextEncoder), (text_encoder_2, TextEncoder), (vae, VAE))
    for part, wanted in shared:
        if part is not None and not isinstance(part, wanted):
            raise RequestError(
                f"a {type(part).__name__} was given to share; give the {wanted.__name__} of a latentrt.Pipeline"
            )
    place = parse_device(device)
    precision = dtype_for(place, torch_dtype if dtype is None else dtype)
    captures = None if graphs is None else check_flag("graphs", graphs)
    policy = check_policy(memory)
    limit, loops = parse_bytes(memory_limit, "memory_limit"), parse_bytes(loop_memory, "loop_memory")
    cache = cache_root(cache_dir)  # here, as a call may find another working directory and environment
    encoders = [encoder.engine for encoder in (text_encoder, text_encoder_2) if encoder is not None]
    lent = encoders if vae is None else [*encoders, vae.encoder, vae.decoder]
    loader = EngineLoader(backend, place, precision, cache, captures, policy, shared=lent)
    checkpoint = open_checkpoint(model, variant=variant, revision=revision, cache_dir=cache)
    base = load_expert(checkpoint, loader, text_encoder, text_encoder_2, scheduler)
    vae = vae or load_vae(checkpoint, loader, upcast=upcast)
    second = None
    if refiner is not None:
        found = open_checkpoint(refiner_source(refiner), variant=variant, cache_dir=cache)
        second = load_refiner(found, base, loader, scheduler)
    check_fit(base, second, vae.channels)
    return Parts(base, second, vae, loader, limit, loops)


def _check_names(**given: Any) -> None:
    """Refuse what is neither a path nor a name, or no file can have; `model` alone has to be given."""
    for argument, value in given.items():
        wanted = (str,) if argument in ("variant", "revision") else (str, os.PathLike)
        if value is None and argument != "model":
            continue
        if not isinstance(value, wanted):
            kinds = " or a ".join(kind.__name__ for kind in wanted)
            raise RequestError(f"{argument} is {shown(value)}; it must be a {kinds}")
        name = max(weight_names(str(value)), key=len) if argument == "variant" else value
        if not _can_be_looked_for(name):
            raise RequestError(
                f"{argument} is {shown(os.fspath(value))}, as no file can be called; give another one"
            )


def _can_be_looked_for(name: str | os.PathLike[str]) -> bool:
    """Whether the file system bears a question for a file of that name."""
    try:
        os.lstat(name)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:  # a zero byte, or half a character
        return False
    return True
