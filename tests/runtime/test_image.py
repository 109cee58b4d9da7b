"""Pixels and files: what may be given to start from, and what a PNG tells."""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch
from helpers.faults import disk_full
from latentrt.errors import RequestError
from latentrt.runtime.image import (
    check_tensor,
    format_parameters,
    from_tensor,
    parse_parameters,
    read_parameters,
    save_png,
    to_tensor,
)
from tolerances import PIXELS, PIXELS_FROM_HALF
from torch import Tensor

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
RECORD: dict[str, Any] = {
    "prompt": "a red circle above a small blue square",
    "negative_prompt": "blurry",
    "steps": 30,
    "sampler": "dpm++2m-karras",
    "guidance_scale": 5.0,
    "seed": 0,
    "size": "128x96",
    "model": "demo",
    "refiner": "demo-refiner",
    "high_noise_frac": 0.8,
    "backend": "onnxruntime",
    "dtype": "float16",
    "vae_dtype": "float32",
    "tiled_vae": True,
    "version": "latentrt 0.1.0",
}
HOSTILE = [
    "a, b, c: d",
    "first line\nsecond line\r\nthird",
    "x\nNegative prompt: not a negative one\nSteps: 3, Sampler: fake, Seed: 7",
    "Negative prompt: from the start",
    "Steps: 3",
    'quotes " and \\ and \\" and \\u0041 and {"prompt": 1}',
    "日本語 🙂 é e\u0301 \u202e \u200d ½",
    "",
    " spaces around ",
    "nul \0 and \x1b[2J and \x7f",
    "<b>&amp;</b> %s %(x)s {0}",
    "long " * 5000,
]


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("negative", [None, *HOSTILE[2:5]], ids=["none", 2, 3, 4])
def test_any_prompt_is_read_back_from_a_png(prompt: str, negative: str | None, tmp_path: Path) -> None:
    record = {**RECORD, "prompt": prompt, "negative_prompt": negative}
    save_png(PICTURE, tmp_path / "x.png", record)
    assert read_parameters(tmp_path / "x.png") == record


def test_pixels_are_kept(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "x.png", RECORD)
    with PIL.Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(PICTURE))


def test_other_tools_find_the_text_they_know(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "x.png", RECORD)
    with PIL.Image.open(tmp_path / "x.png") as image:
        text = image.info["parameters"]
    assert text == (
        "a red circle above a small blue square\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: dpm++2m-karras, CFG scale: 5.0, Seed: 0, Size: 128x96, Model: demo, "
        "Refiner: demo-refiner, Refiner switch at: 0.8, Backend: onnxruntime, "
        "Dtype: float16, VAE dtype: float32, Tiled VAE: True, Version: latentrt 0.1.0"
    )
    assert parse_parameters(text) == {key: str(value) for key, value in RECORD.items()}


def test_values_with_commas_are_quoted() -> None:
    record = {"prompt": "x", "steps": 2, "model": 'my, "best": model\n2', "seed": 1}
    parsed = parse_parameters(format_parameters(record))
    assert parsed == {"prompt": "x", "steps": "2", "model": 'my, "best": model\n2', "seed": "1"}


def test_text_of_the_web_ui_is_read(tmp_path: Path) -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a castle, (detailed:1.2)\non a hill\nNegative prompt: lowres, bad\nSteps: 20, Sampler: Euler a, CFG scale: 7, "
        'Seed: 42, Size: 512x768, Model hash: 1a2b, Lora hashes: "one: aa, two: bb", Version: v1.9',
    )
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    assert read_parameters(tmp_path / "x.png") == {
        "prompt": "a castle, (detailed:1.2)\non a hill",
        "negative_prompt": "lowres, bad",
        "steps": "20",
        "sampler": "Euler a",
        "guidance_scale": "7",
        "seed": "42",
        "size": "512x768",
        "model_hash": "1a2b",
        "lora_hashes": "one: aa, two: bb",
        "version": "v1.9",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("only a prompt", {"prompt": "only a prompt"}),
        ("time: noon, place: hill", {"prompt": "time: noon, place: hill"}),
        (
            r"x" + "\n" + r'Steps: 1, Odd: "a\q", Seed: 2',
            {"prompt": "x", "steps": "1", "odd": r'"a\q"', "seed": "2"},
        ),
        ("", {"prompt": ""}),
        ("Steps: 4", {"prompt": "", "steps": "4"}),
    ],
)
def test_other_texts_are_read_as_far_as_they_go(text: str, expected: dict[str, str]) -> None:
    assert parse_parameters(text) == expected


@pytest.mark.parametrize(
    "text", ["w " * 200_000, "Steps: 1, " + "w" * 400_000, "Steps: 1, x: " + '"\\' * 200_000]
)
def test_reading_takes_no_longer_than_the_text(text: str) -> None:
    begun = time.process_time()
    parse_parameters(text)
    assert time.process_time() - begun < 2


