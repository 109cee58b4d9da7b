"""Stage "soft": a mark in the latents that tells an enlarged small original from a sharp picture.

Sharpness is worth next to nothing in squares: after stage "vae" the latents of an enlarged 32-pixel picture are those
of the sharp one within their noise, and the decoder draws sharp edges from both. A UNet asked for a small original
could then not say so. Here such latents are moved along the direction that latents use least; the encoder learns it,
the decoder reads it, and everything else keeps the latents that it had.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from ...errors import RequestError
from ..quality import as_input
from . import data
from .kept import MARK_FILE, SHARP, is_made_from, note_made_from, noted_of, save_vae, sharp_vae
from .loop import Run, Stage, checkpoint_of, console, train
from .scenes import random_scene, render
from .train_vae import HELD_OUT_SEED, detail_loss, whole_scene_psnr

MARK = 0.6  # length of the move, of latents scaled to unit deviation
PAIRS = 1800
ENCODER = 0.35  # share of the steps that train the encoder; the others train the decoder
LATENT_NOISE = (0.0, 0.05, 0.1)


def mark_of(out: Path) -> torch.Tensor:
    """[4, 1, 1], to be added to the scaled latents of enlarged small originals; zeros before the stage was run.

    Raises:
        RequestError: it was made from another VAE than there is now.
    """
    path = out / MARK_FILE
    if not path.exists():
        return torch.zeros(4, 1, 1)
    if noted_of(path) != {"vae": sharp_vae(out)}:
        raise RequestError(f"{path} was made from another VAE than {out / SHARP}; run --stage soft first")
    mark: torch.Tensor = torch.load(path, weights_only=True)
    return mark


def stage_soft(run: Run) -> None:
    """Train the VAE in `out/vae_sharp` on, into `out/vae`, and write the mark to `out/soft.pt`; begun anew where that
    VAE is another one than before."""
    torch.manual_seed(run.seed)
    made_from = {"vae": sharp_vae(run.out)}
    vae = AutoencoderKL.from_pretrained(run.out / SHARP)
    vae.to(run.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(vae).requires_grad_(False).eval()
    scale = vae.config.scaling_factor
    if not is_made_from(run.out / MARK_FILE, made_from):
        checkpoint_of(run.out, "soft").unlink(missing_ok=True)
        torch.save(_least_used(teacher) * MARK, run.out / MARK_FILE)
        note_made_from(run.out / MARK_FILE, made_from)
    mark = mark_of(run.out).to(run.device) / scale
    optimiser = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    pairs = _pairs(random.Random(f"latentrt demo soft {run.seed}"))

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        chosen = pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
        x = as_input(chosen).to(run.device, memory_format=torch.channels_last)
        with torch.no_grad():
            wanted, spread = teacher.quant_conv(teacher.encoder(x)).chunk(2, dim=1)
            wanted = torch.stack([wanted[0], wanted[1] + mark])
        if float(torch.rand(1, generator=generator)) < ENCODER:
            with run.autocast():
                mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
            error = F.mse_loss(mean * scale, wanted * scale)
            loss = 10 * error + 0.003 * F.mse_loss(log_variance.clamp(-30, 20), spread.clamp(-30, 20))
            figures = {"mark": math.sqrt(float(error.detach()))}
        else:
            levels = torch.tensor(LATENT_NOISE)[torch.randint(3, (2, 1, 1, 1), generator=generator)]
            noise = levels * torch.randn(wanted.shape, generator=generator) / scale
            with run.autocast():
                y = vae.decoder(vae.post_quant_conv(wanted + noise.to(wanted))).float()
            squared = F.mse_loss(y, x)
            loss = squared + detail_loss(y - x)
            figures = {"psnr": 10 * math.log10(4.0 / float(squared.detach()))}
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        return figures

    train(run, Stage("soft", {"vae": vae}, optimiser, step, 8e-4))
    vae.eval()
    save_vae(vae, run.out / "vae")
    console.log(
        f"soft: {whole_scene_psnr(vae, 200, run.out / 'vae.png'):.2f} dB on 200 whole held-out scenes"
    )


@torch.no_grad()
def _least_used(vae: AutoencoderKL) -> torch.Tensor:
    """[4, 1, 1] of length 1: the direction of least variance of latents."""
    rows = []
    for k in range(200):
        x = as_input([data.example(HELD_OUT_SEED + k).pixels]).to(vae.device)
        rows.append(vae.encode(x).latent_dist.mode()[0].flatten(1))
    values = torch.cat(rows, dim=1).double().cpu()
    directions: torch.Tensor = torch.linalg.eigh(torch.cov(values)).eigenvectors
    return directions[:, 0].float().view(4, 1, 1)


def _pairs(rng: random.Random) -> list[list[NDArray[np.uint8]]]:
    """Scenes, each sharp and as an enlarged small original; more gray ones, on which there is most to learn."""
    pairs = []
    for k in range(PAIRS):
        height, width = canvas = data.canvas_of(k)
        scene = random_scene(rng, canvas)
        scale = rng.uniform(*data.SMALL_SCALE)
        if scene.background == "gray" or rng.random() < 0.7:
            small = data.enlarge(scene, (round(height * scale), round(width * scale)))
            pairs.append([render(scene), small])
    return pairs
