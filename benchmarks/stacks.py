"""The penalised update of K chunks at once, by fbopt's stacks, one by one, and in plain torch.

Norms, K shifted points, [second pass], add sum_k w_k (g_k + f_k (g+_k - g_k)) to the sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import Shapes, normal, require_close
from fbopt import reference
from fbopt._ops import dispatch
from fbopt._ops.flat import flat_size, flat_views, scalar_on, stacks_like

Tensors = list[Tensor]
TOLERANCE, PARAMETER_TOLERANCE = 1e-4, 1e-3


@dataclass
class Stacks:
    """Parameters, and stacks of gradients at theta and at the shifted points ("plus")."""

    shapes: Shapes
    chunks: int
    device: torch.device
    radius: float = 1.0
    params: Tensors = field(init=False)
    grads: Tensors = field(init=False)
    plus: Tensors = field(init=False)

    def __post_init__(self) -> None:
        stacks = [torch.Size([self.chunks, *s]) for s in self.shapes]
        self.params = normal(self.shapes, 0.05, 0, self.device)
        self.grads = normal(stacks, 1.0, 1, self.device)
        self.plus = torch._foreach_add(self.grads, normal(stacks, 0.3, 2, self.device))
        self.numel = sum(s.numel() for s in self.shapes)
        self.weights = torch.linspace(96, 128, self.chunks, dtype=torch.float64)
        self.weights = self.weights.to(self.device)
        self.coefficient = scalar_on(self.device, 2 / math.sqrt(self.numel))
        self.original = [t.clone() for t in (*self.grads, *self.plus)]

    def refresh(self) -> None:
        """Write the gradients again, as backward passes would."""
        torch._foreach_copy_([*self.grads, *self.plus], self.original)

    def expected(self) -> tuple[Tensors, Tensors]:
        """The shifts of the parameters, stacked, and what the chunks add to the sums; float64."""
        params, grads, plus = ([t.double() for t in ts] for ts in self.lists())
        like = stacks_like(params, self.chunks)
        flat = torch.empty(flat_size(like), dtype=torch.float64, device=self.device)
        squares = reference.perturb_(flat, params, grads, self.radius)
        sums = [torch.zeros_like(p) for p in params]
        rest = (self.weights, self.coefficient, squares, self.radius)
        reference.accumulate_penalty_(sums, grads, plus, [], *rest)
        return torch._foreach_sub(flat_views(flat, like), params), sums

    def lists(self) -> tuple[Tensors, Tensors, Tensors]:
        return self.params, self.grads, self.plus


class StackedUpdate:
    """Updates sums by K chunks; `points` are views of the shifted points, stacks too."""

    name: str
    compiled = False

    def __init__(self, stacks: Stacks) -> None:
        self.stacks, self.sums = stacks, [torch.zeros_like(p) for p in stacks.params]
        like = stacks_like(stacks.params, stacks.chunks)
        self.flat = stacks.params[0].new_empty(flat_size(like))
        self.points = flat_views(self.flat, like)

    @staticmethod
    def words(chunks: int) -> int:
        """Float32 words per parameter, read or written."""
        return 5 * chunks + 3

    def step(self) -> None:
        """Work on all chunks."""
        raise NotImplementedError


class FboptStacked(StackedUpdate):
    name = "fbopt, stacked"

    def step(self) -> None:
        s = self.stacks
        squares = dispatch.perturb_(self.flat, s.params, s.grads, s.radius)
        rest = (s.weights, s.coefficient, squares, s.radius)
        dispatch.accumulate_penalty_(self.sums, s.grads, s.plus, [], *rest)


class FboptOneByOne(StackedUpdate):
    """K updates, of the stacks' slices."""

    name = "fbopt, one by one"

    def __init__(self, stacks: Stacks) -> None:
        super().__init__(stacks)
        self.flats = [self.flat.new_zeros(flat_size(stacks.params)) for _ in range(stacks.chunks)]
        views = [flat_views(flat, stacks.params) for flat in self.flats]
        self.points = [list(points) for points in zip(*views, strict=True)]
        self.own = [
            [[t[k] for t in stack] for stack in (stacks.grads, stacks.plus)]
            for k in range(stacks.chunks)
        ]
        self.weights = stacks.weights.unbind()

    @staticmethod
    def words(chunks: int) -> int:
        return 8 * chunks

    def step(self) -> None:
        s = self.stacks
        for flat, (grads, plus), weight in zip(self.flats, self.own, self.weights, strict=True):
            square = dispatch.perturb_(flat, s.params, grads, s.radius)
            rest = (weight, s.coefficient, square, s.radius)
            dispatch.accumulate_penalty_(self.sums, grads, plus, [], *rest)


class PlainStacked(StackedUpdate):
    """Plain torch: norms, a broadcast addcmul, and two products of matrix and vector a tensor."""

    name = "plain torch on stacks"

    def __init__(self, stacks: Stacks) -> None:
        super().__init__(stacks)
        self.before, self.after = _perturb, _accumulate
        self.weights = stacks.weights.float()
        self.ratio = stacks.coefficient.item() / stacks.radius

    @torch.no_grad()
    def step(self) -> None:
        s = self.stacks
        norms = self.before(self.points, s.params, s.grads, s.radius)
        self.after(self.sums, s.grads, s.plus, norms, self.weights, self.ratio)


class CompiledStacked(PlainStacked):
    """torch.compile of the same: a graph before the second passes and one after them."""

    name, compiled = "torch.compile of plain torch", True

    def __init__(self, stacks: Stacks) -> None:
        super().__init__(stacks)
        self.before = torch.compile(_perturb, fullgraph=True, dynamic=False)
        self.after = torch.compile(_accumulate, fullgraph=True, dynamic=False)


def _rows(stack: Tensor) -> Tensor:
    return stack.reshape(len(stack), -1)


def _perturb(points: Tensors, params: Tensors, grads: Tensors, radius: float) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(_rows(g), dim=1) for g in grads]).norm(dim=0)
    steps = radius / norms
    for point, p, g in zip(points, params, grads, strict=True):
        torch.addcmul(p, steps.reshape(-1, *[1] * p.dim()), g, out=point)
    return norms


def _accumulate(
    sums: Tensors, grads: Tensors, plus: Tensors, norms: Tensor, weights: Tensor, ratio: float
) -> None:
    added = weights * norms * ratio
    for a, g, up in zip(sums, grads, plus, strict=True):
        a.view(-1).addmv_(_rows(g).t(), weights - added).addmv_(_rows(up).t(), added)


def check_stacked(update: StackedUpdate) -> None:
    """Check the shifted points and the sums of two steps."""
    s = update.stacks
    shifts, added = s.expected()
    for _ in range(2):
        update.step()
    points = [p if isinstance(p, Tensor) else torch.stack(p) for p in update.points]
    moved = [x.double() - p.double() for x, p in zip(points, s.params, strict=True)]
    require_close(update.name, "the shift", moved, shifts, PARAMETER_TOLERANCE)
    require_close(update.name, "the sum", update.sums, torch._foreach_mul(added, 2), TOLERANCE)


STACKED_UPDATES = (FboptStacked, FboptOneByOne, PlainStacked, CompiledStacked)
