"""What the operators refuse, in words, and that their checks pin no symbolic size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from latentrt.errors import KernelArgumentError
from latentrt.kernels import (
    add_layer_norm,
    as_nodes,
    attention,
    geglu,
    group_norm,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    sampler_step,
)
from latentrt.kernels.sampler_step import COLUMNS, HISTORY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

T = torch.zeros
META = torch.zeros(4, device="meta")
Q = T(2, 5, 3, 8)
X, C = T(2, 8, 4, 4), T(8)
OPERATORS = (
    "add_layer_norm",
    "attention",
    "geglu",
    "group_norm",
    "group_norm_silu",
    "layer_norm",
    "linear_geglu",
)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: attention(T(2, 5, 24), Q, Q), r"attention: q must be \[B, Sq, H, D\], got shape \(2, 5, 24\)"),
    (lambda: attention(Q, T(2, 5, 24), Q), r"attention: k must be \[B, Sk, H, D\], got shape \(2, 5, 24\)"),
    (lambda: attention(Q, T(3, 5, 3, 8), Q), r"attention: k must have q's batch size 2, got 3"),
    (lambda: attention(Q, Q, T(2, 5, 4, 8)), r"attention: v must have q's number of heads 3, got 4"),
    (lambda: attention(Q, T(2, 5, 3, 9), Q), r"attention: k must have q's head size 8, got 9"),
    (lambda: attention(Q, Q, T(2, 6, 3, 8)), r"attention: v must have k's number of keys 5, got 6"),
    (lambda: attention(Q, Q[:, :0], Q[:, :0]), r"attention: k must hold at least one key, got shape"),
    (lambda: attention(Q, Q.half(), Q), r"attention: k must have q's dtype torch.float32, got torch.float16"),
    (lambda: attention(Q.int(), Q, Q), r"attention: q must be float16, .* or float64, got torch.int32"),
    (lambda: attention(Q, Q, 1.0), r"attention: v must be a torch.Tensor, got float"),  # type: ignore[arg-type]
    (lambda: attention(Q, None, Q), r"attention: k must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
    (lambda: attention(Q, Q, Q, "1"), r"attention: scale must be a number or None, got '1'"),  # type: ignore[arg-type]
    (lambda: group_norm(None, C, C, 4, 0.0), r"group_norm: x must be a torch.Tensor, got None"),  # type: ignore[arg-type]
    (lambda: group_norm(X, None, C, 4, 0.0), r"group_norm: weight must be a torch.Tensor, got None"),  # type: ignore[arg-type]
    (lambda: group_norm(X, C, C, True, 0.0), r"group_norm: num_groups must be an int, got True"),
    (lambda: group_norm(X, C, C, 4.0, 0.0), r"group_norm: num_groups must be an int, got 4.0"),  # type: ignore[arg-type]
    (lambda: group_norm(X, C, C, 4, "0"), r"group_norm: eps must be zero or more, got '0'"),  # type: ignore[arg-type]
    (lambda: group_norm_silu(X, C, C, 4, 0.0, [0.0]), r"shift must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda: geglu(None), r"geglu: x must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
    (lambda: linear_geglu(T(2, 5), None), r"linear_geglu: weight must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
    (lambda: layer_norm(T(2, 5), T(5), None, 0.0), r"layer_norm: bias must be a torch.Tensor, got None"),  # type: ignore[arg-type]
    (lambda: layer_norm(T(2, 5), T(5), T(5), None), r"layer_norm: eps must be zero or more, got None"),  # type: ignore[arg-type]
    (lambda: add_layer_norm(T(2, 5), None, T(5), T(5), 0.0), r"residual must be a torch.Tensor, got None"),  # type: ignore[arg-type]
    (lambda: group_norm(T(8), C, C, 4, 1e-5), r"group_norm: x must be \[B, C, ...\], got shape \(8,\)"),
    (lambda: group_norm(X, T(7), C, 4, 1e-5), r"group_norm: weight must have one value .* 8, got 7"),
    (lambda: group_norm(X, C, T(8, 1), 4, 1e-5), r"group_norm: bias must be \[C\], got shape \(8, 1\)"),
    (lambda: group_norm(X, C, C, 3, 1e-5), r"group_norm: num_groups must divide x's channels, 8, got 3"),
    (lambda: group_norm(X, C, C, 16, 1e-5), r"num_groups must divide x's channels, 8, got 16"),
    (lambda: group_norm(X, C, C, 0, 1e-5), r"group_norm: num_groups must be at least 1, got 0"),
    (lambda: group_norm(X, C, C, 4, -1.0), r"group_norm: eps must be zero or more, got -1.0"),
    (lambda: group_norm(X, C, C, 4, float("nan")), r"group_norm: eps must be zero or more, got nan"),
    (lambda: group_norm(X, C.double(), C, 4, 0.0), r"weight must have x's dtype torch.float32, got torch.fl"),
    (
        lambda: group_norm_silu(X, C, META, 4, 0.0),
        r"group_norm_silu: bias must be on x's device cpu, got meta",
    ),
    (
        lambda: group_norm_silu(X, C, C, 4, 0.0, T(2, 8, 1, 1)),
        r"group_norm_silu: shift must be \[B, C\], got",
    ),
    (lambda: group_norm_silu(X, C, C, 4, 0.0, T(1, 8)), r"shift must have x's batch size 2, got 1"),
    (lambda: group_norm_silu(X, C, C, 4, 0.0, T(2, 4)), r"shift must have one value for each .* 8, got 4"),
    (lambda: geglu(T(2, 7)), r"geglu: x must be \[..., 2F\], got shape \(2, 7\)"),
    (lambda: geglu(T(())), r"geglu: x must be \[..., 2F\], got shape \(\)"),
    (lambda: linear_geglu(T(2, 5), T(8)), r"linear_geglu: weight must be \[2F, D\], got shape \(8,\)"),
    (lambda: linear_geglu(T(2, 5), T(8, 6)), r"weight must have x's last dimension 5, got 6"),
    (lambda: linear_geglu(T(2, 5), T(7, 5)), r"linear_geglu: weight must be \[2F, D\], got shape \(7, 5\)"),
    (lambda: linear_geglu(T(2, 5), T(8, 5), T(4)), r"bias must have weight's first dimension 8, got 4"),
    (
        lambda: layer_norm(T(2, 5), T(4), T(5), 0.0),
        r"layer_norm: weight must have x's last dimension 5, got 4",
    ),
    (lambda: layer_norm(T(()), T(1), T(1), 0.0), r"layer_norm: x must be \[..., D\], got shape \(\)"),
    (lambda: layer_norm(T(2, 5), T(5), T(5), -0.1), r"layer_norm: eps must be zero or more, got -0.1"),
    (
        lambda: add_layer_norm(T(2, 3, 5), T(3, 5), T(5), T(5), 0.0),
        r"add_layer_norm: residual must have x's rank 3, got shape \(3, 5\)",
    ),
    (
        lambda: add_layer_norm(T(2, 3, 5), T(2, 1, 5), T(5), T(5), 0.0),
        r"add_layer_norm: residual must have x's dimension 1, 3, got 1",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        call()


def good() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Of each operator: what it is called with, by name."""
    norm = {"x": X, "weight": C, "bias": C, "num_groups": 4, "eps": 1e-5}
    rows = {"x": T(2, 8), "weight": C, "bias": C, "eps": 1e-5}
    step = {
        **{"x": T(2, 4, 3, 5), "model_out": T(4, 4, 3, 5), "history": T(HISTORY, 2, 4, 3, 5)},
        **{"noise": T(6, 2, 4, 3, 5), "table": T(6, COLUMNS), "step": T(1, dtype=torch.int64)},
        **{"guidance_scale": T(2), "guidance_rescale": T(2)},
    }
    return {
        "add_layer_norm": (add_layer_norm, {**rows, "residual": T(2, 8)}),
        "attention": (attention, {"q": Q, "k": Q, "v": Q}),
        "geglu": (geglu, {"x": T(2, 8)}),
        "group_norm": (group_norm, norm),
        "group_norm_silu": (group_norm_silu, {**norm, "shift": T(2, 8)}),
        "layer_norm": (layer_norm, rows),
        "linear_geglu": (linear_geglu, {"x": T(2, 8), "weight": T(6, 8), "bias": T(6)}),
        "sampler_step": (sampler_step, step),
    }


