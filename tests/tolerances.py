"""Every tolerance of the test suite, in one place. None is loosened to make a test pass: find the cause.

Relative errors are max|a - b| / max|b| over a whole tensor, b being the oracle.
"""

from __future__ import annotations

SAMPLER_TRAJECTORY = 1e-5
"""A whole trajectory from a coefficient table against diffusers' scheduler, both in float32."""
SAMPLER_ZERO_SNR_EULER = 1e-3
"""The same where Euler begins at sigma 4096: diffusers subtracts numbers of that size in float32."""

# Whole pipelines: max|a - b| of images in [0, 1], float32 weights.
PIPELINE_EAGER = 1e-4
PIPELINE_ONNXRUNTIME = 5e-4
# At zero terminal SNR the first step divides by nearly nothing, and diffusers' own float32 is that far off the
# exact table; later steps make up for it.
PIPELINE_ZERO_SNR_FEW_STEPS = 3e-3

SAMPLER_STEP = 2e-6
"""One step in float32 against float64: about twenty roundings of numbers up to ten times the result."""
