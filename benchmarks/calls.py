"""Whole closure calls over the chunks of a data set: ours, plain torch, and the passes alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import updates
from benchmarks.cases import scalar
from benchmarks.devices import capture
from benchmarks.rivals import Foreach, ForeachUnsyncedSwapped
from fbopt import FullBatchClosure, GradientPenalty
from fbopt._ops import reference
from fbopt._ops.flat import flat_size, flat_views

Tensors = Sequence[Tensor]
Chunks = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What all contenders do: the gradient of a model's mean loss over chunks, penalised or not."""

    model: nn.Module
    chunks: Chunks
    penalised: bool
    autocast: torch.dtype | None = None
    radius: float = 1e-2
    coefficient: float = 0.1

    @functools.cached_property
    def params(self) -> list[nn.Parameter]:
        """The model's parameters."""
        return list(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.params[0].device

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
        """One pass forward and back: the loss and its gradient."""
        with torch.enable_grad():
            with self._cast():
                loss = F.cross_entropy(self.model(x), y)
            return loss.detach(), torch.autograd.grad(loss, self.params)

    def _cast(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


class Call:
    """A contender: visits all chunks and leaves the mean gradient in `p.grad`."""

    name: str
    ragged = True  # whether chunks count by their samples

    def __init__(self, task: Task) -> None:
        self.task, self.params = task, task.params

    def __call__(self) -> object:
        raise NotImplementedError


class Bare(Call):
    """As many forward and backward passes, and nothing else."""

    name = "bare passes"

    def __call__(self) -> None:
        for x, y in self.task.chunks:
            self.passes(x, y)

    def passes(self, x: Tensor, y: Tensor) -> None:
        for _ in range(1 + self.task.penalised):
            self.task.gradient(x, y)


class BareGraphed(Bare):
    """The passes of a chunk as one CUDA graph for each shape."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.graphs: dict[torch.Size, tuple] = {}

    def passes(self, x: Tensor, y: Tensor) -> None:
        if x.shape not in self.graphs:
            copies = x.clone(), y.clone()
            run = functools.partial(super().passes, *copies)
            self.graphs[x.shape] = *copies, capture(run, x.device)
        images, labels, replay = self.graphs[x.shape]
        images.copy_(x)
        labels.copy_(y)
        replay()


class Ours(Call):
    """FullBatchClosure; a GPU's work as CUDA graphs if asked."""

    name, graphs = "fbopt", False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        penalty = GradientPenalty(coefficient=task.coefficient, radius=task.radius)
        options = {"cuda_graph": True} if self.graphs and task.device.type == "cuda" else {}
        self.closure = FullBatchClosure(
            task.model,
            F.cross_entropy,
            task.chunks,
            penalty=penalty if task.penalised else None,
            autocast=task.autocast,
            **options,
        )

    def __call__(self) -> Tensor:
        return self.closure()


class OursGraphed(Ours):
    graphs = True


class Rival(Call):
    """A chunk update of benchmarks.rivals between the passes; BatchNorm gets no care."""

    kind: type[updates.ChunkUpdate]

    def __call__(self) -> Tensor:
        task, losses = self.task, []
        total = sum(len(y) for _, y in task.chunks)
        live = Live(task)
        update = self.kind(live) if task.penalised else None
        sums = update.sums if update else live.zeros()
        for x, y in task.chunks:
            live.weight = len(y) / total
            loss, live.grads = task.gradient(x, y)
            losses.append(live.weight * loss)
            if update:
                update.update(functools.partial(live.second_pass, x, y))
            else:
                torch._foreach_add_(sums, live.grads, alpha=live.weight)
        found = update.total(len(task.chunks)) if update else sums
        for p, g in zip(self.params, found, strict=True):
            p.grad = g
        return torch.stack(losses).sum()


class Live:
    """The chunk at hand, as a rival's update looks at it."""

    def __init__(self, task: Task) -> None:
        self.task, self.radius, self.coefficient = task, task.radius, task.coefficient
        self.weight, self.grads, self.plus = 0.0, (), ()

    def parameters(self) -> list[nn.Parameter]:
        return self.task.params

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(p, requires_grad=False) for p in self.task.params]

    def second_pass(self, x: Tensor, y: Tensor) -> None:
        _, self.plus = self.task.gradient(x, y)


class Plain(Rival):
    """As one would write it in torch, with foreach calls."""

    name, kind = "plain torch", Foreach


class PlainUnsynced(Rival):
    name, kind = "plain torch without a sync", ForeachUnsyncedSwapped


class Published(Rival):
    name, kind, ragged = updates.Published.name, updates.Published, updates.Published.ragged


def expected(task: Task) -> list[Tensor]:
    """The mean gradient over the chunks, by fbopt.reference, in the arithmetic of the task."""
    params = task.params
    sums, originals = Live(task).zeros(), [p.detach() for p in params]
    flat = torch.empty(flat_size(params), dtype=params[0].dtype, device=task.device)
    shifted = flat_views(flat, params)
    coefficient = scalar(task.coefficient, task.device)
    for x, y in task.chunks:
        weight = scalar(float(len(y)), task.device)
        _, grads = task.gradient(x, y)
        if not task.penalised:
            reference.accumulate_(sums, grads, weight)
            continue
        with torch.no_grad():
            square = reference.perturb_(flat, originals, grads, task.radius)
        _point(params, shifted)
        _, plus = task.gradient(x, y)
        _point(params, originals)
        reference.accumulate_penalty_(
            sums, grads, plus, [], weight, coefficient, square, task.radius
        )
    return torch._foreach_div(sums, sum(len(y) for _, y in task.chunks))


def visible(task: Task) -> Task:
    """The same task with a radius and a coefficient that make half of the gradient the penalty's.

    lambda ||g|| = radius lets no error of the difference grow: g + lambda H g is the gradient at
    the shifted point.
    """
    x, y = task.chunks[0]
    _, grads = task.gradient(x, y)
    norm = reference.squared_norm(grads).sqrt().item()
    found = replace(task, chunks=[(x, y)])
    for _ in range(12):
        found = replace(found, coefficient=found.radius / norm)
        difference = torch._foreach_sub(expected(found), list(grads))
        if reference.squared_norm(difference).sqrt().item() > norm / 2:
            break
        found = replace(found, radius=2 * found.radius)
    return replace(found, chunks=task.chunks)


def _point(params: list[nn.Parameter], at: list[Tensor]) -> None:
    for p, t in zip(params, at, strict=True):
        p.data = t
