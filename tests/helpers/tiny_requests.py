"""Small requests that tests of whole pipelines make."""

from __future__ import annotations

from typing import Any

PLAIN_CALL: dict[str, Any] = {
    "prompt": "a red cat on the hill",
    "negative_prompt": "blurry",
    "height": 64,
    "width": 48,
    "num_inference_steps": 4,
    "output_type": "np",
}
"""A call without a seed; a test adds what it is about."""

SEEDED_CALL: dict[str, Any] = {
    **PLAIN_CALL,
    "num_inference_steps": 2,  # one of the base and one of the refiner
    "high_noise_frac": 0.5,
    "sampler": "euler-a",
    "seed": 3,
}
"""A call of base and refiner that always makes the same image."""
NO_SIZE = {name: value for name, value in SEEDED_CALL.items() if name not in ("height", "width")}
"""`SEEDED_CALL` without a size."""