TENSORS = [
    (op, name) for op, (_, given) in good().items() for name in given if isinstance(given[name], Tensor)
]
WRONG: dict[str, Callable[[Tensor], object]] = {
    "dtype": lambda t: t.to(torch.int32),
    "another float dtype": lambda t: t.to(torch.float64) if t.is_floating_point() else t.double(),
    "device": lambda t: t.to("meta"),
    "rank": lambda t: t[None].expand(3, *t.shape),
    "rank below": lambda t: t.reshape(-1)[0],
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "list": lambda t: t.tolist(),
}
ALLOWED = {
    # Whose rank is free, or which is alone and may be of any device and float dtype.
    *((op, "x", "rank") for op in ("geglu", "linear_geglu", "layer_norm")),
    *(("geglu", "x", wrong) for wrong in ("another float dtype", "device")),
    ("sampler_step", "model_out", "another float dtype"),
    ("sampler_step", "step", "rank below"),
}


def test_what_is_refused_below_is_otherwise_taken() -> None:
    for op, given in good().values():
        op(**given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_every_tensor_is_checked(name: str, argument: str, wrong: str) -> None:
    """The error names the operator and the argument, or what the argument is to be like."""
    op, given = good()[name]
    spoilt = {**given, argument: WRONG[wrong](given[argument])}
    if (name, argument, wrong) in ALLOWED:
        op(**spoilt)
        return
    with pytest.raises(KernelArgumentError, match=rf"^{name}: .*\b{argument}\b"):
        op(**spoilt)


@pytest.mark.parametrize("argument", ["x", "history"])
@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(lambda t: t[..., :1].expand_as(t), id="expanded"),
        pytest.param(
            lambda t: t.flatten().as_strided(t.shape, (*t.stride()[:-2], 1, 1)), id="overlapping rows"
        ),
    ],
)
def test_what_is_written_shares_no_memory(argument: str, shared: Callable[[Tensor], Tensor]) -> None:
    given = good()["sampler_step"][1]
    with pytest.raises(
        KernelArgumentError, match=rf"sampler_step: {argument} must have each element in a place"
    ):
        sampler_step(**{**given, argument: shared(given[argument])})


