"""latentrt: an inference runtime for Stable Diffusion XL.

    import latentrt

    pipe = latentrt.Pipeline.from_pretrained("demo", refiner="demo")
    image = pipe("a red circle above a blue square", seed=0).images[0]

Nothing heavy is imported until a name is used: `import latentrt` loads neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline as Pipeline
    from .runtime.pipeline import PipelineOutput as PipelineOutput
    from .runtime.serve.engine import AsyncEngine as AsyncEngine
    from .runtime.serve.requests import ImageRequest as ImageRequest

_LAZY = {
    "AsyncEngine": ".runtime.serve.engine",
    "ImageRequest": ".runtime.serve.requests",
    "Pipeline": ".runtime.pipeline",
    "PipelineOutput": ".runtime.pipeline",
}

__all__ = ["AsyncEngine", "ImageRequest", "Pipeline", "PipelineOutput", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'latentrt' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
