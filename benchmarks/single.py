"""The kernels one by one, as fbopt._ops calls them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Chunk, require_close, scalar
from benchmarks.harness import Contender
from fbopt import _ops, reference

RULE = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4}
RULE |= {"nesterov": True, "maximize": False, "first": False}
# float32 words per parameter, read or written.
WORDS = {
    "pack_": 2,
    "squared_norm": 1,
    "perturb_": 4,
    "accumulate_": 3,
    "accumulate_penalty_": 4,
    "clip_": 2,
    "sgd_step_": 5,
}


class Operands:
    """A set of arguments for all kernels, in one dtype."""

    def __init__(self, chunk: Chunk, dtype: torch.dtype) -> None:
        def own(tensors: list[Tensor]) -> list[Tensor]:
            return [t.detach().clone().to(dtype) for t in tensors]

        self.chunk = chunk
        self.params, self.grads, self.plus = own(chunk.params), own(chunk.grads), own(chunk.plus)
        self.clipped, self.stepped = own(chunk.grads), own(chunk.params)
        self.velocity, self.sums, self.penalised = (own(chunk.zeros()) for _ in range(3))
        self.shifted, self.packed = (torch.empty(chunk.numel, dtype=dtype) for _ in range(2))
        self.square = reference.squared_norm(self.grads)
        self.norm, self.lr = self.square.sqrt(), scalar(1e-3)
        self.weight, self.coefficient = scalar(chunk.weight), scalar(chunk.coefficient)

    def calls(self, ops: object) -> dict[str, Callable[[], object]]:
        """Every op of a table of ops on these operands."""
        radius, penalty = self.chunk.radius, (self.weight, self.coefficient, self.square)
        return {
            "pack_": lambda: ops.pack_(self.packed, self.grads),
            "squared_norm": lambda: ops.squared_norm(self.grads),
            "perturb_": lambda: ops.perturb_(self.shifted, self.params, self.grads, radius),
            "accumulate_": lambda: ops.accumulate_(self.sums, self.grads, self.weight),
            "accumulate_penalty_": lambda: ops.accumulate_penalty_(
                self.penalised, self.grads, self.plus, [], *penalty, radius
            ),
            # Scaled by 0.999: the values stay ordinary numbers, however often this runs.
            "clip_": lambda: ops.clip_(self.clipped, scalar(1 / 0.999), 1.0),
            "sgd_step_": lambda: ops.sgd_step_(
                self.stepped, self.grads, self.velocity, self.lr, None, self.norm, 0.25, **RULE
            ),
        }

    def outcome(self, op: str) -> list[Tensor]:
        """What an op wrote."""
        return {
            "pack_": [self.packed],
            "squared_norm": [self.square],
            "perturb_": [self.shifted],
            "accumulate_": self.sums,
            "accumulate_penalty_": self.penalised,
            "clip_": self.clipped,
            "sgd_step_": [*self.stepped, *self.velocity],
        }[op]


def single_ops(chunk: Chunk) -> list[Contender]:
    """All kernels, each checked against its reference in float64."""
    ours, expected = Operands(chunk, torch.float32), Operands(chunk, torch.float64)
    table, oracle = ours.calls(_ops), expected.calls(reference)
    for name, call in table.items():
        returned, wanted = call(), oracle[name]()
        if wanted is not None:
            require_close(name, "the squared norm", [returned], [wanted], 1e-6)
        require_close(name, "the result", ours.outcome(name), expected.outcome(name), 1e-5)
    return [Contender(name, call, WORDS[name] * chunk.numel) for name, call in table.items()]
