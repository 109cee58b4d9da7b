"""The operators the models are written against.

Each is a checked function over plain tensors. What it means is in `reference`, in a few lines of PyTorch;
`sampler_step` is its own reference.
"""

from __future__ import annotations

from .attention import attention
from .geglu import geglu, linear_geglu
from .group_norm import group_norm, group_norm_silu
from .layer_norm import add_layer_norm, layer_norm
from .sampler_step import sampler_step

__all__ = [
    "add_layer_norm",
    "attention",
    "geglu",
    "group_norm",
    "group_norm_silu",
    "layer_norm",
    "linear_geglu",
    "sampler_step",
]
