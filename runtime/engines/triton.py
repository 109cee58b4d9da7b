"""The PyTorch modules over the project's Triton kernels, laid out for them.

Weights are packed once, at load (`packing.py`): images are channels last, and fewer kernels compute the same. The text
projections of all cross-attentions are one matmul, run once per prompt, and the time projections of all residual
blocks another, run once for all steps of a loop. Only what depends on the latents is left in a step.

On the CPU the operators are their PyTorch references: the same program, slowly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import unavailable
from ..models.unet import UNet
from .base import STEPS_AT_ONCE, Availability, Component, Engine, Program, Timesteps
from .eager import EagerBackend, EagerEngine
from .packing import defer_biases, pack, pack_attention

__all__ = ["TritonBackend", "TritonEngine"]


class TritonEngine(EagerEngine):
    """A packed module on one device."""

    _unet: _PackedUNet | None = None

    def _operators(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _lay_out(self, module: nn.Module) -> Sequence[Tensor]:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        defer_biases(module)
        packed = pack_attention(module)
        self._unet = _PackedUNet(module) if isinstance(module, UNet) else None
        return packed if self._unet is None else [*packed, *self._unet.tensors]

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        if self._unet is None or timesteps is None:
            return super().bind(inputs, outputs)
        (prediction,) = outputs.values()
        return _UNetProgram(self._unet, inputs, prediction, timesteps)

    def close(self) -> None:
        super().close()
        self._unet = None


class TritonBackend:
    name = "triton"
    upcast = torch.bfloat16

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        found = EagerBackend().availability(device, dtype)
        if not found.ok:
            return found
        if device.type == "cpu":
            return Availability(True, "the operators' PyTorch references: Triton's kernels need a GPU")
        reason = unavailable(device)
        if reason:
            what, _, remedy = reason.partition("; ")
            return Availability(False, what, remedy or "use --backend eager")
        return found

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        return TritonEngine(component, device)


class _PackedUNet:
    """A UNet whose text projections are one matmul and whose time projections are another.

    Attributes:
        tensors: the packed weights and biases.
        text_widths: channels of each transformer block's keys, then of its values, in turn.
        shift_widths: channels of each residual block's shift.
    """

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        crossed = [block.attn2 for block in unet.transformers()]
        shifted = [block.time_emb_proj for block in unet.resnets() if block.time_emb_proj is not None]
        self._text, _ = pack([linear for attention in crossed for linear in (attention.to_k, attention.to_v)])
        self._time = pack(shifted)
        self.tensors = [x for x in (self._text, *self._time) if x is not None]
        self.text_widths = [attention.to_k.out_features for attention in crossed for _ in range(2)]
        self.shift_widths = [linear.out_features for linear in shifted]

    def text(self, encoder_hidden_states: Tensor, out: Tensor) -> None:
        """[R, S, D] -> keys and values of all blocks, written into [R, S, sum of text_widths]: SDXL's are 51 MB for one
        guided image in half precision, too much to copy."""
        torch.mm(encoder_hidden_states.flatten(0, 1), self._text.t(), out=out.flatten(0, 1))

    def shifts(self, timesteps: Tensor, constants: Mapping[str, Tensor], out: Tensor) -> None:
        """[N] timesteps -> the shifts of all blocks, into [N, R * sum of shift_widths]: a step's are one row, in which
        each block's [R, width] are contiguous, as the kernels want them."""
        unet, text = self.unet, constants["encoder_hidden_states"]
        rows, steps, cond = len(text), len(timesteps), constants.get("timestep_cond")
        times = timesteps if cond is None else timesteps.repeat_interleave(rows)
        emb = unet.embed_time(times, text.dtype, None if cond is None else cond.repeat(steps, 1))
        emb = emb.view(steps, -1, emb.shape[-1])  # [N, 1 or R, T]
        if unet.add_embedding is not None:
            emb = emb + unet.embed_sizes(constants["text_embeds"], constants["time_ids"])
        weight, bias = self._time
        shifts = F.linear(F.silu(emb.expand(steps, rows, -1)), weight, bias).split(self.shift_widths, dim=-1)
        destinations = out.split([rows * width for width in self.shift_widths], dim=1)
        for block, destination in zip(shifts, destinations, strict=True):
            destination.view(block.shape).copy_(block)


class _UNetProgram:
    """A packed UNet over static tensors: `prepare` computes keys, values and shifts, `run` the rest of a step."""

    capturable = True

    def __init__(
        self, packed: _PackedUNet, inputs: Mapping[str, Tensor], prediction: Tensor, timesteps: Timesteps
    ) -> None:
        self._packed, self._inputs, self._prediction, self._timesteps = packed, inputs, prediction, timesteps
        text = inputs["encoder_hidden_states"]
        self._text = text.new_zeros((*text.shape[:2], sum(packed.text_widths)))
        self._shifts = text.new_zeros((len(timesteps.values), len(text) * sum(packed.shift_widths)))
        self._sizes = [len(text) * width for width in packed.shift_widths]
        self.nbytes = self._text.nbytes + self._shifts.nbytes

    @torch.inference_mode()
    def prepare(self) -> None:
        self._packed.text(self._inputs["encoder_hidden_states"], self._text)
        steps = self._timesteps.values.split(STEPS_AT_ONCE)
        for values, shifts in zip(steps, self._shifts.split(STEPS_AT_ONCE), strict=True):
            self._packed.shifts(values, self._inputs, shifts)

    @torch.inference_mode()
    def run(self) -> None:
        text = iter(self._text.split(self._packed.text_widths, dim=-1))
        row = self._shifts.index_select(0, self._timesteps.index)[0]
        shifts = [
            shift.view(-1, width)
            for shift, width in zip(row.split(self._sizes), self._packed.shift_widths, strict=True)
        ]
        sample = self._inputs["sample"].contiguous(memory_format=torch.channels_last)
        self._prediction.copy_(self._packed.unet.step(sample, shifts, zip(text, text, strict=True)))