def test_nothing_is_embedded_when_nothing_is_to_be(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "x.png", None)
    with PIL.Image.open(tmp_path / "x.png") as image:
        image.load()
        assert image.info == {}
    with pytest.raises(RequestError, match="carries no generation parameters"):
        read_parameters(tmp_path / "x.png")


def png_with(record: str) -> bytes:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("latentrt", record)
    file = io.BytesIO()
    PICTURE.save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an image"),
        (b"not a picture", "cannot be read as an image"),
        (png_with("{}")[:80], "cannot be read as an image"),
        (png_with("{broken"), "are damaged"),
        (png_with("[" * 100_000), "are damaged"),
        (png_with("[1]"), "carries no generation parameters"),
        (png_with("{}"), "carries no generation parameters"),
    ],
)
def test_files_without_parameters(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_parameters(tmp_path / "x.png")


def test_a_picture_too_large_to_unpack(tmp_path: Path) -> None:
    header = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    chunk = b"IHDR" + header
    file = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    (tmp_path / "x.png").write_bytes(file + b"\0\0\0\0IEND\xaeB`\x82")
    with pytest.raises(RequestError, match="cannot be read as an image"):
        read_parameters(tmp_path / "x.png")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file"):
        read_parameters(tmp_path / "x.png")
    with pytest.raises(RequestError, match="cannot be read as an image"):
        read_parameters(tmp_path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), disk_full()])
