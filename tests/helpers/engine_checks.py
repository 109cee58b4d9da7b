"""What an engine on a GPU is held to, whoever built it."""

from __future__ import annotations

import torch
from latentrt.runtime.engines.base import Component, Engine
from torch import Tensor

from helpers import tiny_components as tiny

SIZES = ({"batch": 2, "height": 16, "width": 16}, {"batch": 4, "height": 12, "width": 20})
"""Sizes of the demo's UNet that `inputs` has."""


def inputs(unet: Component, device: torch.device, which: int, seed: int = 0) -> dict[str, Tensor]:
    """Example inputs of one of the `SIZES`."""
    return {name: x.to(device) for name, x in tiny.named_inputs(unet, seed, **SIZES[which]).items()}


def assert_replays(engine: Engine, unet: Component, device: torch.device) -> None:
    """Capture an engine in a CUDA graph; replay it over other inputs, with other work in the same scratch between."""
    x = inputs(unet, device, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = engine(x)["prediction"]
        for seed in (1, 2):
            for name, value in inputs(unet, device, 0, seed).items():
                x[name].copy_(value)
            graph.replay()
            replayed = captured.clone()
            engine(inputs(unet, device, 1))
            assert torch.equal(replayed, engine(x)["prediction"])
