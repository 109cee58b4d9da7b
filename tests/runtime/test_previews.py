"""Previews: where the VAE is linear they are exact; and nothing waits for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_stream import FakeEvent, FakeStream
from helpers.sampler_oracle import config_of, make_scheduler
from latentrt.runtime.denoise import run_steps
from latentrt.runtime.previews import Previewer
from latentrt.runtime.progress import CallProgress
from latentrt.runtime.sampler import build_table
from torch.nn import functional as F

CPU = torch.device("cpu")

WEIGHTS = torch.tensor([[0.1, 0.0, -0.05], [0.0, 0.08, 0.02], [0.03, 0.03, 0.0], [0.0, -0.06, 0.1]])


def decode(latents: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    rgb = torch.einsum("bchw,cd->bdhw", latents, WEIGHTS) + 0.5
    return F.interpolate(rgb, scale_factor=8)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1024, 1024), (128, 128), (72, 200), (8, 8)],  # one picture; several; odd; a single latent
)
def test_a_linear_vae_is_found(height: int, width: int) -> None:
    vae = SimpleNamespace(scale=8, channels=4, decode=decode)
    previewer = Previewer.fit(vae, height, width, CPU)
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1)) * 0.5
    wanted = (decode(latents)[0, :, ::8, ::8].permute(1, 2, 0) * 255).numpy()
    (image,) = previewer(latents).numpy()
    assert image.shape == (6, 5, 3)
    assert np.abs(image - wanted).max() <= 0.6


def test_noise_of_any_level_is_brought_to_the_same_brightness() -> None:
    vae = SimpleNamespace(scale=8, channels=4, decode=decode)
    previewer = Previewer.fit(vae, 64, 64, CPU)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    quiet, loud = previewer(torch.stack([noise * 1.5, noise * 15.0])).double()
    assert (quiet - loud).abs().max() <= 1
    assert previewer(noise[None] * torch.nan).max() == 0


def brightness(latents: torch.Tensor) -> torch.Tensor:
    """A previewer that shows the first channel."""
    return latents[:, :1].movedim(1, 3).expand(-1, -1, -1, 3).to(torch.uint8)


def reported(steps: int, previewer: Any) -> list[tuple[int, int | None]]:
    """(steps done, the picture's brightness) as the callback got them; step k leaves latents of k."""
    calls: list[tuple[int, int | None]] = []

    def on_progress(done: int, values: dict[str, Any]) -> None:
        picture = values["preview"]
        calls.append((done, None if picture is None else int(picture.max())))

    latents = torch.zeros(2, 4, 3, 5)
    table = build_table(config_of(make_scheduler("euler")), steps)
    progress = CallProgress(steps, {"disable": True}, CPU, on_progress=on_progress, previewer=previewer)
    run_steps(latents, lambda: latents.add_(1), table, progress)
    progress.finish()
    return calls


def test_pictures_arrive_a_step_or_two_later_each_of_its_own_step(stream: FakeStream) -> None:
    """The latents are overwritten by the next step long before the picture of this one is made."""
    told = reported(12, brightness)
    assert told == [(k, k) for k in range(1, 13)]
    waits = [line for line in stream.log if line.startswith("wait")]
    assert waits[:10] == [f"wait {k}" for k in range(1, 20, 2)]  # the loop's own
    assert len(waits) <= 10 + 3  # and those of the end


def test_nothing_waits_for_a_picture_that_is_late(stream: FakeStream) -> None:
    """The side stream stands still: pictures are left out, and the loop goes on."""
    late: list[Any] = []

    def on_side_stream(work: Callable[[], None]) -> Any:
        work()
        late.append(FakeEvent(stream, 10**6))
        return late[-1]

    stream.on_side_stream = on_side_stream  # type: ignore[method-assign]
    told = reported(12, brightness)
    assert len(late) == 4
    assert told == [(k, k if k <= 4 else None) for k in range(1, 13)]


def test_without_a_previewer_steps_are_reported_all_the_same(stream: FakeStream) -> None:
    assert reported(5, None) == [(k, None) for k in range(1, 6)]
    assert not any(line.startswith("side") for line in stream.log)


def test_on_the_cpu_a_step_is_reported_before_the_next_begins() -> None:
    told: list[int] = []
    progress = CallProgress(4, {"disable": True}, CPU, on_progress=lambda n, _: told.append(n))
    table = build_table(config_of(make_scheduler("euler")), 4)
    before: list[int] = []
    run_steps(torch.zeros(1, 4, 2, 2), lambda: before.append(len(told)), table, progress)
    assert before == [0, 1, 2, 3]
