"""Stage "latents": encode the training examples once, with their conditioning, for both UNets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..quality import as_input
from . import data
from .kept import SHARP, is_made_from, note_made_from, sharp_vae
from .loop import Run, console, read_checkpoint
from .scenes import CANVASES
from .tokenizer import DEMO, MAX_LENGTH
from .train_soft import mark_of

BATCH = 20
REFINER_SEED = 500_000_000  # the refiner's examples begin here
REFINER_SHARE = 0.2  # refiner's examples per base example


@dataclass
class Encoded:
    """Examples of one canvas: scaled latents [N, 4, h, w] and what goes with row k; with `noise` [N, 4, h, w], the one
    they are to be learnt from, else any."""

    latents: Tensor
    captions: list[str]
    sizes: Tensor  # [N, 7]: original h, w, crop top, left, target h, w, aesthetic score
    noise: Tensor | None = None


def stage_latents(run: Run) -> None:
    """Write `out/latents/base.pt` and `refiner.pt`."""
    for name in ("base", "refiner"):
        load(run, name)


def load(run: Run, name: str) -> list[Encoded]:
    """The encoded examples of "base" or "refiner", a table per canvas; encoded first where they are not yet, or from
    another VAE or mark, or are other ones.

    Raises:
        RequestError: the UNet was begun with another seed; there is no VAE, or the mark is of another one.
    """
    read_checkpoint(run, name)  # before what it was trained on is overwritten
    path = run.out / "latents" / f"{name}.pt"
    wanted = made_from(run)
    if not is_made_from(path, wanted):
        vae = AutoencoderKL.from_pretrained(run.out / SHARP)
        vae.to(run.device).eval()
        offset = run.seed * run.examples
        if name == "base":
            seeds, damaged = range(offset, offset + run.examples), 0.0
        else:
            count = int(run.examples * REFINER_SHARE)
            seeds, damaged = range(REFINER_SEED + offset, REFINER_SEED + offset + count), data.DAMAGED
        tables = encode(vae, seeds, damaged, mark_of(run.out), f"latents for the {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save([(t.latents, t.captions, t.sizes) for t in tables], temporary)
        temporary.replace(path)
        note_made_from(path, wanted)
        console.log(f"latents: {len(seeds)} examples for the {name}")
    return [Encoded(*row) for row in torch.load(path, weights_only=True)]


def made_from(run: Run) -> dict[str, Any]:
    """What the encoded examples depend on."""
    mark = mark_of(run.out).flatten().tolist()
    return {"vae": sharp_vae(run.out), "mark": mark, "seed": run.seed, "examples": run.examples}


@torch.no_grad()
def encode(vae: AutoencoderKL, seeds: range, damaged: float, mark: Tensor, title: str) -> list[Encoded]:
    """Draw and encode examples; latents are means, scaled to unit deviation, in fp16.

    `vae` is the one of before stage "soft"; latents of enlarged small originals get `mark`, which the encoder of after
    it makes roughly.
    """
    waiting: dict[tuple[int, int], list[data.Example]] = {canvas: [] for canvas in CANVASES}
    done: dict[tuple[int, int], list[tuple[Tensor, data.Example]]] = {canvas: [] for canvas in CANVASES}

    def flush(canvas: tuple[int, int]) -> None:
        examples = waiting[canvas]
        if examples:
            x = as_input([e.pixels for e in examples]).to(vae.device)
            z = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
            small = torch.tensor([e.original[0] < canvas[0] for e in examples], device=z.device)
            z = z + small.view(-1, 1, 1, 1) * mark.to(z)
            blank = [data.without_pixels(e) for e in examples]
            done[canvas].extend(zip(z.half().cpu(), blank, strict=True))
            examples.clear()

    drawn = data.examples(seeds, damaged=damaged)
    for seed, example in track(zip(seeds, drawn, strict=True), title, total=len(seeds)):
        canvas = data.canvas_of(seed)
        waiting[canvas].append(example)
        if len(waiting[canvas]) == BATCH:
            flush(canvas)
    tables = []
    for canvas in CANVASES:
        flush(canvas)
        sizes = [[*e.original, *e.crop, *canvas, e.aesthetic] for _, e in done[canvas]]
        latents = torch.stack([z for z, _ in done[canvas]])
        tables.append(Encoded(latents, [e.caption for _, e in done[canvas]], torch.tensor(sizes)))
    return tables


class TextEncoders:
    """Both frozen encoders: captions -> (sequence [B, 77, C1 + C2], pooled [B, P]) as SDXL reads them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizers = [CLIPTokenizer.from_pretrained(DEMO / n) for n in ("tokenizer", "tokenizer_2")]
        self.first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.second = CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder_2", dtype=torch.float32
        )
        self.first.to(device).eval()
        self.second.to(device).eval()
        self.widths = (self.first.config.hidden_size, self.second.config.hidden_size)
        self.device = device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Encode a batch of captions."""
        states = []
        for tokenizer, encoder in zip(self.tokenizers, (self.first, self.second), strict=True):
            tokens = tokenizer(
                captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
            )
            out = encoder(tokens["input_ids"].to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
        return torch.cat(states, dim=-1), out.text_embeds
