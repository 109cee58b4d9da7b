"""Small requests that tests of whole pipelines make."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "prompt": "a red cat on the hill",
    "negative_prompt": "blurry",
    "height": 64,
    "width": 48,
    "num_inference_steps": 4,
    "output_type": "np",
}
"""What is tested of a call is added."""

CALL: dict[str, Any] = {
    **PLAIN,
    "num_inference_steps": 2,  # one of the base and one of the refiner
    "high_noise_frac": 0.5,
    "sampler": "euler-a",
    "seed": 3,
}
"""Of tests of memory."""
NO_SIZE = {name: value for name, value in CALL.items() if name not in ("height", "width")}
"""The same without a size."""
