"""Plain ONNX Runtime as a side: diffusers' own modules exported by PyTorch as they are, in diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RequestError
from ..runtime.engines.onnxruntime import open_session
from ..runtime.engines.registry import choose
from ..runtime.place import dtype_name
from .cases import Case
from .diffusers_side import DiffusersSide, load_pipelines

__all__ = ["export_plainly", "open_side"]

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


class _Exported:
    """An exported module: tensors in by name, tensors out in order."""

    def __init__(self, file: Path, device: torch.device) -> None:
        # The same setting as diffusers' convolutions: in a float16 case they run its float32 VAE in TF32.
        self._session = open_session(file, device, tf32=torch.backends.cudnn.allow_tf32)
        self._names = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._device = device

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        binding = self._session.io_binding()
        place, index = self._device.type, self._device.index or 0
        contiguous = [x.detach().contiguous() for x in tensors]
        for name, x in zip(self._names, contiguous, strict=True):
            binding.bind_input(name, place, index, _NUMPY[x.dtype], list(x.shape), x.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, place, index)
        if place == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [torch.utils.dlpack.from_dlpack(value) for value in binding.get_outputs()]


class _Text(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 77] -> the output whose pooled embedding diffusers takes, and the sequence that SDXL reads."""
        out = self.encoder(input_ids, output_hidden_states=True)
        return out[0], out.hidden_states[-2]


class _TextOutput:
    """The part of transformers' output that SDXL's pipelines read."""

    def __init__(self, first: Tensor, penultimate: Tensor) -> None:
        self._first = first
        self.hidden_states = (penultimate, None)

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise IndexError(index)
        return self._first


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": ids}
        prediction: Tensor = self.unet(
            sample, timestep, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return prediction


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return image


def open_side(case: Case, device: torch.device, dtype: torch.dtype, folder: Path) -> DiffusersSide:
    """Export what is not in `folder` yet, and replace the modules by sessions.

    Raises:
        RequestError: ONNX Runtime does not support the dtype.
        BackendUnavailableError: ONNX Runtime is not installed, or not for the device.
    """
    if dtype not in _NUMPY:
        name = dtype_name(dtype)
        raise RequestError(f"plain ONNX Runtime takes no {name}; measure it in float32 or float16")
    # Fails at once if there is no execution provider, and not after minutes of exports.
    choose("onnxruntime", device, dtype)
    base, refiner = load_pipelines(case, device, dtype)

    def exported(
        name: str, module: nn.Module, inputs: Mapping[str, Tensor], axes: Sequence[Sequence[int]]
    ) -> _Exported:
        return _Exported(_export(folder / name / "model.onnx", module, inputs, axes), device)

    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(base, name)
        ids = torch.full((2, 77), 1, dtype=torch.int64, device=device)
        session = exported(name, _Text(encoder), {"input_ids": ids}, [(0,)])
        _replace(encoder, _text_forward(session))
    channels = base.unet.config.in_channels
    for name, pipe in (("unet", base), ("refiner_unet", refiner)):
        if pipe is None:
            continue
        inputs = _unet_inputs(pipe.unet, pipe.text_encoder_2.config.projection_dim, channels, dtype, device)
        session = exported(name, _UNet(pipe.unet), inputs, [(0, 2, 3), (), (0,), (0,), (0,)])
        _replace(pipe.unet, _unet_forward(session))
    vae_dtype = base.vae.dtype
    latents = torch.zeros((2, base.vae.config.latent_channels, 16, 24), dtype=vae_dtype, device=device)
    decoder = exported("vae_decoder", _Decoder(base.vae), {"latents": latents}, [(0, 2, 3)])

    def decode(latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (decoder(latents.to(vae_dtype))[0],)

    base.vae.decode = decode
    _drop_weights(base.vae)
    return DiffusersSide(case, device, base, refiner, "PyTorch's exporter, ONNX Runtime's own optimisation")


def _export(
    file: Path, module: nn.Module, inputs: Mapping[str, Tensor], axes: Sequence[Sequence[int]]
) -> Path:
    """Export a module unless the file exists; `axes` are the dynamic axes of each input."""
    if file.is_file():
        return file
    partial = file.parent.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    letters = {0: "batch", 1: "channels", 2: "height", 3: "width"}
    dims = {name: torch.export.Dim(name) for name in letters.values()}
    shapes = tuple({axis: dims[letters[axis]] for axis in free} for free in axes)
    export_plainly(partial / file.name, module, inputs, dynamic_shapes=shapes)
    partial.rename(file.parent)
    return file


@torch.no_grad()
def export_plainly(file: Path, module: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> None:
    """PyTorch's export of a module as it is, with its example inputs by name; `options` as `torch.onnx.export` has
    them."""
    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        file,
        input_names=list(inputs),
        dynamo=True,
        opset_version=20,
        external_data=True,
        verbose=False,
        **options,
    )


def _unet_inputs(
    unet: Any, pooled: int, channels: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Example inputs: a batch of 2, as with guidance, and latents of 16 x 24."""
    config = unet.config
    numbers = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
    values = {
        "sample": torch.zeros((2, channels, 16, 24), dtype=dtype),
        "timestep": torch.tensor(500.0),
        "text": torch.zeros((2, 77, config.cross_attention_dim), dtype=dtype),
        "pooled": torch.zeros((2, pooled), dtype=dtype),
        "ids": torch.zeros((2, numbers), dtype=dtype),
    }
    return {name: value.to(device) for name, value in values.items()}


def _text_forward(session: _Exported) -> Callable[..., _TextOutput]:
    def forward(input_ids: Tensor, **_: Any) -> _TextOutput:
        return _TextOutput(*session(input_ids))

    return forward


def _unet_forward(session: _Exported) -> Callable[..., tuple[Tensor]]:
    def forward(
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor],
        **_: Any,
    ) -> tuple[Tensor]:
        pooled, ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        return (session(sample, timestep.float(), encoder_hidden_states, pooled, ids)[0],)

    return forward


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Run a session in place of the module."""
    module.forward = forward
    _drop_weights(module)


def _drop_weights(module: nn.Module) -> None:
    """Free the weights. Their empty parameters still tell the pipelines the device and the dtype."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
