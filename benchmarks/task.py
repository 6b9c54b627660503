"""The gradient that a step needs, in plain torch: of the mean loss over chunks, penalised or not.

What is expected comes from fbopt.reference, in the arithmetic of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Chunks, point_to
from fbopt import reference
from fbopt._ops.flat import flat_size, flat_views, scalar_on


@dataclass(frozen=True)
class Task:
    """The gradient of a model's mean loss over chunks, penalised or not."""

    model: nn.Module
    chunks: Chunks
    penalised: bool
    autocast: torch.dtype | None = None
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = F.cross_entropy
    radius: float = 1e-2
    coefficient: float = 0.1
    evaluate: Callable[[nn.Module, tuple[Tensor, ...]], Tensor] | None = None

    @cached_property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def with_visible_penalty(self) -> Task:
        """The same task with lambda ||g|| = radius = 0.1.

        A chunk's penalised gradient is then that at the second point, so far away that a wrong
        second pass shows also in half precision.
        """
        _, grads = self.gradient(*self.chunks[0])
        norm = reference.squared_norm(list(grads)).sqrt().item()
        return replace(self, radius=0.1, coefficient=0.1 / norm)

    def gradient(self, *chunk: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss of a chunk and its gradient."""
        with torch.enable_grad(), self.precision():
            loss = self.loss(*chunk)
        return loss.detach(), torch.autograd.grad(loss, self.params)

    def loss(self, *chunk: Tensor, model: nn.Module | None = None) -> Tensor:
        """The mean loss of a chunk, by another model than its own if one is given."""
        model = self.model if model is None else model
        if self.evaluate is not None:
            return self.evaluate(model, chunk)
        inputs, target = chunk
        return self.loss_fn(model(inputs), target)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def passes(self) -> None:
        """All forward and backward passes, and nothing else."""
        for chunk in self.chunks:
            for _ in range(1 + self.penalised):
                self.gradient(*chunk)

    @cached_property
    def expected(self) -> list[Tensor]:
        """The mean gradient over the chunks, in the arithmetic of the model."""
        params = self.params
        originals = [p.detach() for p in params]
        sums = [torch.zeros_like(p) for p in originals]
        flat = torch.empty(flat_size(params), dtype=params[0].dtype, device=self.device)
        coefficient = scalar_on(self.device, self.coefficient)
        for chunk in self.chunks:
            weight = scalar_on(self.device, len(chunk[0]))
            _, grads = self.gradient(*chunk)
            if not self.penalised:
                reference.accumulate_(sums, grads, weight)
                continue
            square = reference.perturb_(flat, originals, list(grads), self.radius)
            point_to(params, flat_views(flat, params))
            _, plus = self.gradient(*chunk)
            point_to(params, originals)
            reference.accumulate_penalty_(
                sums, grads, plus, [], weight, coefficient, square, self.radius
            )
        return torch._foreach_div(sums, sum(len(chunk[0]) for chunk in self.chunks))
