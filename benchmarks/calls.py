"""Ways to fill `p.grad` with the mean gradient over all chunks: passes alone, fbopt, plain torch.

With a penalty g' = g + (lambda ||g|| / r) (grad L_c(theta + r g / ||g||) - g), where g = grad L_c.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import ChunkUpdate, ForeachUpdate, PublishedUpdate
from benchmarks.task import Task
from fbopt import FullBatchClosure, GradientPenalty


class BarePasses:
    """All forward and backward passes; the others also leave the mean gradient in `p.grad`."""

    name = "bare passes"

    def __init__(self, task: Task) -> None:
        self.task, self.params = task, task.params

    def __call__(self) -> object:
        return self.task.passes()


class FboptCall(BarePasses):
    """FullBatchClosure, with further options."""

    name = "fbopt"

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(task)
        how = {"autocast": task.autocast, "evaluate": task.evaluate, **options}
        if task.penalised:
            how["penalty"] = GradientPenalty(coefficient=task.coefficient, radius=task.radius)
        self.closure = FullBatchClosure(task.model, task.loss_fn, task.chunks, **how)

    def __call__(self) -> Tensor:
        return self.closure()


class GraphedCall(FboptCall):
    """The same with the work on a chunk in a CUDA graph; on the CPU there is none."""

    name = "fbopt, CUDA graphs"

    def __init__(self, task: Task) -> None:
        super().__init__(task, cuda_graph=task.device.type == "cuda")


class TorchCall(BarePasses):
    """A chunk update in plain torch between the passes; BatchNorm's statistics are left as is."""

    name = "plain torch"
    update: type[ChunkUpdate] = ForeachUpdate

    def __call__(self) -> Tensor:
        task, losses, total = self.task, [], sum(len(chunk[0]) for chunk in self.task.chunks)
        live = SimpleNamespace(radius=task.radius, coefficient=task.coefficient)
        live.parameters = lambda: task.params
        update = self.update(live)

        def second_pass(*chunk: Tensor) -> None:
            _, live.plus = self.gradient(*chunk)

        for chunk in task.chunks:
            live.weight = len(chunk[0]) / total
            loss, live.grads = self.gradient(*chunk)
            losses.append(live.weight * loss)
            if task.penalised:
                update.update(partial(second_pass, *chunk))
            else:
                torch._foreach_add_(update.sums, live.grads, alpha=live.weight)
        for p, g in zip(self.params, update.total(len(task.chunks)), strict=True):
            p.grad = g
        return torch.stack(losses).sum()

    def gradient(self, *chunk: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of a chunk and its gradient."""
        loss, grads = self.task.gradient(*chunk)
        return loss, list(grads)


class PublishedCall(TorchCall):
    """The sequence of the code released with the paper; for chunks of one size."""

    name, update = "as published", PublishedUpdate
