"""Pixels become files, and files become pixels.

A PNG carries what made it twice: `parameters`, the text AUTOMATIC1111's web UI writes and many tools read, and
`latentrt`, the same as JSON, which survives any prompt.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RequestError

__all__ = [
    "Images",
    "check_readable",
    "check_tensor",
    "from_tensor",
    "parse_parameters",
    "png_bytes",
    "read_parameters",
    "save_png",
    "to_tensor",
]

Images = list[PIL.Image.Image] | NDArray[np.float32] | Tensor
"""What `from_tensor` returns, by its `output_type`."""

_log = logging.getLogger(__name__)

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Of tensors that are given as pictures or latents."""

_LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "guidance_rescale": "CFG rescale",
    "eta": "Eta",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "refiner": "Refiner",
    "high_noise_frac": "Refiner switch at",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
    "backend": "Backend",
    "dtype": "Dtype",
    "vae_dtype": "VAE dtype",
    "tiled_vae": "Tiled VAE",
    "version": "Version",
}
_KEYS = {label: key for key, label in _LABELS.items()}
# One `Label: value` pair; a value with a comma, colon, quote or line break is written as a JSON string.
_PAIR = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def from_tensor(images: Tensor, output_type: str) -> Images:
    """Images in the form that the caller asked for.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        output_type: `pil` (a list of RGB images; NaN becomes black, with a warning), `np` (float32 `[B, H, W, 3]`)
            or `pt` (the tensor).
    """
    if output_type == "pt":
        return images
    images = images.detach().float()
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    # Rounded to 8 bits on the device: a quarter of the bytes to copy, and nothing left for the host to compute.
    broken = images.isnan().flatten(1).any(dim=1)
    eight_bit = images.nan_to_num().mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    pixels = eight_bit.cpu().numpy()
    if any(flags := broken.tolist()):
        _log.warning(
            "images %s contain NaN and are black there: the model may overflow in half precision; try dtype=float32",
            ", ".join(str(k) for k, flag in enumerate(flags) if flag),
        )
    return [PIL.Image.fromarray(row) for row in pixels]


def to_tensor(image: Any) -> Tensor:
    """Pictures to start from, as the VAE encoder wants them; latents pass through.

    Args:
        image: a PIL image, an array `[H, W, 3]` in [0, 1], a tensor `[3, H, W]` or `[B, 3, H, W]` in [0, 1],
            latents `[4, h, w]` or `[B, 4, h, w]`, or a list of any of these. PIL images are resized down to
            multiples of 8 pixels.

    Returns:
        float32 `[B, 3, H, W]` in [-1, 1], or the latents `[B, 4, h, w]`.

    Raises:
        RequestError: anything else, or pictures of several sizes.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise RequestError("image is an empty list; give at least one picture or latent")
        parts = [to_tensor(part) for part in image]
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise RequestError(f"the images of one call must have one size; got {sorted(shapes)}")
        return torch.cat(parts)
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image))
    if isinstance(image, Tensor):
        return _checked(image)
    raise RequestError(f"image must be a PIL image, an array, a tensor or a list of them; got {type(image)}")


def check_tensor(name: str, value: Tensor) -> None:
    """Refuse a tensor that is no picture and no latents, whatever its shape.

    Raises:
        RequestError: as of `check_readable`, or it holds NaN or infinite values.
    """
    check_readable(name, value)
    if not value.isfinite().all():
        raise RequestError(f"{name} cannot hold NaN or infinite values")


def check_readable(name: str, value: Tensor) -> None:
    """Refuse a tensor whose numbers are not there to read, or of a dtype that few operators of PyTorch take.

    Raises:
        RequestError: it is nested, sparse, quantized or on the meta device, or of complex numbers, eight-bit floats or
            wide unsigned integers.
    """
    if value.is_nested or value.is_meta or value.layout != torch.strided or value.dtype not in _DTYPES:
        kind = "nested, " if value.is_nested else ""
        raise RequestError(
            f"{name} is a tensor that cannot be read ({kind}{value.layout}, {value.dtype}, on {value.device}); pass a "
            "dense one of real numbers, such as x.to_dense().float()"
        )


def _from_pil(image: PIL.Image.Image) -> Tensor:
    width, height = (side - side % 8 for side in image.size)
    if not width or not height:
        raise RequestError(f"image is {image.size[0]}x{image.size[1]} pixels; it must be at least 8x8")
    rgb = _rgb(image)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.float32) / 255.0)
    return pixels.permute(2, 0, 1)[None] * 2 - 1


def _from_array(image: NDArray[Any]) -> Tensor:
    """float32 `[B, 3, H, W]`, values as they are."""
    array = image if image.ndim == 4 else image[None]
    if array.ndim != 4 or array.shape[-1] != 3:
        raise RequestError(f"an image array must be [H, W, 3] or [B, H, W, 3]; got {list(image.shape)}")
    if array.dtype.kind not in "biuf":
        raise RequestError(f"an image array must hold real numbers; got {array.dtype}")
    return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2)


def _checked(image: Tensor) -> Tensor:
    """Pixels in [0, 1] brought to [-1, 1], or latents as they are."""
    check_tensor("image", image)
    batch = image if image.ndim == 4 else image[None]
    if batch.ndim != 4 or batch.shape[1] not in (3, 4):
        raise RequestError(
            f"an image tensor must be [B, 3, H, W] pixels or [B, 4, h, w] latents; got {list(image.shape)}"
        )
    if not batch.shape[0]:
        raise RequestError("image holds no picture; give at least one")
    if batch.shape[1] == 4:
        return batch
    if batch.shape[2] % 8 or batch.shape[3] % 8 or 0 in batch.shape[2:]:
        raise RequestError(
            f"image is {batch.shape[3]}x{batch.shape[2]} pixels; both sides must be multiples of 8"
        )
    pixels = batch.detach().float()
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise RequestError(
            f"image pixels must be in [0, 1]; got {low:.3g} to {high:.3g} "
            "(for [0, 255] pass x / 255, for [-1, 1] pass x / 2 + 0.5)"
        )
    return pixels * 2 - 1


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """In RGB; deeper greyscale brought down to 8 bits, which Pillow would clip to white."""
    if image.mode in ("I", "F"):
        raise RequestError(
            f"image has Pillow's mode {image.mode!r}, which says no range; convert it to 'RGB', or pass an array"
        )
    try:  # what is opened is read only now
        if image.mode.startswith("I;16"):
            image = PIL.Image.fromarray((np.asarray(image) / 257.0).round().astype(np.uint8))
        return image.convert("RGB")
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # RuntimeError: of AVIF
        raise RequestError(
            f"image, of Pillow's mode {image.mode!r}, cannot be read: {error}; pass a whole one, open and in 'RGB'"
        ) from error


def _text(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if any(c in text for c in ',:"\n') else text


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """The `parameters` text in AUTOMATIC1111's syntax."""
    lines = [str(parameters.get("prompt", ""))]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    pairs = [
        f"{label}: {_text(parameters[key])}"
        for key, label in _LABELS.items()
        if parameters.get(key) is not None
    ]
    return "\n".join([*lines, ", ".join(pairs)])


