"""The operators the models are written against.

Each is a checked function over plain tensors. What it means is in `reference`, in a few lines of PyTorch;
`sampler_step` is its own reference.
"""

from __future__ import annotations

# Where Python runs in the repository's root, this folder is also a top-level `kernels`, and transformers imports
# whatever has that name to see whether it is another project's package: then there is nothing here.
if __name__ != "kernels":
    from ._dispatch import as_nodes, by_reference, unavailable
    from .attention import attention
    from .geglu import geglu, linear_geglu
    from .group_norm import group_norm, group_norm_silu
    from .layer_norm import add_layer_norm, layer_norm
    from .sampler_step import sampler_step

__all__ = [
    "add_layer_norm",
    "as_nodes",
    "attention",
    "by_reference",
    "geglu",
    "group_norm",
    "group_norm_silu",
    "layer_norm",
    "linear_geglu",
    "sampler_step",
    "unavailable",
]
