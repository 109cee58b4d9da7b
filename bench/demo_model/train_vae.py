"""Stage "vae": the KL autoencoder, factor 8 and 4 latent channels, on crops and on whole scenes.

Whole ones too, because group norms look at the whole picture: a decoder that has seen busy crops alone takes the little
that stands out from a gray background for much, and tints and smears it. Fine detail counts more in the loss than its
share of the squares: without that the latents of an enlarged small original are those of the sharp picture, within
their noise, and the decoder takes the blur away.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from ..quality import as_input
from . import data
from .kept import MARK_FILE, SHARP, noted_of, save_vae, sharp_vae
from .loop import Run, Stage, console, train

CONFIG = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
    "force_upcast": True,
}
CROP = 64
BATCH = 8  # crops; a quarter as many whole scenes
WHOLE = 0.5  # share of the steps that take whole scenes
PICTURES = 4000
HELD_OUT_SEED = 900_000_000  # examples from here on are never trained on
KL_WEIGHT = 2e-5
LATENT_NOISE = (0.0, 0.08, 0.12)  # of their deviation, in the second half: the decoder meets inexact latents
FINE = 3.0  # weight of the squares of what a 5 x 5 mean takes away
EDGES = 0.2  # weight of the differences between neighbours


def stage_vae(run: Run) -> None:
    """Train the autoencoder and write it to `out/vae_sharp`, and to `out/vae`, where stage "soft" trains it on; one
    that it trained on stays there for as long as this one is the same."""
    torch.manual_seed(run.seed)
    vae = AutoencoderKL(**CONFIG).to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    pictures = [
        np.moveaxis(e.pixels, -1, 0)
        for e in data.examples(range(run.seed * PICTURES, (run.seed + 1) * PICTURES), damaged=0.1)
    ]
    batch = run.batch_of(BATCH)
    console.log(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        whole = bool(torch.rand(1, generator=generator) < WHOLE)
        chosen = _scenes(pictures, batch // 4, generator) if whole else _crops(pictures, batch, generator)
        x = chosen.to(run.device, memory_format=torch.channels_last)
        with run.autocast():
            mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30.0, 20.0)
            z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator).to(mean)
            if progress > 0.5:
                levels = torch.tensor(LATENT_NOISE)[torch.randint(3, (len(x), 1, 1, 1), generator=generator)]
                noise = levels * torch.randn(mean.shape, generator=generator)
                z = z + mean.detach().std() * noise.to(z)
            y = vae.decoder(vae.post_quant_conv(z)).float()
        squared = F.mse_loss(y, x)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        loss = squared + detail_loss(y - x) + KL_WEIGHT * kl / mean[0, 0].numel()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        return {"psnr": 10 * math.log10(4.0 / float(squared.detach())), "kl": float(kl.detach())}

    def report(steps: int) -> None:
        console.log(
            f"vae: step {steps}, {whole_scene_psnr(vae, 24, run.out / 'vae.png'):.2f} dB on whole held-out scenes"
        )

    train(run, Stage("vae", {"vae": vae}, optimiser, step, 1.5e-3, on_report=report, report_every=150.0))
    vae.eval()
    mean, deviation = _latent_statistics(vae)
    console.log(f"vae: latents' mean {mean:.3f}, deviation {deviation:.3f}")
    vae.register_to_config(scaling_factor=round(1.0 / deviation, 5))
    save_vae(vae, run.out / SHARP)
    if noted_of(run.out / MARK_FILE) != {"vae": sharp_vae(run.out)}:
        save_vae(vae, run.out / "vae")
    console.log(f"vae: {whole_scene_psnr(vae, 200, run.out / 'vae.png'):.2f} dB on 200 whole held-out scenes")


def detail_loss(error: torch.Tensor) -> torch.Tensor:
    """What an error [B, 3, H, W] costs besides its mean square: its size, its fine part, its edges."""
    fine = error - F.avg_pool2d(F.pad(error, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    edges = torch.diff(error, dim=-1).abs().mean() + torch.diff(error, dim=-2).abs().mean()
    return 0.3 * error.abs().mean() + FINE * fine.square().mean() + EDGES * edges


def _crops(pictures: list[np.ndarray], batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, 3, CROP, CROP] in [-1, 1]; of two candidate windows the busier one is taken."""
    draws = torch.rand(batch, 2, 3, generator=generator).tolist()
    crops = []
    for candidates in draws:
        picture = pictures[int(candidates[0][0] * len(pictures))]
        _, height, width = picture.shape
        windows = []
        for _, down, right in candidates:
            top, left = int(down * (height - CROP + 1)), int(right * (width - CROP + 1))
            windows.append(picture[:, top : top + CROP, left : left + CROP])
        crops.append(max(windows, key=lambda window: float(window[:, ::4, ::4].std())))
    return torch.from_numpy(np.stack(crops).astype(np.float32) / 127.5 - 1.0)


def _scenes(pictures: list[np.ndarray], batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, 3, H, W] in [-1, 1], of one canvas."""
    order = torch.randperm(len(pictures), generator=generator).tolist()
    shape = pictures[order[0]].shape
    rows = [pictures[k] for k in order[: 16 * batch] if pictures[k].shape == shape][:batch]
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 127.5 - 1.0)


@torch.no_grad()
def whole_scene_psnr(vae: AutoencoderKL, count: int, picture: Path | None = None) -> float:
    """Mean PSNR in dB (of the [0, 1] image, encoded to the mean) over whole held-out scenes."""
    device, total = vae.device, 0.0
    shown: list[torch.Tensor] = []
    for k in range(count):
        x = as_input([data.example(HELD_OUT_SEED + k).pixels]).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        total += 10 * math.log10(4.0 / float(F.mse_loss(y, x)))
        if x.shape[-2:] == (128, 128) and len(shown) < 8:
            shown.append(torch.cat([x[0], y[0]], dim=1).cpu())
    if picture is not None:
        grid = ((torch.cat(shown, dim=2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(grid).save(picture)
    return total / count


@torch.no_grad()
def _latent_statistics(vae: AutoencoderKL) -> tuple[float, float]:
    latents = []
    for k in range(100):
        x = as_input([data.example(k).pixels]).to(vae.device)
        latents.append(vae.encode(x).latent_dist.mode().flatten())
    values = torch.cat(latents).double()
    return float(values.mean()), float(values.std())
