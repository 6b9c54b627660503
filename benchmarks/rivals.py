"""The penalised chunk update in foreach calls: with a host sync, without one, and compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cases import Chunk
from benchmarks.updates import ChunkUpdate, Loop, Ours, OursExact, Pass, Published

Tensors = list[Tensor]


class Foreach(ChunkUpdate):
    """The shortest foreach sequence: shift in place, put back from a copy made once per step."""

    name, words = "foreach, in place", 12

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.saved = self.keep()

    def keep(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

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

    def keep(self) -> list[Tensor]:
        return [p.detach() for p in self.params]

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


class ForeachUnsynced(Foreach):
    """Without reading the norm on the host: scalars that are tensors, which only products take."""

    name, words = "foreach without a sync, in place", 18

    @torch.no_grad()
    def update(self, second_pass: Pass) -> None:
        c = self.chunk
        norm = torch.stack(torch._foreach_norm(c.grads)).norm()
        self.shifted(second_pass, c.radius / norm)
        factor = c.weight * c.coefficient / c.radius * norm
        torch._foreach_mul_(c.grads, c.weight - factor)
        torch._foreach_mul_(c.plus, factor)
        torch._foreach_add_(self.sums, c.grads)
        torch._foreach_add_(self.sums, c.plus)

    def shifted(self, second_pass: Pass, step: Tensor) -> None:
        torch._foreach_add_(self.params, torch._foreach_mul(self.chunk.grads, step))
        second_pass()
        torch._foreach_copy_(self.params, self.saved)


class ForeachUnsyncedSwapped(ForeachUnsynced):
    """The same with new tensors swapped in."""

    name, words = "foreach without a sync, new tensors swapped in", 16
    keep = ForeachSwapped.keep

    def shifted(self, second_pass: Pass, step: Tensor) -> None:
        moved = torch._foreach_mul(self.chunk.grads, step)
        torch._foreach_add_(moved, self.saved)
        _point(self.params, moved)
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


def _before(buffer: Tensors, params: Tensors, grads: Tensors, radius: float) -> Tensor:
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    shifted = torch._foreach_add(params, torch._foreach_mul(grads, radius / norm))
    torch._foreach_copy_(buffer, shifted)
    return norm


def _after(
    sums: Tensors, grads: Tensors, plus: Tensors, norm: Tensor, weight: float, ratio: float
) -> None:
    difference = torch._foreach_mul(torch._foreach_sub(plus, grads), ratio * norm)
    torch._foreach_add_(sums, torch._foreach_add(grads, difference), alpha=weight)


FOREACH = (Foreach, ForeachSwapped, ForeachBuffered)
UNSYNCED = (ForeachUnsynced, ForeachUnsyncedSwapped)
CHUNK_UPDATES = (Ours, OursExact, Loop, Published, *FOREACH, *UNSYNCED, Compiled)
