"""The project's operators in ONNX: one node each, and what a node means in standard operators.

A node of the domain `latentrt` stands for one operator of `latentrt.kernels`, and its model carries a function of
the same name. A runtime that has no kernel for the node runs the function's body: ONNX Runtime always does,
TensorRT does unless a plugin is registered.

**One file, with plugins or without.** Every node names the plugin that may take its place, in the attributes
`plugin_namespace="latentrt"` and `plugin_version="1"`. TensorRT's parser takes the plugin that is registered under
the node's type, namespace and version, and inlines the body where none is. So plugins are chosen when an engine is
built, one operator at a time, by registering a creator or not; the file stays the same.

| node | inputs | attributes |
| --- | --- | --- |
| DotProductAttention | q, k, v | scale |
| GroupNorm, GroupNormSilu | x, weight, bias | num_groups, epsilon |
| ShiftGroupNormSilu | x, shift, weight, bias | num_groups, epsilon |
| LayerNorm | x, weight, bias | epsilon |
| AddLayerNorm | x, residual, weight, bias -> y, total | epsilon |
| Geglu | x | |
| LinearGeglu | x, weight, bias | |

Shapes are those of `latentrt.kernels`, but for LinearGeglu's weight: [D, 2F], as a matmul wants it. Any of float16,
bfloat16 and float32 goes in and comes out. Inside, statistics, softmax and what a norm does before its result is
rounded are float32 whatever goes in, by casts in the body, so that no builder has to guess them.

No type here is that of an operator of any other domain: TensorRT's parser goes by the type alone, and would read an
`Attention` of ours as ONNX's, with heads and positions exchanged.

The bodies avoid what is standard and wrong: ONNX defines GroupNormalization's variance as E[x^2] - E[x]^2, which
cancels where the mean is large, and InstanceNormalization's as E[(x - E[x])^2].
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx.parser
import onnx_ir as ir

__all__ = ["DOMAIN", "OPSET", "PLUGIN", "VERSION", "function", "functions_of"]

DOMAIN = "latentrt"
VERSION = 1
OPSET = 23
"""Of standard operators: the first with Attention; Conv takes bfloat16 since 22."""
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
"""Attributes of every node."""

_FUSED_HEADS = range(16, 257, 8)  # columns of a head in TensorRT's fused attention

# Weight and bias are applied by a BatchNormalization of mean 0 and variance 1, one node in place of a product, a sum
# and a reshape: the same bits, and small tensors spend much of their time between nodes.
_GROUP_NORM = """
    xf = Cast <to = 1> (x)
    one = Constant <value_ints = [1]> ()
    keep = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    count = Constant <value_int: int = @num_groups> ()
    groups = Reshape(count, one)
    channels = Shape(weight)
    by_group = Concat <axis = 0> (keep, groups, rest)
    {shift}
    grouped = Reshape({x}, by_group)
    ones = ConstantOfShape <value = float[1] {{1.0}}> (groups)
    zeros = ConstantOfShape <value = float[1] {{0.0}}> (groups)
    normed = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, zeros)
    shape = Shape(x)
    image = Reshape(normed, shape)
    wf = Cast <to = 1> (weight)
    bf = Cast <to = 1> (bias)
    mean = ConstantOfShape <value = float[1] {{0.0}}> (channels)
    variance = ConstantOfShape <value = float[1] {{1.0}}> (channels)
    affine = BatchNormalization <epsilon = 0.0> (image, wf, bf, mean, variance)
"""
_NO_SHIFT = {"shift": "", "x": "xf"}
_SHIFT = {
    "shift": """
    by_channel = Concat <axis = 0> (keep, channels, rest)
    flat = Reshape(xf, by_channel)
    sf = Cast <to = 1> (shift)
    column = Unsqueeze(sf, rest)
    shifted = Add(flat, column)
""",
    "x": "shifted",
}
_SILU = """
    gate = Sigmoid(affine)
    result = Mul(affine, gate)
"""
_GATED = """
    value, gate = Split <axis = -1, num_outputs = 2> ({x})
    activated = Gelu(gate)
    y = Mul(value, activated)
"""
_LAYER_NORM = """
    xf = Cast <to = 1> ({x})
    wf = Cast <to = 1> (weight)
    bf = Cast <to = 1> (bias)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (xf, wf, bf)
    y = CastLike(normed, x)
