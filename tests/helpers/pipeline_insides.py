"""What tests read of a pipeline that its users cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import latentrt
from latentrt.runtime.graph_cache import GraphCache
from latentrt.runtime.planner import Plan
from latentrt.runtime.request import GenerationRequest
from latentrt.runtime.stages import Stage, stages_of_request

__all__ = ["checked", "graph_cache_of", "networks_on_device", "plan_of"]


def checked(pipe: latentrt.Pipeline, call: Mapping[str, Any]) -> tuple[GenerationRequest, list[Stage]]:
    """A call's request and the stages of its denoising loop."""
    request, _ = pipe.check(**call)
    return request, stages_of_request(pipe._parts.experts, request)


def plan_of(pipe: latentrt.Pipeline, call: Mapping[str, Any]) -> Plan:
    """The memory that a call is planned to take."""
    return pipe._budget.plan(*checked(pipe, call))


def networks_on_device(pipe: latentrt.Pipeline) -> set[str]:
    """Names of the networks whose weights are on the device."""
    return set(pipe._budget.held()) - {"recorded"}


def graph_cache_of(pipe: latentrt.Pipeline) -> GraphCache:
    """The graphs that are captured and stored for later calls."""
    return pipe._loader.graph_cache
