"""A chunk's penalised gradient as one function of torch.func, compiled or over chunks at once.

g' = g + (lambda ||g|| / r) (grad L_c(theta + r g / ||g||) - g), where g = grad L_c(theta).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, replace_all_batch_norm_modules_, vmap

from benchmarks.task import Task

Tensors = Sequence[Tensor]
Chunk = tuple[Tensor, ...]


class Loss(nn.Module):
    """The loss of a chunk as a module, for functional_call."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = replace_all_batch_norm_modules_(copy.deepcopy(task.model))
        self.task = task

    def forward(self, *chunk: Tensor) -> Tensor:
        """BatchNorm normalises by the chunk and keeps no statistics."""
        with self.task.precision():
            return self.task.loss(*chunk, model=self.model)


def penalised(task: Task) -> Callable[[Tensors, Chunk], tuple[Tensor, Tensors]]:
    """The loss of a chunk and its penalised gradient, as a function of parameters and chunk."""
    module = Loss(task)
    names = [name for name, _ in module.named_parameters()]

    def loss(params: Tensors, chunk: Chunk) -> Tensor:
        return functional_call(module, dict(zip(names, params, strict=True)), chunk)

    gradient = grad_and_value(loss)

    def of_chunk(params: Tensors, chunk: Chunk) -> tuple[Tensor, Tensors]:
        grads, mean = gradient(params, chunk)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        moved = [p + (task.radius / norm) * g for p, g in zip(params, grads, strict=True)]
        plus, _ = gradient(moved, chunk)
        factor = task.coefficient * norm / task.radius
        return mean, [g + factor * (up - g) for g, up in zip(grads, plus, strict=True)]

    return of_chunk


class FuncCall:
    """Sums over the chunks, `together` of them at once, compiled if so asked."""

    def __init__(self, task: Task, together: int = 1, compiled: bool = False) -> None:
        self.task, self.params = task, task.params
        of_chunk = penalised(task)
        over_chunks = vmap(of_chunk, (None, 0)) if together > 1 else None

        def add(params: Tensors, sums: Tensors, chunk: Chunk) -> tuple[Tensor, Tensors]:
            if over_chunks is None:
                loss, grads = of_chunk(params, chunk)
            else:
                losses, stacks = over_chunks(params, chunk)
                loss, grads = losses.sum(), [stack.sum(0) for stack in stacks]
            return loss, [s + g for s, g in zip(sums, grads, strict=True)]

        self.add: Any = torch.compile(add, fullgraph=True, dynamic=False) if compiled else add
        self.groups, self.count = list(_groups(task, together)), len(task.chunks)

    def __call__(self) -> Tensor:
        params = [p.detach() for p in self.params]
        sums, losses = [torch.zeros_like(p) for p in params], []
        for group in self.groups:
            loss, sums = self.add(params, sums, group)
            losses.append(loss)
        for p, total in zip(self.params, sums, strict=True):
            p.grad = total / self.count
        return torch.stack(losses).sum() / self.count


def _groups(task: Task, together: int) -> Sequence[Chunk]:
    if together == 1:
        return task.chunks
    parts = range(0, len(task.chunks), together)
    groups = (zip(*task.chunks[i : i + together], strict=True) for i in parts)
    return [tuple(map(torch.stack, group)) for group in groups]