class Everything(nn.Module):
    """Each operator once, on an image and a text of sizes to be known later."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.bias = nn.Parameter(torch.rand(8))
        self.proj = nn.Parameter(torch.rand(16, 8))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x: [B, 8, H, W], text: [B, S, 8]."""
        h = group_norm_silu(x, self.weight, self.bias, 4, 1e-5, text.mean(1))
        h = group_norm(h, self.weight, self.bias, 2, 1e-5).flatten(2).transpose(1, 2)  # [B, HW, 8]
        q, k = (layer_norm(t, self.weight, self.bias, 1e-5).unflatten(-1, (2, 4)) for t in (h, text))
        h, total = add_layer_norm(attention(q, k, k).flatten(2), h, self.weight, self.bias, 1e-5)
        return total + linear_geglu(h, self.proj) + geglu(torch.cat([h, h], -1))


@pytest.mark.parametrize("nodes", [False, True], ids=["references", "nodes"])
def test_the_checks_leave_traced_sizes_free(nodes: bool) -> None:
    """A graph traced at one batch, image and text size runs at others; each operator is one node of it if asked."""
    model = Everything().eval()
    batch, height, width, words = (torch.export.Dim(name, min=1, max=64) for name in "bhws")
    with as_nodes() if nodes else nullcontext():
        program = torch.export.export(
            model,
            (torch.randn(2, 8, 6, 10), torch.randn(2, 7, 8)),
            dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch, 1: words}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    ours = sorted(str(n.target).split(".")[1] for n in program.graph.nodes if "latentrt" in str(n.target))
    assert ours == (sorted([*OPERATORS, "layer_norm"]) if nodes else [])
    for b, h, w, s in ((1, 5, 3, 9), (3, 12, 4, 2)):
        x, text = torch.randn(b, 8, h, w), torch.randn(b, s, 8)
        torch.testing.assert_close(program.module()(x, text), model(x, text))


def test_nodes_are_of_one_thread() -> None:
    """While one thread traces, another goes on computing without the detour."""
    x = torch.randn(2, 4)
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    def work() -> None:
        with Seen():
            geglu(x)

    with as_nodes():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "latentrt.geglu.default" not in seen
        assert seen
        work()
    assert "latentrt.geglu.default" in seen
    seen.clear()
    work()
    assert "latentrt.geglu.default" not in seen