def test_a_png_is_written_whole_or_not_at_all(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "x.png"
    save_png(PICTURE, target, RECORD)
    before = target.read_bytes()

    def half(self: PIL.Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half a picture")
        file.flush()
        raise failure

    monkeypatch.setattr(PIL.Image.Image, "save", half)
    with pytest.raises(type(failure)):
        save_png(PICTURE, target, RECORD)
    assert [p.name for p in target.parent.iterdir()] == ["x.png"]
    assert target.read_bytes() == before


def test_the_longest_name_a_folder_takes(tmp_path: Path) -> None:
    """Prompts are used as names; the file aside must not need a longer one."""
    assert save_png(PICTURE, tmp_path / f"{'n' * 251}.png", None).is_file()


def test_a_png_can_be_read_by_those_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a moment at which other threads write files that everyone may change."""
    monkeypatch.delattr(os, "umask")
    path = save_png(PICTURE, tmp_path / "x.png", None)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_latents_pass_through() -> None:
    latents = torch.randn(2, 4, 5, 7)
    assert to_tensor(latents) is latents
    assert torch.equal(to_tensor([latents[0], latents[1]]), latents)


def test_all_forms_of_a_picture_mean_the_same() -> None:
    array = np.asarray(PICTURE, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = tensor[None] * 2 - 1
    for form in (
        PICTURE,
        array,
        array[None],
        tensor,
        tensor[None],
        [PICTURE],
        [tensor],
        (array,),
        tensor.double(),
    ):
        assert torch.allclose(to_tensor(form), wanted, atol=PIXELS)
        assert to_tensor(form).dtype == torch.float32
    assert torch.equal(to_tensor([PICTURE, PICTURE]), to_tensor(PICTURE).repeat(2, 1, 1, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_other_modes_become_rgb(mode: str) -> None:
    picture = PIL.Image.new(mode, (19, 26))
    assert to_tensor(picture).shape == (1, 3, 24, 16)


def test_sixteen_bits_of_grey_keep_their_shades() -> None:
    """Pillow would clip all but the darkest 256 of them to white."""
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = to_tensor(PIL.Image.fromarray(grey))
    assert np.abs(pixels[0, 0].numpy() / 2 + 0.5 - grey / 65535).max() <= 0.51 / 255
    assert torch.equal(pixels[:, 0], pixels[:, 2])


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2"])
def test_arrays_in_any_layout(dtype: str) -> None:
    array = np.broadcast_to(np.linspace(0, 1, 8).astype(dtype)[:, None, None], (8, 16, 3))
    assert torch.allclose(to_tensor(array)[0, 1, :, 5], torch.linspace(-1, 1, 8), atol=PIXELS_FROM_HALF)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIL.Image.new("I", (8, 8)), "mode 'I', which says no range; convert it to 'RGB'"),
        (PIL.Image.new("F", (8, 8)), "mode 'F', which says no range"),
        (np.zeros((8, 8, 3), object), "must hold real numbers; got object"),
        (np.zeros((8, 8, 3), complex), "must hold real numbers; got complex128"),
        ([], "image is an empty list"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)], "must have one size; got"),
        (PIL.Image.new("RGB", (7, 64)), "image is 7x64 pixels; it must be at least 8x8"),
        (np.zeros((64, 64)), r"must be \[H, W, 3\] or \[B, H, W, 3\]; got \[64, 64\]"),
        (np.zeros((8, 8, 3), np.uint8) + 255, r"in \[0, 1\]; got 255 to 255 .for \[0, 255\] pass x / 255"),
        (torch.zeros(1, 9, 8, 8), r"\[B, 4, h, w\] latents; got \[1, 9, 8, 8\]"),
        (torch.zeros(3, 12, 8), "image is 8x12 pixels; both sides must be multiples of 8"),
        (torch.zeros(3, 0, 8), r"image is 8x0 pixels"),
        (np.zeros((0, 8, 8, 3)), "image holds no picture; give at least one"),
        (torch.zeros(0, 3, 8, 8), "image holds no picture; give at least one"),
        (torch.full((3, 8, 8), torch.nan), "cannot hold NaN"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "complex"),
        (torch.full((3, 8, 8), -0.5), r"in \[0, 1\]; got -0.5 to -0.5"),
        (None, "got <class 'NoneType'>"),
        ("x.png", "got <class 'str'>"),
    ],
)
def test_what_is_no_picture(image: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        to_tensor(image)


UNREADABLE = {
    "meta": lambda: torch.zeros(1, 4, 8, 8, device="meta"),
    "sparse": lambda: torch.zeros(1, 4, 8, 8).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(4, 8, 8)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(8, 8)], layout=torch.jagged),
    "float8_e4m3fn": lambda: torch.zeros(1, 4, 8, 8).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.uint16),
    "quint8": lambda: torch.quantize_per_tensor(torch.zeros(1, 4, 8, 8), 1.0, 0, torch.quint8),
    "complex64": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_that_cannot_be_read(kind: str) -> None:
    value = UNREADABLE[kind]()
    for refuse in (to_tensor, lambda image: to_tensor([torch.zeros(1, 4, 8, 8), image])):
        with pytest.raises(RequestError, match=rf"image .* cannot be read \(.*{kind}.* x.to_dense\(\).float"):
            refuse(value)
    with pytest.raises(RequestError, match=r"latents .* cannot be read .* pass a dense one of real numbers"):
        check_tensor("latents", value)


@pytest.mark.filterwarnings("error")
def test_a_picture_with_a_gradient() -> None:
    assert to_tensor(torch.ones(3, 8, 8, requires_grad=True)).equal(torch.ones(1, 3, 8, 8))


def opened(form: str, share: float = 1.0) -> PIL.Image.Image:
    """A file's picture, which Pillow reads when it is asked for it; of the file's beginning only."""
    file = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 30).convert("RGB").save(file, form)
    return PIL.Image.open(io.BytesIO(file.getvalue()[: int(file.tell() * share)]))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF"])
def test_pictures_that_cannot_be_read(form: str) -> None:
    assert to_tensor(opened(form)).shape == (1, 3, 64, 64)
    closed = opened(form)
    closed.close()
    for image in (opened(form, 0.5), closed):
        with pytest.raises(RequestError, match=r"image, of .*'RGB', cannot be read: .*; pass a whole one"):
            to_tensor(image)


def test_a_mode_that_does_not_become_rgb() -> None:
    with pytest.raises(RequestError, match=r"mode 'La', cannot be read: .* in 'RGB'"):
        to_tensor(PIL.Image.new("La", (8, 8)))


def test_a_decoder_of_pillow_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of AVIF does, by an error of its own."""
    image = opened("PNG")
    monkeypatch.setattr(image, "convert", Mock(side_effect=RuntimeError("Failed to decode frame 0")))
    with pytest.raises(RequestError, match="cannot be read: Failed to decode frame 0; pass a whole one"):
        to_tensor(image)


def test_pixels_round_to_the_nearest() -> None:
    values = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    (image,) = from_tensor(values, "pil")
    assert np.asarray(image)[..., 0].tolist() == [[0, 0], [1, 255]]


def test_pictures_are_numpy_s_to_the_bit_and_come_to_the_host_as_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.rand(2, 3, 200, 300, generator=torch.Generator().manual_seed(0))
    halves = torch.arange(256) + 0.5  # round to even
    images[0, 0, 0, :256] = halves / 255
    wanted = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    came: list[torch.dtype] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: came.append(self.dtype) or cpu(self))
    pictures = from_tensor(images.clone(), "pil")
    assert came == [torch.uint8]
    for picture, pixels in zip(pictures, wanted, strict=True):
        assert np.array_equal(np.asarray(picture), pixels)
    given = images.clone()
    from_tensor(given, "pil")
    assert given.equal(images)  # left as they are


@pytest.mark.filterwarnings("error")
def test_black_by_overflow_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.full((3, 3, 8, 8), 0.5)
    from_tensor(images, "pil")
    assert not caplog.messages
    images[1, :, 2, 3] = torch.nan
    pictures = from_tensor(images, "pil")
    assert "images 1 contain NaN and are black there" in caplog.text
    assert [picture.getpixel((3, 2)) for picture in pictures] == [(128,) * 3, (0,) * 3, (128,) * 3]


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    """Anything that reads JSON can read it, whatever the prompt's script."""
    save_png(PICTURE, tmp_path / "x.png", {**RECORD, "prompt": "日本"})
    with PIL.Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.info["latentrt"])["prompt"] == "日本"
