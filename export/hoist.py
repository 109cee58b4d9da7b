"""A UNet in parts: what is computed once for a prompt, once for a timestep, and in every step.

The keys and values of cross-attention depend on the text alone, and the shifts of the residual blocks on timestep,
pooled text and sizes. So a step needs to compute neither: both are taken out of the graph that runs in it.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ..errors import ExportError
from .passes import dead_code

__all__ = ["PART", "split", "unet_parts"]

PART = "latentrt.part"
"""Key of a part's name in its metadata."""


def unet_parts(model: ir.Model) -> dict[str, ir.Model]:
    """A UNet's model as `prompt`, `time` and `step`, to be run in that order.

    The outputs of a part are inputs of the later ones, by name: `prompt` takes what a text and its sizes give, `time`
    the timestep as well, `step` the latents. The model is not changed.

    Raises:
        ExportError: it is no UNet.
    """
    prompt, rest = split(model, ("sample", "timestep"))
    time, step = split(rest, ("sample",))
    parts = {"prompt": prompt, "time": time, "step": step}
    for name, part in parts.items():
        part.metadata_props[PART] = name
    return parts


def split(model: ir.Model, late: Collection[str]) -> tuple[ir.Model, ir.Model]:
    """The part of a model that some inputs have no say in, and the rest, which takes the first part's outputs.

    Args:
        late: names of those inputs.

    Returns:
        Two models; together they compute what `model` does, which is not changed.

    Raises:
        ExportError: the model lacks one of the inputs.
    """
    names = [value.name for value in model.graph.inputs]
    missing = [name for name in late if name not in names]
    if missing:
        raise ExportError(
            f"{model.graph.name} has no input {', '.join(missing)} to be split at; it has {', '.join(map(str, names))}"
        )
    border = _border(model.graph, late)
    first, second = model.clone(), model.clone()
    _keep(first.graph, border)
    for name in border:
        value = _value(second.graph, name)
        given = ir.Value(name=name, type=value.type, shape=value.shape)
        value.name = f"{name}/early"
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        second.graph.inputs.append(given)
    for part in (first, second):
        dead_code(part)
        for value in [v for v in part.graph.inputs if not v.uses() and not v.is_graph_output()]:
            part.graph.inputs.remove(value)
    return first, second


def _border(graph: ir.Graph, late: Collection[str]) -> list[str]:
    """Names of what is computed without the late inputs, from others, and used with them or as a result."""
    mixed = {value for value in graph.inputs if value.name in late}
    early = {value for value in graph.inputs if value.name not in late}
    for node in graph:
        given = set(node.inputs)
        if given & mixed:
            mixed.update(node.outputs)
        elif given & early:  # what depends on no input stays where it is used
            early.update(node.outputs)
    outputs = set(graph.outputs)
    return [
        str(value.name)
        for node in graph
        for value in node.outputs
        if value in early
        and (value in outputs or any(user.outputs[0] in mixed for user in value.consumers()))
    ]


def _keep(graph: ir.Graph, names: list[str]) -> None:
    graph.outputs[:] = [_value(graph, name) for name in names]


def _value(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for node in graph for value in node.outputs if value.name == name)
