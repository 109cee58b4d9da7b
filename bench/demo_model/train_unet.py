"""Stages "base" and "refiner": the two UNets over the encoded examples.

Both predict v (Salimans and Ho 2022): at high noise an epsilon prediction says almost nothing about the picture,
and a small model that must get layout and colours right early learns them several times faster from v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from ...runtime.sha256 import sha256_of
from .assemble import save_unet, write_pipelines
from .handover import handovers_made_from, load_handovers
from .latents import Encoded, TextEncoders, load, made_from
from .loop import Ema, Run, Stage, console, train
from .muon import Muon
from .replicas import Replicas
from .samples import sample_grid

DROPPED = 0.1  # share of examples without a caption, for guidance
OFFSET_NOISE = 0.07  # of unit noise, one value per channel: brightness is then not read off the noise
TIMESTEP_DRAWS = ([0.0, 0.07, 0.8, 1.0], [0, 200, 800, 1000])  # shares of the draws, timesteps
REFINER_BELOW = 220  # timesteps; generation hands over at 200
# The base hands over pictures whose colours are wrong in places; on drawings under white noise alone the refiner learns
# to trust them and not the caption. So half of its batches are what the base did hand over, turned to fresh noise by up
# to this angle, so that none is learnt by heart. In the others part of the noise is in patches of a quarter of the
# side, up to this share of unit noise.
HANDED_OVER, FRESH = 0.5, math.pi / 4
PATCHES, PATCH_NOISE = 4, 0.8
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
POOLED, TIME_IDS = 128, 32  # width of the pooled text, and of each size's embedding

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
COMMON: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_IDS,
    "norm_num_groups": 32,
}


def unet_config(name: str, widths: tuple[int, int]) -> dict[str, Any]:
    """SDXL's anatomy scaled down; `widths` are those of the text encoders."""
    if name == "base":
        return {
            **COMMON,
            "layers_per_block": 1,
            "block_out_channels": (64, 96, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 1),
            "attention_head_dim": (2, 3, 4),  # heads, not their size: diffusers' naming; heads are of 32
            "cross_attention_dim": sum(widths),
            "projection_class_embeddings_input_dim": POOLED + 6 * TIME_IDS,
        }
    return {
        **COMMON,
        "layers_per_block": 2,
        "block_out_channels": (64, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 2, 2),
        "cross_attention_dim": widths[1],
        "projection_class_embeddings_input_dim": POOLED + 5 * TIME_IDS,
    }


@dataclass
class Conditioning:
    """A canvas's latents and conditioning, in fp16 where training runs; row k of each belongs together."""

    latents: Tensor  # [N, 4, h, w]
    sequence: Tensor  # [N, 77, C]
    pooled: Tensor  # [N, P]
    time_ids: Tensor  # [N, 6] or [N, 5]
    noise: Tensor | None  # [N, 4, h, w], where it is not drawn


def prepare(name: str, table: Encoded, text: TextEncoders) -> Conditioning:
    """Encode a table's captions; the refiner reads the second encoder alone and the aesthetic score."""
    parts = [text(table.captions[k : k + 64]) for k in range(0, len(table.captions), 64)]
    sequence, pooled = (torch.cat([part[k].half() for part in parts]) for k in (0, 1))
    latents, sizes = table.latents.to(text.device), table.sizes.to(text.device)
    if name == "base":
        return Conditioning(latents, sequence, pooled, sizes[:, :6], table.noise)
    time_ids = torch.cat([sizes[:, :4], sizes[:, 6:]], dim=1)
    return Conditioning(latents, sequence[..., text.widths[0] :].contiguous(), pooled, time_ids, table.noise)


