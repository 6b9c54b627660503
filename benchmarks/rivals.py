"""The penalised chunk update, ours and others: norm, shift the parameters, [second pass], put them
back, accumulate w (g + lambda H g). What is kept between chunks of a step is made in `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Chunk, scalar
from fbopt import GradientAccumulator
from fbopt.penalty import Shift

Pass = Callable[[], object]


class ChunkUpdate:
    """A contender. `update` calls `second_pass` while the parameters are shifted."""

    name: str
    words: int  # per parameter, read or written

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.params, self.sums = chunk, chunk.parameters(), chunk.zeros()

    def update(self, second_pass: Pass) -> None:
        raise NotImplementedError

    def total(self, chunks: int) -> list[Tensor]:
        """The weighted sum over the chunks so far."""
        return self.sums


class Ours(ChunkUpdate):
    """What FullBatchClosure calls between and after the passes."""

    name, words = "fbopt", 8

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.params = chunk, chunk.parameters()
        self.accumulator = GradientAccumulator(self.params)
        self.shift = Shift(self.accumulator.groups)
        self.shift.begin()
        self.sums = self.accumulator.sums
        self.coefficient = scalar(chunk.coefficient)

    def update(self, second_pass: Pass) -> None:
        c, accumulator = self.chunk, self.accumulator
        grads = accumulator.gather(c.grads)
        square = self.shift.fill(grads, c.radius)
        with self.shift.applied():
            second_pass()
        plus = accumulator.gather(c.plus, "plus")
        accumulator.add_penalised(grads, plus, [], c.weight, self.coefficient, square, c.radius)


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

    name, words = "as published", 29

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.count = 0
        self.strength, self.correction = 1.0, chunk.coefficient

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c, grads, vhp = self.chunk, self.chunk.grads, self.chunk.plus
        self.logged = torch.stack([g.pow(2).sum() for g in grads]).sum()
        originals = [p.detach().clone() for p in self.params]
        vector = torch._foreach_mul(grads, self.strength)
        eps = c.radius / torch.stack([g.pow(2).sum() for g in vector]).sum().sqrt()
        torch._foreach_add_(self.params, vector, alpha=eps)
        second_pass()
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


class Foreach(ChunkUpdate):
    """The shortest foreach sequence: shift in place, put back from a copy made once per step."""

    name, words = "foreach, in place", 12

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.saved = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c = self.chunk
        norm = torch.stack(torch._foreach_norm(c.grads)).norm().item()
        self.shifted(second_pass, c.radius / norm)
        factor = c.coefficient * norm / c.radius
        torch._foreach_add_(self.sums, c.grads, alpha=c.weight * (1 - factor))
        torch._foreach_add_(self.sums, c.plus, alpha=c.weight * factor)

    def shifted(self, second_pass: Pass, step: float) -> None:
        torch._foreach_add_(self.params, self.chunk.grads, alpha=step)
        second_pass()
        torch._foreach_copy_(self.params, self.saved)


class ForeachSwapped(Foreach):
    """As we do it: the parameters point to other tensors for the pass, here new ones each time."""

    name, words = "foreach, new tensors swapped in", 10

    def shifted(self, second_pass: Pass, step: float) -> None:
        moved = torch._foreach_add(self.saved, self.chunk.grads, alpha=step)
        _point(self.params, moved)
        second_pass()
        _point(self.params, self.saved)


class ForeachBuffered(ForeachSwapped):
    """The same with a second buffer that is kept."""

    name, words = "foreach, second buffer swapped in", 12

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.buffer = chunk.zeros()

    def shifted(self, second_pass: Pass, step: float) -> None:
        torch._foreach_copy_(self.buffer, self.saved)
        torch._foreach_add_(self.buffer, self.chunk.grads, alpha=step)
        _point(self.params, self.buffer)
        second_pass()
        _point(self.params, self.saved)


class Compiled(ForeachBuffered):
    """torch.compile (inductor) of the foreach sequence without `.item()`: one graph before the
    second pass, one after it.
    """

    name, words = "torch.compile of foreach", 8

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.before = torch.compile(_before, fullgraph=True, dynamic=False)
        self.after = torch.compile(_after, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c = self.chunk
        norm = self.before(self.buffer, self.saved, c.grads, c.radius)
        _point(self.params, self.buffer)
        second_pass()
        _point(self.params, self.saved)
        self.after(self.sums, c.grads, c.plus, norm, c.weight, c.coefficient / c.radius)


def _point(params: list[nn.Parameter], at: list[Tensor]) -> None:
    for p, t in zip(params, at, strict=True):
        p.data = t


def _before(
    buffer: list[Tensor], params: list[Tensor], grads: list[Tensor], radius: float
) -> Tensor:
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_copy_(
        buffer, torch._foreach_add(params, torch._foreach_mul(grads, radius / norm))
    )
    return norm


def _after(
    sums: list[Tensor],
    grads: list[Tensor],
    plus: list[Tensor],
    norm: Tensor,
    weight: float,
    ratio: float,
) -> None:
    difference = torch._foreach_mul(torch._foreach_sub(plus, grads), ratio * norm)
    torch._foreach_add_(sums, torch._foreach_add(grads, difference), alpha=weight)


CHUNK_UPDATES = (Ours, Loop, Published, Foreach, ForeachSwapped, ForeachBuffered, Compiled)
FOREACH = (Foreach, ForeachSwapped, ForeachBuffered)
