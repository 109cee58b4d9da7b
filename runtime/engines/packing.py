"""Weights laid out for the back end `triton`, on the host, once: fewer kernels compute what they did, but for rounding.

- A self-attention's three projections are one product.
- 1x1 convolutions of images whose channels are last are products too, which add their bias and run no kernel for it.
- The bias of any other convolution is left to the norm that follows. PyTorch adds it to what cuDNN computed in a
  kernel of its own, which reads and writes the whole image once more; a norm reads the image anyway, and adds a shift
  to each channel of it at no cost.
- An image is doubled and convolved in one: a transposed convolution, with four ninths of the products, and without
  the doubled image in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Downsample, GroupNorm, GroupNormSiLU, Upsample
from ..models.unet import UNet
from ..models.unet_blocks import TransformerBlock
from ..models.vae import VAEDecoder, VAEEncoder

__all__ = ["Doubling", "defer_biases", "defer_in_resnet", "doubling_weight", "pack", "pack_attention"]

_ROWS = 16  # of a batch, up to which a constant shift is there for each row


def pack(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of linear layers over one input as one layer's, of which theirs become views.

    Returns:
        Weight [sum of outputs, inputs] and bias [sum of outputs], None where they have none.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    begin = 0
    for linear in linears:
        end = begin + linear.out_features
        linear.weight.data = weight[begin:end]
        if bias is not None:
            linear.bias.data = bias[begin:end]
        begin = end
    return weight, bias


def pack_attention(module: nn.Module) -> list[Tensor]:
    """Make the three projections of each self-attention one product; returns their weights."""
    packed = []
    for block in module.modules():
        if isinstance(block, TransformerBlock):
            own = block.attn1
            # The operator's scores are float32 whatever goes in, which is what a configuration asks for by this; its
            # inputs in float32 as well would keep them from the tensor cores.
            own.upcast = block.attn2.upcast = False
            own.to_qkv, _ = pack([own.to_q, own.to_k, own.to_v])
            packed.append(own.to_qkv)
    return packed


def defer_biases(module: nn.Module) -> None:
    """Follow through a network what is missing of its images while its convolutions add no bias, and hand it to the
    layers that must know. A network of another kind is left as it is."""
    if isinstance(module, UNet):
        _defer_in_unet(module)
    elif isinstance(module, VAEDecoder):
        _defer_in_decoder(module.decoder)
    elif isinstance(module, VAEEncoder):
        _defer_in_encoder(module.encoder)


def doubling_weight(weight: Tensor) -> Tensor:
    """The transposed convolution (4x4, stride 2, padding 1) that repeats every pixel and convolves the result.

    Every pixel of the doubled image sees two by two pixels of the small one, each through the sum of the weights that
    met copies of it. Shi et al., "Is the deconvolution layer the same as a convolutional layer?" (2016), has the like.

    Args:
        weight: [Cout, Cin, 3, 3], of a convolution with padding 1.

    Returns:
        [Cin, Cout, 4, 4] of its dtype, channels last; sums are taken in float32.
    """
    sums = torch.tensor(
        [[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32, device=weight.device
    )
    folded = torch.einsum("ka,lb,oiab->iokl", sums, sums, weight.float())
    return folded.to(weight.dtype).contiguous(memory_format=torch.channels_last)


class _Pointwise(nn.Module):
    """A 1x1 convolution as a product."""

    def __init__(self, conv: nn.Conv2d, bias: Tensor) -> None:
        """`bias`: float32 [Cout], in place of the convolution's."""
        super().__init__()
        self.weight = conv.weight
        self.bias = _constant(bias, conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W], channels last -> [B, Cout, H, W], channels last."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _Shifted(nn.Module):
    """A norm of x + offset."""

    def __init__(self, norm: GroupNorm | GroupNormSiLU, offset: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.offset = _constant(offset.repeat(_ROWS, 1), norm.weight)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        rows = self.offset[: len(x)] if len(x) <= _ROWS else self.offset[:1].expand(len(x), -1)
        out: Tensor = self.norm(x, rows if shift is None else rows + shift)
        return out


class _Halving(nn.Module):
    """A halving of x + offset. Zeros beyond the edge are zeros of the sum, so the convolution cannot take it over."""

    def __init__(self, halving: Downsample, offset: Tensor) -> None:
        super().__init__()
        self.halving = halving
        self.offset = _constant(offset[:, None, None], halving.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.halving(x + self.offset)
        return out


class Doubling(nn.Module):
    """A doubling of x + offset, [B, C, H, W]; `offset`: float32 [C], or None."""

    def __init__(self, doubling: Upsample, offset: Tensor | None) -> None:
        super().__init__()
        self.doubling = doubling
        self.offset = None if offset is None else _constant(offset[:, None, None], doubling.conv.weight)
        self.weight = nn.Parameter(doubling_weight(doubling.conv.weight), requires_grad=False)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if self.offset is not None:
            x = x + self.offset
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return F.conv_transpose2d(x, self.weight, stride=2, padding=1)
        out: Tensor = self.doubling(x, size)
        return out


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)


def _take(conv: nn.Conv2d) -> Tensor:
    """The convolution's bias, float32 [Cout], which it no longer has."""
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    conv.bias = None
    return bias.float()


# Each function below takes the bias that its input images still lack (float32 [C], None for none) and returns the one
# that its output images lack.
# Layers are put in the place of others, which types do not allow: hence Any.


def defer_in_resnet(block: Any, offset: Tensor | None) -> Tensor | None:
    """What `defer_biases` does in one residual block.

    Args:
        block: a `ResnetBlock`.
        offset: float32 [Cin], which its images lack, or None.

    Returns:
        float32 [Cout], which its results lack; None where that is nothing.
    """
    block.norm1 = _shifted(block.norm1, offset)
    inner = _take(block.conv1)
    if block.time_emb_proj is None:
        block.norm2 = _shifted(block.norm2, inner)
    else:  # the norm is shifted by this one's result
        block.time_emb_proj.bias = _constant(block.time_emb_proj.bias + inner, block.time_emb_proj.weight)
    lacking = _take(block.conv2)
    shortcut = block.conv_shortcut
    if shortcut is None:
        return lacking if offset is None else offset + lacking
    bias = _take(shortcut) + lacking
    if offset is not None:
        bias = bias + shortcut.weight.flatten(1).float() @ offset
    block.conv_shortcut = _Pointwise(shortcut, bias)
    return None


def _shifted(norm: Any, offset: Tensor | None) -> nn.Module:
    return norm if offset is None else _Shifted(norm, offset)


def _transformer(block: Any, offset: Tensor | None) -> None:
    """Its last product adds what the image around it lacks, so that the sum lacks nothing."""
    block.norm = _shifted(block.norm, offset)
    last = block.proj_out
    if block.linear:
        if offset is not None:
            last.bias = _constant(last.bias + offset, last.weight)
    else:
        block.proj_in = _Pointwise(block.proj_in, _take(block.proj_in))
        bias = _take(last)
        block.proj_out = _Pointwise(last, bias if offset is None else bias + offset)


def _halve(halvings: Any, offset: Tensor | None) -> Tensor | None:
    for i, halving in enumerate(halvings):
        bias = _take(halving.conv)
        if offset is not None:
            halvings[i] = _Halving(halving, offset)
        offset = bias
    return offset


def _double(doublings: Any, offset: Tensor | None) -> Tensor | None:
    for i, doubling in enumerate(doublings):
        bias = _take(doubling.conv)
        doublings[i] = Doubling(doubling, offset)
        offset = bias
    return offset


def _defer_in_unet(unet: Any) -> None:
    offset: Tensor | None = _take(unet.conv_in)
    skips = [offset]
    for down in unet.down_blocks:
        for i, resnet in enumerate(down.resnets):
            offset = defer_in_resnet(resnet, offset)
            if down.attentions:
                _transformer(down.attentions[i], offset)
                offset = None
            skips.append(offset)
        if down.downsamplers:
            offset = _halve(down.downsamplers, offset)
            skips.append(offset)
    middle = unet.mid_block
    _transformer(middle.attentions[0], defer_in_resnet(middle.resnets[0], offset))
    offset = defer_in_resnet(middle.resnets[1], None)
    for up in unet.up_blocks:
        for i, resnet in enumerate(up.resnets):
            offset = defer_in_resnet(resnet, _joined(offset, skips.pop(), resnet.conv1.in_channels))
            if up.attentions:
                _transformer(up.attentions[i], offset)
                offset = None
        offset = _double(up.upsamplers, offset)
    unet.conv_norm_out = _shifted(unet.conv_norm_out, offset)


def _joined(first: Tensor | None, second: Tensor | None, channels: int) -> Tensor | None:
    """What two images lack that are joined, of so many channels together."""
    given = second if first is None else first
    if given is None:
        return None
    nothing = given.new_zeros(channels - len(given))
    return torch.cat([nothing if x is None else x for x in (first, second)])


def _defer_in_decoder(net: Any) -> None:
    offset = _defer_in_middle(net.mid_block, _take(net.conv_in))
    offset = _defer_in_levels(net.up_blocks, offset)
    net.conv_norm_out = _shifted(net.conv_norm_out, offset)


def _defer_in_encoder(net: Any) -> None:
    offset = _defer_in_levels(net.down_blocks, _take(net.conv_in))
    offset = _defer_in_middle(net.mid_block, offset)
    net.conv_norm_out = _shifted(net.conv_norm_out, offset)


def _defer_in_levels(levels: Any, offset: Tensor | None) -> Tensor | None:
    for level in levels:
        for resnet in level.resnets:
            offset = defer_in_resnet(resnet, offset)
        offset = _double(level.upsamplers, _halve(level.downsamplers, offset))
    return offset


def _defer_in_middle(middle: Any, offset: Tensor | None) -> Tensor | None:
    offset = defer_in_resnet(middle.resnets[0], offset)
    for attention in middle.attentions:
        attention.group_norm = _shifted(attention.group_norm, offset)
    return defer_in_resnet(middle.resnets[1], offset)
