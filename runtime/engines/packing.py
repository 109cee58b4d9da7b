"""Weights laid out for the back end `triton`, once, on the host: fewer kernels compute the same, up to rounding.

- The three projections of a self-attention are one matmul (fused QKV).
- A 1x1 convolution of a channels-last image is a matmul, which adds the bias without a kernel of its own.
- The bias of any other convolution is left to the norm that follows: PyTorch adds it to cuDNN's result in a kernel of
  its own, which reads and writes the whole image once more; a norm reads the image anyway, and adds a shift to each
  channel at no cost. Until then the bias is *pending*.
- A matmul whose result is added to another tensor is accumulated into that tensor, in place: no kernel adds the two.
  Such a matmul has no other addend, so its bias is pending as well.
- An upsampling and its convolution are one transposed convolution, with four ninths of the multiplications and without
  the upsampled image in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import (
    Downsample,
    GroupNorm,
    GroupNormSiLU,
    ResidualLinear,
    ResnetBlock,
    Shortcut,
    Upsample,
)
from ..models.unet import UNet
from ..models.unet_blocks import FeedForward, Transformer, TransformerBlock
from ..models.vae import VAEDecoder, VAEEncoder

__all__ = ["FusedUpsample", "defer_biases", "defer_in_resnet", "pack", "pack_attention", "upsample_weight"]

Norm = TypeVar("Norm", GroupNorm, GroupNormSiLU)

_ROWS = 16
"""Rows stored of a constant shift: the norm kernel wants a contiguous [B, C]. A larger batch expands one row, which the
kernel's wrapper copies."""


def pack(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights and biases of linear layers over one input; the layers' own become views of the result.

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
    """Fuse the three projections of each self-attention into one matmul; returns the fused weights [3C, C]."""
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
    """Move each convolution's bias, in a UNet, VAE decoder or VAE encoder, to the next layer that adds a vector anyway:
    a norm's shift, or a projection's bias. PyTorch adds a convolution's own in a kernel by itself.

    Until that layer the images lack the bias: it is pending. Any other network is left as it is.
    """
    if isinstance(module, UNet):
        _defer_in_unet(module)
    elif isinstance(module, VAEDecoder):
        _defer_in_decoder(module)
    elif isinstance(module, VAEEncoder):
        _defer_in_encoder(module)


def upsample_weight(weight: Tensor) -> Tensor:
    """The weight of the transposed convolution (4x4, stride 2, padding 1) that equals a nearest-neighbour upsampling
    followed by a 3x3 convolution.

    Each pixel of the result sees 2x2 pixels of the small image, each through the sum of the weights that meet its
    copies. Compare Shi et al., "Is the deconvolution layer the same as a convolutional layer?" (2016).

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
    """A 1x1 convolution as a matmul."""

    def __init__(self, conv: nn.Conv2d, bias: Tensor) -> None:
        """`bias`: float32 [Cout], in place of the convolution's."""
        super().__init__()
        self.weight = conv.weight
        self.bias = _constant(bias, conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W], channels last -> [B, Cout, H, W], channels last."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _accumulate(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out [..., Cout] + x [..., Cin] @ weight [Cout, Cin].T. If `out` is contiguous it becomes the sum: cuBLAS adds to
    what it finds there."""
    rows = out.reshape(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return rows.view(out.shape)


class _Projection(nn.Module):
    """A `ResidualLinear` which, if it has no bias, is accumulated into the image."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, bias: Tensor | None) -> None:
        """`bias`: float32 [Cout], in place of the layer's."""
        super().__init__()
        self.weight = layer.weight
        self.bias = None if bias is None else _constant(bias, layer.weight)

    def add(self, rows: Tensor, image: Tensor) -> Tensor:
        """rows: [B, HW, Cin]; image: [B, Cout, H, W], channels last. Returns their sum, like `image`."""
        weight = self.weight.flatten(1)
        if self.bias is None:
            return _accumulate(image.permute(0, 2, 3, 1), rows, weight).permute(0, 3, 1, 2)
        out: Tensor = image + F.linear(rows, weight, self.bias).transpose(1, 2).unflatten(2, image.shape[2:])
        return out


class _Shortcut(_Projection):
    """A `Shortcut` as a matmul which, if it has no bias, is accumulated into the image."""

    def add(self, x: Tensor, image: Tensor) -> Tensor:
        """x: [B, Cin, H, W]; image: [B, Cout, H, W]; channels last. Returns their sum, like `image`."""
        return super().add(x.permute(0, 2, 3, 1).flatten(1, 2), image)


class _LastFeedForward(nn.Module):
    """The `FeedForward` of a transformer's last block, without its last bias, accumulated into the residual stream."""

    def __init__(self, ff: FeedForward) -> None:
        super().__init__()
        self.gated = ff.net[0]
        self.weight = cast(nn.Linear, ff.net[2]).weight

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, None]:
        """x, stream: [B, S, C]. Returns the sum, to which nothing is to be added."""
        return _accumulate(stream, self.gated(x), self.weight), None


