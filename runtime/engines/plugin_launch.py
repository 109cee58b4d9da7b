"""What each plugin launches, as numbers: kernels, grids and arguments from the shapes at hand.

A plugin's kernels were compiled by `kernels.binaries`, one set for every size; this says how they are called. The
same rules as in the operators' `plan`, but without tensors: here run neither torch nor triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...errors import BackendError

__all__ = ["DTYPES", "OPERATORS", "Buffer", "Operator", "PluginLaunch", "PluginPlan", "Shapes"]

Shapes = Sequence[tuple[int, ...]]
Number = int | float

DTYPES = ("float16", "bfloat16", "float32")

_MOST = 2**31 - 1  # of an argument, and of a grid
_SHORT = 128  # keys; the operator's own class of short sequences


@dataclass(frozen=True)
class Buffer:
    """Memory that a launch is given: an input or output by its number, or the workspace."""

    of: Literal["input", "output", "workspace"]
    index: int = 0


@dataclass(frozen=True)
class PluginLaunch:
    """One launch: the kernel by its role, the grid, and the arguments by parameter."""

    role: str
    grid: int
    values: Mapping[str, Buffer | Number]


@dataclass(frozen=True)
class PluginPlan:
    """The launches for given shapes, in order, and the bytes of workspace they share."""

    launches: tuple[PluginLaunch, ...]
    workspace: int = 0


@dataclass(frozen=True)
class Operator:
    """An operator that a plugin can take.

    Attributes:
        inputs: how many there are; the output has the first one's shape and dtype.
        attributes: of its node, and their Python type.
        plan: (shapes of the inputs, attributes, constants of the kernels) -> what to launch.
        most_workspace: (largest shapes, attributes, constants) -> bytes that are enough for all smaller ones.
        key: (dtype, shapes of the inputs with -1 where they vary, attributes) -> which kernels it needs.
    """

    name: str
    inputs: int
    attributes: Mapping[str, type]
    plan: Callable[[Shapes, Mapping[str, Number], Mapping[str, int]], PluginPlan]
    most_workspace: Callable[[Shapes, Mapping[str, Number], Mapping[str, int]], int]
    key: Callable[[str, Shapes, Mapping[str, Number]], str] = field(repr=False)


def _group_norm_plan(
    *, shift: bool
) -> Callable[[Shapes, Mapping[str, Number], Mapping[str, int]], PluginPlan]:
    def plan(shapes: Shapes, attributes: Mapping[str, Number], constants: Mapping[str, int]) -> PluginPlan:
        N, C, *positions = shapes[0]
        S = math.prod(positions)
        if N * C * S == 0:
            return PluginPlan(())
        tile, block = constants["TILE_C"], constants["BLOCK_S"]
        tiles, programs, most = N * (C // tile), constants["PROGRAMS"], constants["MOST_SPLITS"]
        waves = min(N * C * S // (constants["PROGRAM"] * programs), most * tiles // programs)
        splits = min(most, max(1, max(1, waves) * programs // tiles))
        chunk = -(-S // (splits * block)) * block
        splits = -(-S // chunk)
        partials = N * int(attributes["num_groups"]) * splits
        grid = tiles * splits
        values: dict[str, Buffer | Number] = {"x_ptr": Buffer("input", 0), "stats_ptr": Buffer("workspace")}
        if shift:
            values["shift_ptr"] = Buffer("input", 1)
        values |= {"S": S, "chunk": chunk, "splits": splits, "partials": partials}
        affine: dict[str, Buffer | Number] = {
            "weight_ptr": Buffer("input", 1 + shift),
            "bias_ptr": Buffer("input", 2 + shift),
            "y_ptr": Buffer("output"),
            "eps": attributes["epsilon"],
        }
        which = "any" if S % block else "even"
        launches = (
            PluginLaunch(f"stats/{which}", grid, values),
            PluginLaunch(f"apply/{which}", grid, values | affine),
        )
        return _checked(PluginPlan(launches, workspace=8 * partials))

    return plan


def _group_norm_workspace(
    shapes: Shapes, attributes: Mapping[str, Number], constants: Mapping[str, int]
) -> int:
    return 8 * shapes[0][0] * int(attributes["num_groups"]) * constants["MOST_SPLITS"]


def _group_norm_key(*, silu: bool, shift: bool) -> Callable[[str, Shapes, Mapping[str, Number]], str]:
    def key(dtype: str, shapes: Shapes, attributes: Mapping[str, Number]) -> str:
        C, groups = shapes[0][1], int(attributes["num_groups"])
        if C < 1 or groups < 1 or C % groups:
            raise BackendError(
                f"{groups} groups of {C} channels; a plugin needs a fixed number it can divide"
            )
        return f"group_norm dtype={dtype} channels={C} groups={groups} silu={silu:d} shift={shift:d}"

    return key


def _attention_plan(
    shapes: Shapes, attributes: Mapping[str, Number], constants: Mapping[str, int]
) -> PluginPlan:
    (B, Sq, H, D), Sk = shapes[0], shapes[1][1]
    if B * Sq * H * D == 0:
        return PluginPlan(())
    values: dict[str, Buffer | Number] = {
        "q_ptr": Buffer("input", 0),
        "k_ptr": Buffer("input", 1),
        "v_ptr": Buffer("input", 2),
        "o_ptr": Buffer("output"),
    }
    for name, S in (("q", Sq), ("k", Sk), ("v", Sk)):
        values |= {f"stride_{name}b": S * H * D, f"stride_{name}s": H * D, f"stride_{name}h": D}
    # `kernels._attention_softmax.log2_scale`, without importing torch.
    magnitude = max(abs(attributes["scale"]) * math.log2(math.e), 1e-30)
    values |= {"H": H, "Sq": Sq, "Sk": Sk, "scale": magnitude}
    grid = B * H * -(-Sq // constants["BLOCK_M"]) * -(-D // constants["BLOCK_V"])
    return _checked(PluginPlan((PluginLaunch("attention", grid, values),)))


def _attention_key(dtype: str, shapes: Shapes, attributes: Mapping[str, Number]) -> str:
    columns, keys = shapes[0][3], shapes[1][1]
    if columns < 1:
        raise BackendError("heads of no fixed number of columns; a plugin needs one")
    short, negative = 0 < keys <= _SHORT, attributes["scale"] < 0
    return f"attention dtype={dtype} columns={columns} short={short:d} negative={negative:d}"


def _checked(plan: PluginPlan) -> PluginPlan:
    for launch in plan.launches:
        for name, value in (("grid", launch.grid), *launch.values.items()):
            if isinstance(value, int) and value > _MOST:
                raise BackendError(f"a plugin's {name} is {value}, over {_MOST}; use smaller sizes")
    return plan


_NORM = {"num_groups": int, "epsilon": float}

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            name,
            3 + shift,
            _NORM,
            _group_norm_plan(shift=shift),
            _group_norm_workspace,
            _group_norm_key(silu=silu, shift=shift),
        )
        for name, silu, shift in (
            ("GroupNorm", False, False),
            ("GroupNormSilu", True, False),
            ("ShiftGroupNormSilu", True, True),
        )
    )
}
OPERATORS["DotProductAttention"] = Operator(
    "DotProductAttention", 3, {"scale": float}, _attention_plan, lambda *_: 0, _attention_key
)
"""Launches, by the type of their node."""
