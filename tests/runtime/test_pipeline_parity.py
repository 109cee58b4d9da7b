"""`runtime/pipeline.py`: whole pipelines against diffusers on the same weights, prompt by prompt; the cases are in
helpers/parity_cases.py."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from helpers.parity import Rig
from helpers.parity_cases import (
    BACKENDS,
    KINDS,
    NATIVE,
    NEGATIVE_ORIGINAL,
    OWN_PREDICTION,
    STEPS,
    Case,
    cover,
    coverable,
    families,
)
from tolerances import PIPELINE_EAGER, PIPELINE_ONNXRUNTIME, PIPELINE_ZERO_SNR_FEW_STEPS


@pytest.mark.timeout(900)  # the first of a checkpoint on ONNX Runtime exports it
@pytest.mark.parametrize("case", cover(), ids=str)
def test_cover(case: Case, rig: Rig) -> None:
    assert rig.difference(case) <= case.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_triton_back_end(kind: str, rig: Rig) -> None:
    """Packed weights and a loop that computes text and time beforehand, of whatever family."""
    case = Case(kind, NATIVE[kind], OWN_PREDICTION[kind], 5, 7.5, 3, "a", "triton")
    assert rig.difference(case) <= case.tolerance


def test_the_cover_holds_every_pair() -> None:
    def pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
        return set(combinations(vars(case).items(), 2))

    assert len(cover()) <= 60
    assert set().union(*map(pairs, cover())) >= set().union(*map(pairs, coverable()))
    assert {(c.kind, c.backend) for c in cover()} == set(product(KINDS, BACKENDS))


BEYOND_FLOAT32 = ("lcm", "sample", 50, 7.5)
"""Where nothing can be compared: diffusers' float32 images are 0.5 of [0, 1] from its float64 ones."""

FAULTS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 7.4},
    "crop": {"crops_coords_top_left": (0, 8)},
    "negative crop": {"negative_crops_coords_top_left": (8, 32)},
    "steps_offset": {"scheduler": {"steps_offset": 2}},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["sdxl", "ensemble", "refiner"])
def test_planted_faults_are_seen(kind: str, fault: str, rig: Rig) -> None:
    """Each is far beyond the loosest tolerance a case of five steps has."""
    case = Case(kind, "euler", "epsilon", 5, 7.5, 1, "a", "eager")
    assert rig.difference(case) <= PIPELINE_EAGER
    assert rig.difference(case, **FAULTS[fault]) > 2 * PIPELINE_ONNXRUNTIME


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_guidance_scale_is_seen_on_every_checkpoint(kind: str, rig: Rig) -> None:
    case = Case(kind, NATIVE[kind], OWN_PREDICTION[kind], 5, 7.5, 1, "a", "eager")
    assert rig.difference(case, guidance_scale=7.4) > 2 * PIPELINE_ONNXRUNTIME


@pytest.mark.parametrize("steps", [2, 5])
def test_a_wrong_guidance_scale_is_seen_at_zero_snr(steps: int, rig: Rig) -> None:
    case = Case("sdxl", "euler", "zero-snr", steps, 7.5, 1, "a", "eager")
    assert rig.difference(case) <= PIPELINE_ZERO_SNR_FEW_STEPS
    assert rig.difference(case, guidance_scale=7.4) > PIPELINE_ZERO_SNR_FEW_STEPS


def test_rows_of_a_batch_mixed_up_are_seen(rig: Rig) -> None:
    case = Case("sdxl", "euler", "epsilon", 2, 7.5, 3, "a", "eager")
    mixed = [NEGATIVE_ORIGINAL[k] for k in (1, 0, 2)]
    assert rig.difference(case, negative_original_size=mixed) > 2 * PIPELINE_ONNXRUNTIME


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", families(), ids="-".join)
def test_product(family: tuple[str, str, str, str], rig: Rig) -> None:
    kind, sampler, prediction, variant = family
    failed = {}
    for steps, guidance, batch, backend in product(STEPS, (1.0, 7.5), (1, 3), BACKENDS):
        if (sampler, prediction, steps, guidance) == BEYOND_FLOAT32:
            continue
        case = Case(kind, sampler, prediction, steps, guidance, batch, variant, backend)
        found = rig.difference(case)
        if not found <= case.tolerance and not found <= rig.allowed(case):
            failed[str(case)] = found
    assert not failed