class _BiasedNorm(nn.Module):
    """A norm of x + bias."""

    def __init__(self, norm: GroupNorm | GroupNormSiLU, bias: Tensor) -> None:
        """`bias`: float32 [C]."""
        super().__init__()
        self.norm = norm
        self.bias = _constant(bias.repeat(_ROWS, 1), norm.weight)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W]; shift: [B, C]."""
        rows = self.bias[: len(x)] if len(x) <= _ROWS else self.bias[:1].expand(len(x), -1)
        out: Tensor = self.norm(x, rows if shift is None else rows + shift)
        return out


class _BiasedDownsample(nn.Module):
    """A downsampling of x + bias. The convolution cannot absorb the bias: its padding is zeros of the sum."""

    def __init__(self, downsample: Downsample, bias: Tensor) -> None:
        """`bias`: float32 [C]."""
        super().__init__()
        self.downsample = downsample
        self.bias = _constant(bias[:, None, None], downsample.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.downsample(x + self.bias)
        return out


class FusedUpsample(nn.Module):
    """An upsampling of x + bias, [B, C, H, W], to twice H and W, with its convolution; `bias`: float32 [C], or None."""

    def __init__(self, upsample: Upsample, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else _constant(bias[:, None, None], upsample.conv.weight)
        self.weight = nn.Parameter(upsample_weight(upsample.conv.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.biased(x), self.weight, stride=2, padding=1)

    def biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias


class _SizedUpsample(FusedUpsample):
    """The same, or to another size with the upsampling as it was."""

    def __init__(self, upsample: Upsample, bias: Tensor | None) -> None:
        super().__init__(upsample, bias)
        self.upsample = upsample

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return super().forward(x)
        out: Tensor = self.upsample(self.biased(x), size)
        return out


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)


def _pop_bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Remove the layer's bias and return it, float32 [Cout]; zeros if it had none."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    layer.bias = cast(nn.Parameter, None)
    return bias.float()


# Each function below takes the bias that is pending for its input images (float32 [C], None for none) and returns the
# one that is pending for its output images. Layers replace layers of another type, hence the casts; a ModuleList does
# not say what is in it, hence Any.
#
# Before an up- or downsampling a pending bias costs a kernel of its own. There a matmul keeps its bias and is added to
# the image by a kernel, which moves as many bytes. In a VAE the block there has no shortcut, thus no matmul.


def defer_in_resnet(
    block: ResnetBlock, pending: Tensor | None, before_resampling: bool = False
) -> Tensor | None:
    """What `defer_biases` does in one residual block.

    Args:
        block: is changed.
        pending: float32 [Cin], the bias its input images lack, or None.
        before_resampling: an up- or downsampling takes its output: nothing stays pending if there is a shortcut.

    Returns:
        float32 [Cout], the bias its output images lack, or None.
    """
    block.norm1 = _with_bias(block.norm1, pending)
    inner = _pop_bias(block.conv1)
    if block.time_emb_proj is None:
        block.norm2 = _with_bias(block.norm2, inner)
    else:  # its result is the shift of norm2
        block.time_emb_proj.bias = _constant(block.time_emb_proj.bias + inner, block.time_emb_proj.weight)
    outer = _pop_bias(block.conv2)
    shortcut = block.conv_shortcut
    if shortcut is None:
        return outer if pending is None else pending + outer
    bias = _pop_bias(shortcut) + outer
    if pending is not None:
        bias = bias + shortcut.weight.flatten(1).float() @ pending
    block.conv_shortcut = cast(Shortcut, _Shortcut(shortcut, bias if before_resampling else None))
    return None if before_resampling else bias


def _with_bias(norm: Norm, pending: Tensor | None) -> Norm:
    return norm if pending is None else cast(Norm, _BiasedNorm(norm, pending))


def _defer_in_transformer(
    block: Transformer, pending: Tensor | None, before_resampling: bool = False
) -> Tensor | None:
    block.norm = _with_bias(block.norm, pending)
    if isinstance(block.proj_in, nn.Conv2d):
        block.proj_in = cast(nn.Conv2d, _Pointwise(block.proj_in, _pop_bias(block.proj_in)))
    projection = block.proj_out
    bias = _pop_bias(projection)
    last: Any = block.transformer_blocks[-1]
    bias = bias + projection.weight.flatten(1).float() @ _pop_bias(last.ff.net[2])
    last.ff = _LastFeedForward(last.ff)
    if pending is not None:
        bias = bias + pending
    block.proj_out = cast(ResidualLinear, _Projection(projection, bias if before_resampling else None))
    return None if before_resampling else bias


def _downsample(layers: Any, pending: Tensor | None) -> Tensor | None:
    for i, layer in enumerate(layers):
        bias = _pop_bias(layer.conv)
        if pending is not None:
            layers[i] = _BiasedDownsample(layer, pending)
        pending = bias
    return pending


def _upsample(layers: Any, pending: Tensor | None, packed: type[FusedUpsample]) -> Tensor | None:
    for i, layer in enumerate(layers):
        bias = _pop_bias(layer.conv)
        layers[i] = packed(layer, pending)
        pending = bias
    return pending


def _defer_in_unet(unet: UNet) -> None:
    down: Any
    up: Any
    pending: Tensor | None = _pop_bias(unet.conv_in)
    skips = [pending]
    for down in unet.down_blocks:
        for i in range(len(down.resnets)):
            pending = _defer_in_pair(down, i, pending, down.downsamplers)
            skips.append(pending)
        if down.downsamplers:
            pending = _downsample(down.downsamplers, pending)
            skips.append(pending)
    middle: Any = unet.mid_block
    pending = _defer_in_transformer(middle.attentions[0], defer_in_resnet(middle.resnets[0], pending))
    pending = defer_in_resnet(middle.resnets[1], pending)
    for up in unet.up_blocks:
        for i, resnet in enumerate(up.resnets):
            joined = _cat_pending(pending, skips.pop(), resnet.conv1.in_channels)
            pending = _defer_in_pair(up, i, joined, up.upsamplers)
        pending = _upsample(up.upsamplers, pending, _SizedUpsample)
    unet.conv_norm_out = _with_bias(unet.conv_norm_out, pending)


def _defer_in_pair(level: Any, i: int, pending: Tensor | None, resamplers: Any) -> Tensor | None:
    """One residual block of a level, and its transformer where the level has them."""
    before_resampling = len(resamplers) > 0 and i == len(level.resnets) - 1
    if not level.attentions:
        return defer_in_resnet(level.resnets[i], pending, before_resampling)
    pending = defer_in_resnet(level.resnets[i], pending)
    return _defer_in_transformer(level.attentions[i], pending, before_resampling)


def _cat_pending(first: Tensor | None, second: Tensor | None, channels: int) -> Tensor | None:
    """The pending bias of two images concatenated to `channels` channels."""
    given = second if first is None else first
    if given is None:
        return None
    zeros = given.new_zeros(channels - len(given))
    return torch.cat([zeros if x is None else x for x in (first, second)])


def _defer_in_decoder(vae: VAEDecoder) -> None:
    net = vae.decoder
    pending = _defer_in_middle(net.mid_block, _pop_bias(net.conv_in))
    pending = _defer_in_levels(net.up_blocks, pending)
    net.conv_norm_out = _with_bias(net.conv_norm_out, pending)


def _defer_in_encoder(vae: VAEEncoder) -> None:
    net = vae.encoder
    pending = _defer_in_levels(net.down_blocks, _pop_bias(net.conv_in))
    pending = _defer_in_middle(net.mid_block, pending)
    net.conv_norm_out = _with_bias(net.conv_norm_out, pending)


def _defer_in_levels(levels: Any, pending: Tensor | None) -> Tensor | None:
    for level in levels:
        for resnet in level.resnets:
            pending = defer_in_resnet(resnet, pending)
        pending = _upsample(level.upsamplers, _downsample(level.downsamplers, pending), FusedUpsample)
    return pending


def _defer_in_middle(middle: Any, pending: Tensor | None) -> Tensor | None:
    pending = defer_in_resnet(middle.resnets[0], pending)
    for attention in middle.attentions:
        attention.group_norm = _with_bias(attention.group_norm, pending)
        projection = attention.to_out[0]
        bias = _pop_bias(projection)
        attention.to_out[0] = _Projection(projection, None)
        pending = bias if pending is None else pending + bias
    return defer_in_resnet(middle.resnets[1], pending)