def base_draws(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and timesteps [B] for latents [B, 4, h, w]: timesteps are spread evenly, with more of them where layout and
    shapes are decided and fewer in the refiner's part."""
    noise = torch.randn(x0.shape, generator=generator)
    noise = noise + OFFSET_NOISE * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
    even = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    return noise, torch.from_numpy(np.interp(even, *TIMESTEP_DRAWS)).long().clamp(max=999)


def refiner_draws(x0: Tensor, handed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and timesteps [B] for latents [B, 4, h, w], with more timesteps near the hand-over, where shapes and
    colours can still change; the noise is from `handed` where there is one."""
    noise = torch.randn(x0.shape, generator=generator)
    if handed is None:
        strength = PATCH_NOISE * torch.rand((len(x0), 1, 1, 1), generator=generator)
        patches = torch.randn((*x0.shape[:2], PATCHES, PATCHES), generator=generator)
        noise = noise + strength * F.interpolate(patches, x0.shape[2:], mode="bilinear")
    else:
        angle = FRESH * torch.rand((len(x0), 1, 1, 1), generator=generator)
        noise = angle.cos() * handed + angle.sin() * noise
    even = torch.rand(len(x0), generator=generator)
    return noise, (REFINER_BELOW * even.sqrt()).long().clamp(max=REFINER_BELOW - 1)


def stage_base(run: Run) -> None:
    """Train the base UNet and write the pipeline folders."""
    train_unet(run, "base", 3.0e-3)


def stage_refiner(run: Run) -> None:
    """Train the refiner UNet and write the pipeline folders."""
    train_unet(run, "refiner", 3.0e-3)


def train_unet(run: Run, name: str, peak_rate: float) -> None:
    """Train one UNet on all its canvases and save its averaged weights."""
    torch.manual_seed(run.seed)
    text = TextEncoders(run.out, run.device)
    tables = [prepare(name, table, text) for table in load(run, name)]
    handed_over = [prepare(name, table, text) for table in load_handovers(run)] if name == "refiner" else []
    unet = UNet2DConditionModel(**unet_config(name, text.widths))
    unet.to(run.device, memory_format=torch.channels_last)
    console.log(f"{name}: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    ema = Ema(unet, 0.998)
    optimiser = Muon(unet, adam_for=("conv_in", "conv_out"), workers=run.workers)
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    alpha_bar = scheduler.alphas_cumprod.to(run.device)
    if name == "base":  # as SDXL: no caption is zeros
        no_sequence, no_pooled = torch.zeros((2, 1), dtype=torch.float16, device=run.device)
    else:
        sequence, pooled = text([""])
        no_sequence, no_pooled = sequence[0, :, text.widths[0] :].half(), pooled[0].half()
    replicas = Replicas(unet, run.workers)

    def loss_of(
        module: UNet2DConditionModel, x: Tensor, target: Tensor, timesteps: Tensor, *text: Tensor
    ) -> Tensor:
        sequence, pooled, time_ids = text
        with run.autocast():
            v = module(
                x,
                timesteps,
                sequence,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                return_dict=False,
            )[0]
        return F.mse_loss(v.float(), target)

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        handed = handed_over and float(torch.rand(1, generator=generator)) < HANDED_OVER
        kinds = handed_over if handed else tables
        counts = torch.tensor([len(table.latents) for table in kinds], dtype=torch.float32)
        table = kinds[int(torch.multinomial(counts, 1, generator=generator))]
        chosen = torch.randint(len(table.latents), (run.batch,), generator=generator)
        rows = chosen.to(run.device)
        dropped = (torch.rand(run.batch, generator=generator) < DROPPED).to(run.device)
        sequence = torch.where(dropped[:, None, None], no_sequence, table.sequence[rows]).float()
        pooled = torch.where(dropped[:, None], no_pooled, table.pooled[rows]).float()
        time_ids, x0 = table.time_ids[rows].float(), table.latents[rows].float()
        if name == "base":
            noise, timesteps = base_draws(x0, generator)
        else:
            noise, timesteps = refiner_draws(
                x0, None if table.noise is None else table.noise[chosen].float(), generator
            )
        noise, timesteps = noise.to(run.device), timesteps.to(run.device)
        signal = alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1)
        spread = (1 - alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1)
        x = (signal * x0 + spread * noise).to(memory_format=torch.channels_last)
        target = signal * noise - spread * x0
        loss = replicas.backward(loss_of, x, target, timesteps, sequence, pooled, time_ids)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        return {"loss": loss}

    def save() -> None:
        with ema.applied():
            save_unet(unet, run.out / ("unet" if name == "base" else "refiner_unet"))
            write_pipelines(run.out, SCHEDULER)

    def report(steps: int) -> None:
        save()
        sample_grid(run.out / "demo", run.out / f"{name}_{steps:06d}.png", refine=name == "refiner")

    stage = Stage(
        name,
        {"unet": unet},
        optimiser,
        step,
        peak_rate,
        ema={"unet": ema},
        on_report=report,
        report_every=600.0,
        made_from=(made_from(run) if name == "base" else handovers_made_from(run))
        | {part: sha256_of(run.out / part / "model.safetensors") for part in TEXT_ENCODERS},
    )
    train(run, stage)
    save()