"""

_BODIES = {
    "GroupNorm": (
        "<num_groups, epsilon> (x, weight, bias) => (y)",
        _GROUP_NORM.format(**_NO_SHIFT) + "y = CastLike(affine, x)",
    ),
    "GroupNormSilu": (
        "<num_groups, epsilon> (x, weight, bias) => (y)",
        _GROUP_NORM.format(**_NO_SHIFT) + _SILU + "y = CastLike(result, x)",
    ),
    "ShiftGroupNormSilu": (
        "<num_groups, epsilon> (x, shift, weight, bias) => (y)",
        _GROUP_NORM.format(**_SHIFT) + _SILU + "y = CastLike(result, x)",
    ),
    "LayerNorm": ("<epsilon> (x, weight, bias) => (y)", _LAYER_NORM.format(x="x")),
    "AddLayerNorm": (
        "<epsilon> (x, residual, weight, bias) => (y, total)",
        "total = Add(x, residual)" + _LAYER_NORM.format(x="total"),
    ),
    # Half types need no float32 here: the matmul overflows only where the result does.
    "Geglu": ("(x) => (y)", _GATED.format(x="x")),
    "LinearGeglu": (
        "(x, weight, bias) => (y)",
        "product = MatMul(x, weight)\n    both = Add(product, bias)" + _GATED.format(x="both"),
    ),
    # The scale goes into q, so that half-precision scores stay as small as they end up; right before the matmul, where
    # ONNX Runtime makes it part of that.
    "DotProductAttention": (
        "<scale> (q, k, v) => (o)",
        """
    exact = Constant <value_float: float = @scale> ()
    factor = CastLike(exact, q)
    qh = Transpose <perm = [0, 2, 1, 3]> (q)
    qs = Mul(qh, factor)
    kh = Transpose <perm = [0, 2, 3, 1]> (k)
    vh = Transpose <perm = [0, 2, 1, 3]> (v)
    scores = MatMul(qs, kh)
    wide = Cast <to = 1> (scores)
    weights = Softmax <axis = -1> (wide)
    p = CastLike(weights, q)
    oh = MatMul(p, vh)
    o = Transpose <perm = [0, 2, 1, 3]> (oh)
""",
    ),
}
# ONNX's own Attention, for which TensorRT has kernels: of half types, several heads and up to 256 columns. They keep
# the softmax in float32; saying so in `softmax_precision` is refused by the parser.
_FUSED_ATTENTION = """
    qh = Transpose <perm = [0, 2, 1, 3]> (q)
    kh = Transpose <perm = [0, 2, 1, 3]> (k)
    vh = Transpose <perm = [0, 2, 1, 3]> (v)
    oh = Attention <scale: float = @scale> (qh, kh, vh)
    o = Transpose <perm = [0, 2, 1, 3]> (oh)
"""


def function(name: str, *, casts: bool = True, fused_attention: bool = False) -> ir.Function:
    """The function of a node's type.

    Args:
        name: one of the table's.
        casts: without them the body is for float32 only, and loads faster.
        fused_attention: DotProductAttention by ONNX's own Attention, in place of matmuls and a softmax.
    """
    signature, body = _BODIES[name]
    if name == "DotProductAttention" and fused_attention:
        body = _FUSED_ATTENTION
    text = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n{name} {signature}\n{{\n{body}\n}}'
    made = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    for node in [] if casts else [node for node in made if node.op_type in ("Cast", "CastLike")]:
        source = node.inputs[0]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
        made.remove(node, safe=True)
    return made


def functions_of(nodes: Iterable[ir.Node]) -> list[ir.Function]:
    """The functions that a graph's nodes need, one for each type, by name.

    Attention is fused where TensorRT has a kernel for all of the graph's: TensorRT refuses ONNX's Attention in
    float32, of one head (one image at a time), and of heads wider than 256, which is what a VAE has.
    """
    by_type: dict[str, list[ir.Value]] = {}
    for node in nodes:
        if node.domain == DOMAIN and node.inputs[0] is not None:
            by_type.setdefault(node.op_type, []).append(node.inputs[0])
    return [
        function(
            name,
            casts=any(x.dtype != ir.DataType.FLOAT for x in first),
            fused_attention=all(_is_fused(x) for x in first),
        )
        for name, first in sorted(by_type.items())
    ]


def _is_fused(q: ir.Value) -> bool:
    """Whether TensorRT has a kernel for attention of q, [B, S, H, D]."""
    if q.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) or q.shape is None or len(q.shape) != 4:
        return False
    heads, columns = q.shape[2], q.shape[3]
    return isinstance(heads, int) and heads > 1 and columns in _FUSED_HEADS
