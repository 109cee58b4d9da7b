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
# Guidance multiplies the difference that a caption and a score make, and where one step is all that is left, nothing
# corrects it. So on what is handed over it is the guided prediction that the refiner is trained for, of these scales,
# beside an empty caption with these scores.
GUIDANCE, NEGATIVE_SCORES = (1.0, 6.0), (1.0, 7.0)
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


class Examples:
    """What a UNet is trained on: tables of examples, and for the refiner those that its base hands over."""

    def __init__(self, run: Run, name: str, text: TextEncoders) -> None:
        self.run, self.name = run, name
        self.tables = [prepare(name, table, text) for table in load(run, name)]
        self.handed_over = (
            [prepare(name, table, text) for table in load_handovers(run)] if name == "refiner" else []
        )
        self.alpha_bar = EulerDiscreteScheduler(**SCHEDULER).alphas_cumprod.to(run.device)
        if name == "base":  # as SDXL: no caption is zeros
            self.no_sequence, self.no_pooled = torch.zeros((2, 1), device=run.device)
        else:
            sequence, pooled = text([""])
            self.no_sequence, self.no_pooled = sequence[0, :, text.widths[0] :], pooled[0]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw examples of one canvas: noised latents and their v, [B, 4, h, w], timesteps [B], and sequence, pooled
        and time ids. Where they are handed over, also guidance scales [B, 1, 1, 1] and what the negative prompt has for
        the last three; B is then half, since each row is predicted twice."""
        run = self.run
        handed = bool(self.handed_over) and float(torch.rand(1, generator=generator)) < HANDED_OVER
        table = _one_of(self.handed_over if handed else self.tables, generator)
        count = (run.batch + 1) // 2 if handed else run.batch
        chosen = torch.randint(len(table.latents), (count,), generator=generator)
        rows = chosen.to(run.device)
        x0, time_ids = table.latents[rows].float(), table.time_ids[rows].float()
        sequence, pooled = table.sequence[rows].float(), table.pooled[rows].float()
        no_sequence, no_pooled = self.no_sequence.expand_as(sequence), self.no_pooled.expand_as(pooled)
        guided: tuple[Tensor, ...] = ()
        if handed:
            guidance = _uniform(GUIDANCE, count, generator).to(run.device)
            scores = _uniform(NEGATIVE_SCORES, count, generator).to(run.device)
            negative = torch.cat([time_ids[:, :-1], scores[:, None]], dim=1)
            guided = (guidance.view(-1, 1, 1, 1), no_sequence, no_pooled, negative)
        else:
            dropped = (torch.rand(count, generator=generator) < DROPPED).to(run.device)
            sequence = torch.where(dropped[:, None, None], no_sequence, sequence)
            pooled = torch.where(dropped[:, None], no_pooled, pooled)
        if self.name == "base":
            noise, timesteps = base_draws(x0, generator)
        else:
            own = None if table.noise is None else table.noise[chosen].float()
            noise, timesteps = refiner_draws(x0, own, generator)
        noise, timesteps = noise.to(run.device), timesteps.to(run.device)
        signal = self.alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1)
        spread = (1 - self.alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1)
        x = (signal * x0 + spread * noise).to(memory_format=torch.channels_last)
        v = signal * noise - spread * x0
        return x, v, timesteps, sequence, pooled, time_ids, *guided


def _one_of(tables: list[Conditioning], generator: torch.Generator) -> Conditioning:
    """A table, the larger the likelier."""
    counts = torch.tensor([len(table.latents) for table in tables], dtype=torch.float32)
    return tables[int(torch.multinomial(counts, 1, generator=generator))]


def _uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)


def v_loss(
    unet: UNet2DConditionModel, x: Tensor, v: Tensor, timesteps: Tensor, *conditioning: Tensor
) -> Tensor:
    """Mean squared error of a batch of `Examples`, of the guided prediction where there is guidance."""
    sequence, pooled, time_ids, *guided = conditioning
    if not guided:
        return F.mse_loss(_predict(unet, x, timesteps, sequence, pooled, time_ids), v)
    guidance, *negative = guided
    both = (torch.cat(pair) for pair in zip(negative, (sequence, pooled, time_ids), strict=True))
    without, found = _predict(unet, torch.cat([x, x]), torch.cat([timesteps] * 2), *both).chunk(2)
    return F.mse_loss(without + guidance * (found - without), v)


def _predict(
    unet: UNet2DConditionModel,
    x: Tensor,
    timesteps: Tensor,
    sequence: Tensor,
    pooled: Tensor,
    time_ids: Tensor,
) -> Tensor:
    words = {"text_embeds": pooled, "time_ids": time_ids}
    v: Tensor = unet(x, timesteps, sequence, added_cond_kwargs=words, return_dict=False)[0]
    return v.float()


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
    examples = Examples(run, name, text)
    unet = UNet2DConditionModel(**unet_config(name, text.widths))
    unet.to(run.device, memory_format=torch.channels_last)
    console.log(f"{name}: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    ema = Ema(unet, 0.998)
    optimiser = Muon(unet, adam_for=("conv_in", "conv_out"), workers=run.workers)
    replicas = Replicas(unet, run.workers)

    def loss_of(module: UNet2DConditionModel, *batch: Tensor) -> Tensor:
        with run.autocast():
            return v_loss(module, *batch)

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        loss = replicas.backward(loss_of, *examples.batch(generator))
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
