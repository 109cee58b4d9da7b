"""From a checkpoint to the parts of a pipeline: components, their engines, and the experts and VAE that use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError, RequestError
from .denoiser import Denoiser
from .engines.base import Component, TensorSpec, Values
from .engines.lazy import EngineLoader
from .engines.split import unet_parts
from .expert import Expert
from .models.clip import CLIPTextConfig, CLIPTextEncoder, rename_clip_keys
from .models.unet import UNet, UNetConfig
from .models.unet_parts import PARTS
from .models.vae import VAEConfig, VAEDecoder, VAEEncoder, rename_legacy_vae_keys
from .prompt import ClipTokenizer
from .sampler_config import scheduler_fields
from .text_encoder import TextEncoder
from .vae import VAE
from .weights import Checkpoint, public_name

__all__ = ["load_components", "load_expert", "load_refiner", "load_vae", "select_components"]

T = TypeVar("T")


@dataclass(frozen=True)
class _ModuleSource:
    """How a module is made and filled with weights.

    Attributes:
        source: the checkpoint's component that has the weights.
        config: of that component; part of the fingerprint.
        make: makes the module; called on the meta device.
        rename: a weight's name in the file -> its name in the module, None to leave it out.
        digest: of the weights when the checkpoint was loaded; part of the fingerprint.
    """

    checkpoint: Checkpoint
    source: str
    config: Mapping[str, Any]
    make: Callable[[], nn.Module]
    rename: Callable[[str], str | None] | None
    digest: str

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        source: str,
        config: Mapping[str, Any],
        make: Callable[[], nn.Module],
        rename: Callable[[str], str | None] | None = None,
    ) -> _ModuleSource:
        """With the digest that the weights have now."""
        return cls(checkpoint, source, config, make, rename, checkpoint.weights(source).digest())

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module in eval mode, with its weights in `dtype`.

        Raises:
            CheckpointError: they cannot be read, or are no longer those of the fingerprint.
        """
        module = self._filled(self.checkpoint, dtype)
        self.check_weights()
        return module

    def outline(self, dtype: torch.dtype) -> nn.Module:
        """The module on the meta device; no weight is read."""
        return self._filled(self.checkpoint.unread(), dtype)

    def _filled(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            module = self.make()
        checkpoint.weights(self.source).load_into(module, dtype, rename=self.rename)
        return module.eval()

    def check_weights(self) -> None:
        """Weights are found by path when they are first used, which may be long after the checkpoint was loaded.

        Raises:
            CheckpointError: their files hold others by now.
        """
        weights = self.checkpoint.weights(self.source)
        if weights.digest() != self.digest:
            raise CheckpointError(
                f"the weights of {weights.name} ({', '.join(file.name for file in weights.files)}) have changed since "
                "it was loaded; load the pipeline again"
            )

    def fingerprint(self, name: str, dtype: torch.dtype) -> str:
        config = json.dumps(dict(self.config), sort_keys=True, default=str)
        return hashlib.sha256(f"{name}\n{dtype}\n{config}\n{self.digest}".encode()).hexdigest()

    def component(
        self,
        name: str,
        dtype: torch.dtype,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        example_sizes: Mapping[str, int],
        native_size: int = 512,
        latent_scale: int = 8,
        *,
        tf32: bool = False,
    ) -> Component:
        return Component(
            name=name,
            build=lambda: self.build(dtype),
            dtype=dtype,
            inputs=inputs,
            outputs=outputs,
            fingerprint=self.fingerprint(name, dtype),
            check_weights=self.check_weights,
            example_sizes=example_sizes,
            native_size=native_size,
            latent_scale=latent_scale,
            config=self.config,
            outline=lambda: self.outline(dtype),
            tf32=tf32,
        )


def load_components(
    checkpoint: Checkpoint, dtype: torch.dtype, *, upcast: torch.dtype = torch.float32
) -> dict[str, Component]:
    """Every component of a checkpoint by name, ready to be exported; no weights are read yet.

    Args:
        dtype: of weights and activations.
        upcast: of a VAE that overflows in float16: the `upcast` of the back end that the components are for.

    Raises:
        CheckpointError: the checkpoint is damaged, or its parts do not fit each other.
    """
    loader = EngineLoader("eager", torch.device("cpu"), dtype, None)  # its engines are never loaded
    expert = load_expert(checkpoint, loader)
    engines = expert.engines()
    if checkpoint.has("vae"):
        vae = load_vae(checkpoint, loader, upcast=upcast)
        engines += [vae.decoder, vae.encoder]
    return {engine.component.name: engine.component for engine in engines}


def select_components(found: Mapping[str, T], names: Sequence[str], model: str) -> dict[str, T]:
    """The named ones of a model's components, in that order; all if `names` is empty.

    Raises:
        RequestError: the model has no such component.
    """
    unknown = [name for name in names if name not in found]
    if unknown:
        raise RequestError(f"{model} has no component {', '.join(unknown)}; it has {', '.join(found)}")
    return {name: found[name] for name in names or found}


def load_expert(
    checkpoint: Checkpoint,
    loader: EngineLoader,
    text_encoder: TextEncoder | None = None,
    text_encoder_2: TextEncoder | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Expert:
    """A checkpoint's UNet with the text encoders it was trained on.

    Args:
        text_encoder, text_encoder_2: shared by another expert, in place of the checkpoint's own.
        scheduler: fields that override those of the checkpoint's scheduler_config.json.

    Raises:
        CheckpointError: the parts do not fit each other.
        RequestError: `scheduler` has unknown fields or values.
    """
    config = UNetConfig.from_dict(checkpoint.config("unet"))
    index = checkpoint.model_index
    sdxl = config.takes_sizes
    overrides = {} if scheduler is None else scheduler
    aesthetic = sdxl and bool(index.get("requires_aesthetics_score", False))

    def encoder(name: str, shared: TextEncoder | None) -> TextEncoder | None:
        if checkpoint.has(name):
            return shared or _load_text_encoder(checkpoint, name, loader, sdxl=sdxl)
        # A refiner may come without its encoder, which is the base's second.
        return shared if name == "text_encoder_2" and sdxl else None

    text_encoder = encoder("text_encoder", text_encoder)
    text_encoder_2 = encoder("text_encoder_2", text_encoder_2)
    present = [x for x in (text_encoder, text_encoder_2) if x is not None]
    if not present:
        raise CheckpointError(
            f"{checkpoint.source} has no text encoder, and none was given to share; load it as refiner= of its base, "
            "or copy the base's text_encoder_2 and tokenizer_2 into it"
        )
    width = sum(x.width for x in present)
    if width != config.cross_attention_dim:
        raise CheckpointError(
            f"the text encoders of {checkpoint.source} give {width} channels and its UNet reads "
            f"{config.cross_attention_dim}; they do not belong together"
        )
    unet = loader.engine(_unet_component(checkpoint, config, loader, present[-1], aesthetic=aesthetic))
    return Expert(
        source=checkpoint.source,
        public_name=public_name(checkpoint.source),
        unet=unet,
        config=config,
        denoiser=Denoiser(unet, config.block_out_channels[0]),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        scheduler=scheduler_fields(checkpoint.config("scheduler"), overrides, stable_diffusion=not sdxl),
        overrides=overrides,
        aesthetic=aesthetic,
        zero_negative=sdxl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def load_refiner(
    checkpoint: Checkpoint, base: Expert, loader: EngineLoader, scheduler: Mapping[str, Any] | None = None
) -> Expert:
    """A refiner's expert. Its text encoder is the base's second if its own is equal, or its checkpoint has none.

    Raises:
        CheckpointError, RequestError: as of `load_expert`.
    """
    lent = None if checkpoint.has("text_encoder_2") else base.text_encoder_2
    return load_expert(checkpoint, loader, text_encoder_2=lent, scheduler=scheduler).sharing(base)


def _load_text_encoder(checkpoint: Checkpoint, name: str, loader: EngineLoader, *, sdxl: bool) -> TextEncoder:
    """One CLIP text encoder with its tokenizer.

    Args:
        name: `text_encoder` or `text_encoder_2`.
        sdxl: take the penultimate layer as it is, not the normalised last one.
    """
    raw = checkpoint.config(name)
    config = CLIPTextConfig.from_dict(raw)
    files = checkpoint.tokenizer_files(name.replace("text_encoder", "tokenizer"))
    source = _ModuleSource.of(
        checkpoint,
        name,
        {**raw, "normalize_sequence": not sdxl},
        lambda: CLIPTextEncoder(config, normalize_sequence=not sdxl),
        rename_clip_keys,
    )
    length = config.max_position_embeddings
    tokenizer = ClipTokenizer(files.vocab, files.merges, files.config, files.added)
    if tokenizer.context != length:
        raise CheckpointError(
            f"the tokenizer of {name} gives {tokenizer.context} tokens and the encoder reads {length}"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {name} has ids up to {tokenizer.vocab_size - 1} and the encoder knows "
            f"{config.vocab_size} tokens; they do not belong together"
        )
    pooled = config.projection_dim or config.hidden_size
    component = source.component(
        name,
        loader.dtype,
        inputs=(
            TensorSpec(
                "input_ids", ("batch", length), torch.int64, Values(0, config.vocab_size, last=tokenizer.end)
            ),
            TensorSpec("layer", (), torch.int64, Values(0, config.num_hidden_layers + 1)),
        ),
        outputs=(
            TensorSpec("sequence", ("batch", length, config.hidden_size), loader.dtype),
            TensorSpec("pooled", ("batch", pooled), loader.dtype),
        ),
        example_sizes={"batch": 2},
    )
    return TextEncoder(
        tokenizer=tokenizer,
        engine=loader.engine(component),
        num_layers=config.num_hidden_layers,
        skip=1 if sdxl else 0,
        width=config.hidden_size,
        pooled_width=pooled,
    )


def _unet_component(
    checkpoint: Checkpoint, config: UNetConfig, loader: EngineLoader, encoder: TextEncoder, *, aesthetic: bool
) -> Component:
    """The UNet as a component.

    Args:
        encoder: the text encoder whose pooled output conditions it.
        aesthetic: its size conditioning ends in an aesthetic score (five numbers), not in a target size (six).
    """
    dtype = loader.dtype
    inputs = [
        TensorSpec("sample", ("batch", config.in_channels, "height", "width"), dtype),
        TensorSpec("timestep", ("batch",), torch.float32, Values(0, 1000)),
        TensorSpec(
            "encoder_hidden_states", ("batch", encoder.tokenizer.context, config.cross_attention_dim), dtype
        ),
    ]
    if config.takes_sizes:
        numbers = 5 if aesthetic else 6
        channels = encoder.pooled_width + numbers * (config.addition_time_embed_dim or 0)
        if channels != config.projection_class_embeddings_input_dim:
            raise CheckpointError(
                f"the UNet of {checkpoint.source} reads {config.projection_class_embeddings_input_dim} channels of "
                f"text and sizes, and a pooled text of {encoder.pooled_width} with {numbers} numbers gives {channels}; "
                "is requires_aesthetics_score in model_index.json right?"
            )
        inputs.append(TensorSpec("text_embeds", ("batch", encoder.pooled_width), dtype))
        inputs.append(TensorSpec("time_ids", ("batch", numbers), torch.float32, Values(0, 1024)))
    if config.time_cond_proj_dim is not None:
        inputs.append(TensorSpec("timestep_cond", ("batch", config.time_cond_proj_dim), dtype))
    side = 2 ** len(config.block_out_channels)  # the coarsest level is two pixels high
    scale = VAEConfig.from_dict(checkpoint.config("vae")).scale if checkpoint.has("vae") else 8
    source = _ModuleSource.of(checkpoint, "unet", checkpoint.config("unet"), lambda: UNet(config))

    def build(name: str) -> nn.Module:
        part = PARTS[name]
        return replace(
            source,
            make=lambda: part(UNet(config)),
            rename=lambda key: f"unet.{key}" if part.has(key) else None,
        ).build(dtype)

    whole = source.component(
        "unet",
        dtype,
        inputs=tuple(inputs),
        outputs=(TensorSpec("prediction", ("batch", config.out_channels, "height", "width"), dtype),),
        example_sizes={"batch": 2, "height": side, "width": side + 2},
        native_size=_native_size(config, scale),
        latent_scale=scale,
    )
    return replace(whole, parts=lambda: unet_parts(whole, config, build))


def load_vae(checkpoint: Checkpoint, loader: EngineLoader, *, upcast: torch.dtype | None = None) -> VAE:
    """The VAE's decoder and encoder.

    Args:
        upcast: their dtype where float16 would overflow (`force_upcast`); by default the loader's back end's.
    """
    raw = checkpoint.config("vae")
    config = VAEConfig.from_dict(raw)
    overflows = config.force_upcast and loader.dtype == torch.float16
    dtype = (upcast or loader.backend.upcast) if overflows else loader.dtype
    scale = config.scale
    unet = UNetConfig.from_dict(checkpoint.config("unet"))
    # The UNet's, not the VAE's own, which may be smaller: their engines have to fit the same default size.
    sizes = {"native_size": _native_size(unet, scale), "latent_scale": scale}
    tf32 = overflows and dtype == torch.float32

    def half(name: str, make: Callable[[], nn.Module]) -> _ModuleSource:
        wanted = ("decoder.", "post_quant_conv.") if name == "vae_decoder" else ("encoder.", "quant_conv.")

        def rename(key: str) -> str | None:
            return rename_legacy_vae_keys(key) if key.startswith(wanted) else None

        return _ModuleSource.of(checkpoint, "vae", raw, make, rename)

    latents = TensorSpec("latents", ("batch", config.latent_channels, "height", "width"), dtype)
    decoder = half("vae_decoder", lambda: VAEDecoder(config)).component(
        "vae_decoder",
        dtype,
        inputs=(latents,),
        outputs=(TensorSpec("image", ("batch", 3, "image_height", "image_width"), dtype),),
        example_sizes={"batch": 2, "height": 8, "width": 10},
        tf32=tf32,
        **sizes,
    )
    encoder = half("vae_encoder", lambda: VAEEncoder(config)).component(
        "vae_encoder",
        dtype,
        inputs=(TensorSpec("image", ("batch", 3, "image_height", "image_width"), dtype),),
        outputs=(TensorSpec("moments", ("batch", 2 * config.latent_channels, "height", "width"), dtype),),
        example_sizes={"batch": 2, "image_height": 8 * scale, "image_width": 10 * scale},
        tf32=tf32,
        **sizes,
    )
    return VAE(
        decoder=loader.engine(decoder),
        encoder=loader.engine(encoder),
        dtype=dtype,
        scaling_factor=config.scaling_factor,
        channels=config.latent_channels,
        scale=scale,
    )


def _native_size(unet: UNetConfig, scale: int) -> int:
    """The longer side, in pixels, of the images that a UNet was trained for."""
    return scale * max(unet.latent_size)
