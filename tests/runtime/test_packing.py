"""What `packing` makes of networks: the same function, with fewer additions and multiplications."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_components
from helpers.tiny_checkpoints import UNETS
from latentrt.kernels import as_nodes
from latentrt.kernels._dispatch import forced
from latentrt.kernels._triton import counted
from latentrt.runtime.engines.base import Component
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.packing import _Projection, defer_biases, pack_attention, upsample_weight
from latentrt.runtime.engines.triton import TritonBackend
from latentrt.runtime.footprint import Tracker
from latentrt.runtime.loading import load_components
from latentrt.runtime.models.unet_blocks import Attention, DownBlock
from latentrt.runtime.weights import open_outline
from tolerances import MODEL, MODEL_HALF_VERSUS_THEIRS, OPERATOR, relative_error
from torch import Tensor, nn

CPU, META = torch.device("cpu"), torch.device("meta")
CONVOLVED = {**tiny_components.UNET, "use_linear_projection": False}  # projections of SD 1.x
SIX = {**tiny_components.UNET, "transformer_layers_per_block": [1, 3], "layers_per_block": 2}
PLAIN = {**tiny_components.VAE, "mid_block_add_attention": False, "use_post_quant_conv": False}
NETWORKS: dict[str, Callable[..., Component]] = {
    "unet": tiny_components.unet,
    "unet with 1x1 convolutions": lambda *a: tiny_components.unet(*a, config=CONVOLVED),
    "deeper unet": lambda *a: tiny_components.unet(*a, config=SIX),
    "refiner's unet": lambda *a: tiny_components.unet(*a, config=UNETS["refiner"]),
    "SD 1.x's unet": lambda *a: tiny_components.unet(*a, config=UNETS["sd15"]),
    "SD 2.x's unet": lambda *a: tiny_components.unet(*a, config=UNETS["sd21"]),
    "decoder": tiny_components.vae_decoder,
    "decoder without attention": lambda *a: tiny_components.vae_decoder(*a, config=PLAIN),
    "encoder": tiny_components.vae_encoder,
}


def outputs(component: Component, backend: Any, **sizes: int) -> Tensor:
    engine = backend.load(component, device=CPU, cache_dir=None)
    (result,) = engine(tiny_components.named_inputs(component, **sizes)).values()
    return result


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 5), (1, 4, 7, 6)], ids=str)
def test_an_upsampling_is_one_transposed_convolution(shape: tuple[int, ...]) -> None:
    """At the borders too, where one pads with zeros what the other does not have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(5, shape[1], 3, 3, generator=generator)
    wanted = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), padding=1)
    found = F.conv_transpose2d(x.double(), upsample_weight(weight).double(), stride=2, padding=1)
    assert (found - wanted).abs().max() < OPERATOR["float32"] * wanted.abs().max()


