"""The penalised chunk update: norm, shift the parameters, [second pass], put them back, accumulate
w (g + lambda H g). Ours, a loop over the formulas, and the published one. What is kept between the
chunks of a step is made in `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Chunk, WrongResult, scalar
from fbopt import GradientAccumulator
from fbopt._engine.perturb import Perturbation

Pass = Callable[[], object]


class ChunkUpdate:
    """A contender. `update` calls `second_pass` while the parameters are shifted."""

    name: str
    words: int  # per parameter, read or written
    ragged = True  # whether chunks count by their samples

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.params, self.sums = chunk, chunk.parameters(), chunk.zeros()

    def update(self, second_pass: Pass) -> None:
        raise NotImplementedError

    def total(self, chunks: int) -> list[Tensor]:
        """The weighted sum over the chunks so far."""
        return self.sums


class Ours(ChunkUpdate):
    """What FullBatchClosure calls between and after the passes."""

    name, words, accumulation = "fbopt", 8, "float32"

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.params = chunk, chunk.parameters()
        self.accumulator = GradientAccumulator(self.params, self.accumulation)
        self.perturbation = Perturbation(self.accumulator.buckets)
        self.perturbation.begin()
        self.sums = self.accumulator.sums
        self.coefficient, self.weight = scalar(chunk.coefficient, chunk.device), chunk.weight

    def update(self, second_pass: Pass) -> None:
        c, accumulator = self.chunk, self.accumulator
        grads = accumulator.gather(c.grads)
        square = self.perturbation.fill(grads, c.radius)
        with self.perturbation.applied():
            second_pass()
        plus = accumulator.gather(c.plus, "plus")
        accumulator.add_penalised(grads, plus, [], self.weight, self.coefficient, square, c.radius)


class OursExact(Ours):
    """The same in fixed point, with the units of a pass over CIFAR-10 in chunks of 128.

    Once it has been checked, its weight changes sign from call to call: sums of one chunk a hundred
    times over would wrap far more often than those of a pass.
    """

    name, words, accumulation = "fbopt, exact sums", 10, "exact"
    chunks, checked = 391, False

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.update(lambda: None)
        fixed = self.accumulator.fixed
        fixed.fit(fixed.maxima(), self.chunks)
        self.accumulator.reset()

    def update(self, second_pass: Pass) -> None:
        super().update(second_pass)
        if self.checked:
            self.weight = -self.weight

    def total(self, chunks: int) -> list[Tensor]:
        fixed, self.checked = self.accumulator.fixed, True
        if not fixed.fit(fixed.maxima(), self.chunks):
            raise WrongResult(f"{self.name}: the units do not fit")
        self.accumulator.total_weight = 1.0
        self.accumulator.settle(set())
        return self.sums


class Loop(ChunkUpdate):
    """One tensor at a time, each formula as it is written on paper."""

    name, words = "per-tensor loop", 19

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.saved = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c = self.chunk
        norm = torch.stack([g.norm() for g in c.grads]).norm().item()
        for p, g in zip(self.params, c.grads, strict=True):
            p.add_(g, alpha=c.radius / norm)
        second_pass()
        factor = c.coefficient * norm / c.radius
        for p, old in zip(self.params, self.saved, strict=True):
            p.copy_(old)
        for a, g, up in zip(self.sums, c.grads, c.plus, strict=True):
            a.add_(c.weight * (g + factor * (up - g)))


class Published(ChunkUpdate):
    """The calls of the code released with the paper, in its order: 29 words and a host sync.

    It takes the norm twice (once to log it), clones the parameters for every chunk, and keeps a
    running mean, in which all chunks count alike.
    """

    name, words, ragged = "as published", 29, False

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.count = 0
        self.strength, self.correction = 1.0, chunk.coefficient

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c, grads = self.chunk, self.chunk.grads
        self.logged = torch.stack([g.pow(2).sum() for g in grads]).sum()
        originals = [p.detach().clone() for p in self.params]
        vector = torch._foreach_mul(grads, self.strength)
        eps = c.radius / torch.stack([g.pow(2).sum() for g in vector]).sum().sqrt()
        torch._foreach_add_(self.params, vector, alpha=eps)
        second_pass()
        vhp = c.plus
        torch._foreach_sub_(vhp, grads)
        torch._foreach_div_(vhp, eps)
        for p, old in zip(self.params, originals, strict=True):
            p.data.copy_(old)
        torch._foreach_add_(grads, vhp, alpha=self.correction)
        self.count += 1
        torch._foreach_sub_(grads, self.sums)
        torch._foreach_add_(self.sums, grads, alpha=1 / self.count)

    def total(self, chunks: int) -> list[Tensor]:
        return torch._foreach_mul(self.sums, chunks * self.chunk.weight)