def parse_parameters(text: str) -> dict[str, str]:
    """Read AUTOMATIC1111's `parameters` text, as far as that syntax can be told apart from the prompt."""
    *body, last = text.strip().split("\n")
    pairs = _pairs(last)
    if not any(label == "Steps" for label, _ in pairs):
        body, pairs = [*body, last], []
    joined = "\n".join(body)
    prompt, found, negative = joined.partition("\nNegative prompt:")
    if not found and joined.startswith("Negative prompt:"):
        prompt, negative = "", joined.removeprefix("Negative prompt:")
    result = {"prompt": prompt.strip()}
    if negative.strip():
        result["negative_prompt"] = negative.strip()
    for label, value in pairs:
        key = _KEYS.get(label.strip(), label.strip().lower().replace(" ", "_"))
        result[key] = _unquoted(value)
    return result


def _pairs(line: str) -> list[tuple[str, str]]:
    """`Label: value` pairs from the line's beginning on, up to where it is none."""
    pairs, at = [], 0
    while at < len(line) and (match := _PAIR.match(line, at)):
        pairs.append((match[1], match[2]))
        at = match.end()
    return pairs


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass  # another program's own way to quote
    return value.strip()


def png_bytes(image: PIL.Image.Image, parameters: Mapping[str, Any] | None = None) -> bytes:
    """A PNG in memory, with what made it embedded as text unless that is None."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_png_info(parameters))
    return buffer.getvalue()


def _png_info(parameters: Mapping[str, Any] | None) -> PIL.PngImagePlugin.PngInfo:
    info = PIL.PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", format_parameters(parameters))
        info.add_itxt("latentrt", json.dumps(dict(parameters), ensure_ascii=False, sort_keys=True))
    return info


def save_png(
    image: PIL.Image.Image, path: str | os.PathLike[str], parameters: Mapping[str, Any] | None
) -> Path:
    """Write a PNG atomically: to a temporary file beside it, then renamed.

    Args:
        image: what to save.
        path: the file; missing folders are made.
        parameters: what made it, embedded as text; None embeds nothing.

    Raises:
        OSError: the disk is full, or the path cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    info = _png_info(parameters)
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What made a PNG: latentrt's own record, else AUTOMATIC1111's text.

    Raises:
        RequestError: the file is missing, is no image, or carries no parameters.
    """
    try:
        with PIL.Image.open(path) as image:
            image.load()
            info: dict[Any, Any] = dict(image.info)
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {os.fspath(path)!r}") from error
    except (OSError, RuntimeError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise RequestError(f"{os.fspath(path)!r} cannot be read as an image: {error}") from error
    if "latentrt" in info:
        try:
            record = json.loads(info["latentrt"])
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the parameters in {os.fspath(path)!r} are damaged: {error}") from error
        if isinstance(record, dict) and record:
            return record
    if "parameters" in info:
        return dict(parse_parameters(str(info["parameters"])))
    raise RequestError(f"{os.fspath(path)!r} carries no generation parameters")
