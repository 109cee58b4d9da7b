"""Muon for a network's matrices and convolutions, AdamW for the rest (Jordan et al. 2024, "Muon: An optimizer for
hidden layers"; the update's size as in Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

torch.optim.Muon takes matrices alone; a UNet's work is in its convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic a x + b x^3 + c x^5
ITERATIONS = 5
UPDATE_SIZE = 0.2  # root mean square of an update at rate 1, about AdamW's
TOGETHER = 8  # matrices of a shape in one batched product


def orthogonalised(matrices: Tensor) -> Tensor:
    """[B, M, N] -> about U V^T of each matrix's U S V^T, by Newton-Schulz iteration.

    Every iterate is a polynomial in X X^T times X, so for long matrices the iteration runs on the small side alone.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    total = torch.eye(x.shape[-2], device=x.device, dtype=x.dtype).expand_as(gram)
    for _ in range(ITERATIONS):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor @ total
        gram = factor @ gram @ factor
    x = total @ x
    return x if wide else x.mT


def _as_matrix(values: Tensor) -> Tensor:
    """[M, N] or [M, C, h, w] in channels_last -> the same memory as [M, N]."""
    return values if values.ndim == 2 else values.permute(0, 2, 3, 1).view(len(values), -1)


class Muon(torch.optim.Optimizer):
    """`workers` threads share the matrices where there are several."""

    def __init__(
        self,
        module: nn.Module,
        *,
        adam_for: tuple[str, ...],
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        workers: int = 1,
    ) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            (rest if parameter.ndim < 2 or name.startswith(adam_for) else matrices).append(parameter)
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay)
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in matrices:
            by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        # the largest first, so that threads end together
        self.batches = sorted(
            (same[k : k + TOGETHER] for same in by_shape.values() for k in range(0, len(same), TOGETHER)),
            key=lambda batch: -len(batch) * min(len(batch[0]), batch[0][0].numel()) * batch[0].numel(),
        )
        self.pool = (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
            if workers > 1
            else None
        )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients; the rate is the first group's."""
        self.adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.adam.step()
        done: Iterable[None] = (self.pool.map if self.pool else map)(self._update, self.batches)
        for _ in done:
            pass

    @torch.no_grad()
    def _update(self, batch: list[nn.Parameter]) -> None:
        group = self.param_groups[0]
        directions = []
        for parameter in batch:
            assert parameter.grad is not None
            gradient, state = _as_matrix(parameter.grad), self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(state["momentum"], group["momentum"]))
        size = UPDATE_SIZE * max(directions[0].shape) ** 0.5
        for parameter, update in zip(batch, orthogonalised(torch.stack(directions)), strict=True):
            values = _as_matrix(parameter)
            values.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)

    def state_dict(self) -> dict[str, Any]:
        """The state of both parts."""
        return {"muon": super().state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of both parts."""
        super().load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
