"""Every tolerance against diffusers, float64 or another oracle, in one place. None is loosened to make a test pass:
find the cause.

Relative errors are max|a - b| / max|b| over a whole tensor, b being the oracle: `relative_error(a, b)`.
"""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|, in float64, of tensors of one shape."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


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

PIPELINE_GPU = 1e-3
"""A float32 image made on a GPU without TF32 against the CPU's: every sum is taken in another order, over some
twenty forwards of two networks."""

SAMPLER_STEP = 2e-6
"""One step in float32 against float64: about twenty roundings of numbers up to ten times the result."""

# Operators against float64, inputs as rounded to the dtype: a few roundings of numbers about as large as the
# result, and for half types the one of the result itself.
OPERATOR = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
OPERATOR_LARGE_MEAN = {"float64": 1e-10, "float32": 5e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""Norms where the mean is 1000 times the deviation, which float32 has to subtract."""
OPERATOR_TWO_ROUNDINGS = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Where half types are rounded once more on the way: between a projection and its gate."""

MODEL = 1e-5
"""A network's output in float32 against diffusers and transformers; the same operations, in another order."""
MODEL_HALF_VERSUS_THEIRS = 1.5
"""Our error in half precision, at most this many times theirs; both against float32."""

EXPORT_FLOAT32 = 1e-4
"""An exported component in ONNX Runtime against its module, relative. 2e-6 is usual."""
EXPORT_FLOAT16 = 5e-3
"""The same in float16, where PyTorch rounds after each operator and ONNX Runtime on the CPU does not."""

ENGINE_FLOAT16 = 1e-2
"""A TensorRT engine in float16 against eager PyTorch in float16 on the same GPU, relative. Never run yet."""

KERNEL_VERSUS_REFERENCE = 2.0
"""A Triton kernel's largest error against float64, at most this many times its reference's in the same dtype,"""
KERNEL_ULPS = 2.0
"""or this many units in the last place of the largest value. The reference may be exact by luck."""
KERNEL_BESIDE_REFERENCE = {"rtol": 1e-4, "atol": 1e-5}
"""A Triton kernel beside its reference, both in float32, where NaN and infinities leave no largest error."""

VAE_TILES = 0.1
"""Of an image in [0, 1] whose decoder looks three latents far, in tiles of 16: near its edge a tile sees zeros, where
it counts for little. Group norms are apart from this: they see a tile alone, and no bound holds for them."""
VAE_TILES_LOCAL = 1e-6
"""The same of a decoder that looks at nothing beside a latent: float32 weights of two tiles that sum to 1."""

GUIDANCE_EMBEDDING = 1e-4
"""Sines and cosines in float32 of angles up to 750, against float64."""
TEXT_ROWS = 1e-5
"""Float32 embeddings of one prompt in several rows of a batch, whose sums may be taken in another order."""

SCHEDULE_SIGMAS = {"rtol": 2e-7, "atol": 0}
"""A schedule's sigmas against diffusers', which are float32: one rounding."""
SCHEDULE_KARRAS_EULER = 2e-3
"""Timesteps: diffusers' Euler has fractions of a step, from float32 logarithms."""

PIXELS = 1e-6
"""Float32 pixels in [-1, 1] against the formula."""
PIXELS_FROM_HALF = 1e-3
"""The same from a picture in float16."""

# Networks that judge pictures, in float32 against their published implementations.
FEATURES = 1e-4
"""Inception-v3's, of the order of 1: some fifty layers."""
LPIPS_RELATIVE = 1e-4
