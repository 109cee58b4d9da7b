"""Data parallelism in threads: each core takes its part of the batch through its own copy of the graph.

On a CPU that other programs share, one operator spread over all cores waits for the slowest core at every
operator; here the cores meet once a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Replicas:
    """`count` views of a module that share its weights but not their gradients."""

    def __init__(self, module: nn.Module, count: int) -> None:
        self.modules = [module, *(copy.deepcopy(module) for _ in range(count - 1))]
        for replica in self.modules[1:]:
            for own, shared in zip(replica.parameters(), module.parameters(), strict=True):
                own.data = shared.data
        self.pool = (
            ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None
        )

    def backward(self, loss: Callable[..., Tensor], *batch: Tensor) -> float:
        """Leave the gradients of the mean of `loss(module, *part)` in the first module; returns that mean.

        Each module takes a part of the batch's rows, as even as it goes; with fewer rows than modules some have none.
        """
        rows = len(batch[0])
        count = min(len(self.modules), rows)
        parts = list(zip(*(value.tensor_split(count) for value in batch), strict=True))

        def one(index: int) -> float:
            module = self.modules[index]
            for parameter in module.parameters():
                parameter.grad = None
            value = loss(module, *parts[index]) * (len(parts[index][0]) / rows)
            value.backward()
            return float(value.detach())

        if self.pool is None:
            return one(0)
        total = sum(self.pool.map(one, range(count)))
        gradients = _gradients(self.modules[0])
        for replica in self.modules[1:count]:
            torch._foreach_add_(gradients, _gradients(replica))
        return total


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
