"""A memory plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from ..kernels.roofline import Gpu
from .memory import POLICIES, RESERVE, STAGING, Plan, format_bytes

__all__ = ["lines"]


def lines(plan: Plan, gpu: Gpu) -> Iterator[str]:
    """Lines of three tables: networks, stages with their least time on a GPU, and bytes by policy and stage."""
    yield plan.subject
    yield ""
    yield f"{'one forward':<24}{'dtype':<10}{'rows':>4}{'weights':>11}{'activations':>13}{'scratch':>10}{'TFLOP':>10}"
    for name, network in plan.networks.items():
        f = network.footprint
        weights, activations, scratch = map(
            format_bytes, (f.weight_bytes, f.activation_bytes, f.scratch_bytes)
        )
        sizes = f"{weights:>11}{activations:>13}{scratch:>10}"
        yield f"{name:<24}{network.dtype:<10}{network.rows:>4}{sizes}{f.flops / 1e12:>10.4f}"
    yield ""
    yield f"{'stage':<24}{'forwards':>14}{'graph pool':>12}{'TFLOP':>12}{'floor ms':>10}  limited by"
    for stage in plan.stages:
        ms, limit = plan.floor_ms(stage, gpu)
        forwards = ", ".join(str(calls) for calls in stage.calls.values())
        pool = max(plan.networks[name].footprint.pool_bytes for name in stage.calls)
        figures = f"{format_bytes(pool):>12}{plan.flops(stage) / 1e12:>12.4f}{ms:>10.3f}"
        yield f"{stage.name:<24}{forwards:>14}{figures}  {limit}"
    total = sum(plan.floor_ms(stage, gpu)[0] for stage in plan.stages)
    yield f"{'all':<62}{total:>10.3f}  {gpu.name}, {gpu.source} ceilings"
    yield ""
    names = [stage.name for stage in plan.stages]
    yield f"{'device memory':<14}{''.join(f'{name:>11}' for name in names)}{'peak':>11}{'pinned host':>14}"
    for policy in POLICIES:
        need = plan.need(policy).values()
        stages = "".join(f"{format_bytes(nbytes):>11}" for nbytes in need)
        yield f"{policy:<14}{stages}{format_bytes(max(need)):>11}{format_bytes(STAGING):>14}"
    yield (
        f"of it {format_bytes(plan.buffer_bytes)} of buffers and {format_bytes(RESERVE)} kept free for libraries; "
        "the CUDA context comes on top"
    )