@pytest.mark.parametrize(
    "sizes",
    [{}, {"height": 7, "width": 5}, {"height": 1, "width": 1}, {"batch": 17}],
    ids=["", "odd", "one latent", "17 rows"],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_network_computes_the_same(name: str, sizes: dict[str, int]) -> None:
    if "height" in sizes and name == "encoder":  # whose images are multiples of its scale
        sizes = {"image_height": 2 * sizes["height"], "image_width": 2 * sizes["width"]}
    component = NETWORKS[name]()
    wanted = outputs(component, EagerBackend(), **sizes)
    found = outputs(component, TritonBackend(), **sizes)
    assert (found - wanted).abs().max() < MODEL * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_network_rounds_no_worse(name: str, dtype: torch.dtype) -> None:
    component = NETWORKS[name](dtype)
    inputs = tiny_components.named_inputs(component)
    with torch.inference_mode():
        exact = component.build().double()(*(x.double() for x in inputs.values()))
    theirs, ours = (outputs(component, b).double() for b in (EagerBackend(), TritonBackend()))
    error, allowed = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
    assert error < MODEL_HALF_VERSUS_THEIRS * allowed


@pytest.mark.parametrize("name", NETWORKS)
def test_biases_are_added_by_norms_and_matmuls(name: str) -> None:
    """Of convolutions only those at the ends of a network, of few channels, have one left."""
    module = NETWORKS[name]().build()
    defer_biases(module)
    left = {key for key, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    assert {key.rpartition(".")[2] for key in left} <= {"conv_out", "quant_conv", "post_quant_conv"}
    assert any(key.endswith("conv_out") for key in left)


def test_attention_keeps_half_inputs_whatever_the_configuration_asks_for() -> None:
    config = {**tiny_components.UNET, "upcast_attention": True}
    module = tiny_components.unet(config=config).build()
    attentions = [m for m in module.modules() if isinstance(m, Attention)]
    assert {m.upcast for m in attentions} == {True}
    pack_attention(module)
    assert {m.upcast for m in attentions} == {False}


@pytest.mark.parametrize("name", ["unet", "decoder"])
def test_eager_runs_none_of_our_kernels(name: str) -> None:
    """It is what they are held against, on a GPU too: here where CPU tensors are sent to them."""
    component = NETWORKS[name]()
    wanted = outputs(component, EagerBackend())
    with forced(), counted() as counts:
        found = outputs(component, EagerBackend())
        assert not counts
        outputs(component, TritonBackend())
        assert counts
    assert found.equal(wanted)


class Sums(Tracker):
    """Also counts, of tensors with pixels, what additions, copies and matmuls in place there are."""

    def __init__(self) -> None:
        super().__init__(90)
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.add.Tensor and args[0].ndim > 2:
            self.count["bias" if args[1].shape[1:] == (1, 1) else "tensor"] += 1
        if func is torch.ops.aten.clone.default:
            self.count["copy"] += 1
        if func is torch.ops.aten.addmm_.default:
            self.count["matmul in place"] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("model", "name", "wanted"),
    [
        # 6 residual blocks without a shortcut, and the transformers before 3 resamplings. The bias of the convolution
        # before the first downsampling, which has no transformer. In place: 11 shortcuts, the last feed-forward of 11
        # transformers, the other 8 transformers.
        ("sdxl", "unet", {"tensor": 6 + 3, "bias": 1, "matmul in place": 11 + 11 + 8}),
        # 8 such blocks; 4 transformers before resamplings, and a shortcut where the level below has no transformer.
        # In place: the other 13 shortcuts, 11 feed-forwards, 7 transformers.
        ("sdxl-refiner", "unet", {"tensor": 8 + 4 + 1, "bias": 1, "matmul in place": 13 + 11 + 7}),
        # 12 such blocks, the biases before 3 upsamplings; in place: 2 shortcuts and the attention.
        ("sdxl", "vae_decoder", {"tensor": 12, "bias": 3, "matmul in place": 3}),
        ("sdxl", "vae_encoder", {"tensor": 8, "bias": 3, "matmul in place": 3}),
    ],
    ids=str,
)
def test_additions_that_are_left(model: str, name: str, wanted: dict[str, int]) -> None:
    """At full size, on the meta device. What follows a matmul is added by it, and nothing is copied for that."""
    component = load_components(open_outline(model), torch.float16)[name]
    sizes = {"batch": 2, "height": 128, "width": 128, "image_height": 1024, "image_width": 1024, "tokens": 77}
    inputs = {
        spec.name: torch.empty(spec.shape(sizes), dtype=spec.dtype, device=META) for spec in component.inputs
    }
    engine = TritonBackend().load(replace(component, build=component.on_meta), device=META, cache_dir=None)
    with as_nodes(), Sums() as sums:
        engine({k: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for k, x in inputs.items()})
    assert sums.count == wanted


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_projection_is_accumulated_where_the_layout_allows_it(memory_format: torch.memory_format) -> None:
    """Convolutions give another layout where cuDNN is off: then into a copy."""
    layer, rows, image = nn.Linear(6, 5, bias=False), torch.randn(2, 12, 6), torch.randn(2, 5, 3, 4)
    given = image.clone(memory_format=memory_format)
    with torch.no_grad():
        wanted = image + layer(rows).transpose(1, 2).unflatten(2, (3, 4))
        found = _Projection(layer, None).add(rows, given)
    assert relative_error(found, wanted) < OPERATOR["float32"]
    assert (found.data_ptr() == given.data_ptr()) == (memory_format == torch.channels_last)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_accumulated_in_place_is_read_by_nobody_else(name: str) -> None:
    """Neither an input, nor a tensor that a down block keeps for the up blocks."""
    component = NETWORKS[name]()
    engine: Any = TritonBackend().load(component, device=CPU, cache_dir=None)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, __: object, result: list[Tensor]) -> None:
        seen.extend((x, x.clone()) for x in result)

    for module in engine._module.modules():
        if isinstance(module, DownBlock):
            module.register_forward_hook(keep)
    inputs = tiny_components.named_inputs(component)
    seen += [(x, x.clone()) for x in inputs.values()]
    engine(inputs)
    assert all(x.equal(before) for x, before in seen)


def test_a_decoder_keeps_one_weight_of_an_upsampling() -> None:
    """A UNet keeps the 3x3 as well, for sizes that are not even."""
    kept = {}
    for name in ("decoder", "unet"):
        module = NETWORKS[name]().build()
        defer_biases(module)
        named = module.named_parameters()
        kept[name] = {x.shape[2:] for key, x in named if "upsamplers" in key and x.ndim == 4}
    assert kept == {"decoder": {(4, 4)}, "unet": {(4, 4), (3, 3)}}
