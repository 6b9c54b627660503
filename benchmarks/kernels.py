"""The kernels one by one, as fbopt._ops.dispatch calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Chunk, require_close, scalar
from benchmarks.devices import sets_beyond_cache
from benchmarks.harness import Contender, in_turn
from benchmarks.memory import COPY, copy
from fbopt._ops import dispatch, reference
from fbopt._ops.flat import accumulator_dtype, flat_size, flat_views

RULE = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4}
RULE |= {"nesterov": True, "maximize": False, "first": False}
# float32 words per parameter, read or written.
WORDS = {
    "pack_": 2,
    "squared_norm": 1,
    "perturb_": 4,
    "accumulate_": 3,
    "accumulate_penalty_": 4,
    "accumulate_exact_": 5,
    "accumulate_exact_penalty_": 6,
    "exact_mean_": 4,
    "clip_": 2,
    "sgd_step_": 5,
}
# As fine as it takes for sums of some hundred chunks.
EXACT_SCALE = 2.0**48
Place = Callable[[Tensor], Tensor]
Calls = dict[str, Callable[[], object]]
MOST_SETS = 8


class Operands:
    """Arguments for all kernels, in one dtype; `place` lays each tensor out on `device`."""

    def __init__(
        self,
        chunk: Chunk,
        dtype: torch.dtype,
        place: Place = Tensor.clone,
        device: torch.device | None = None,
    ) -> None:
        def own(tensors: Sequence[Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
            return [place(t.detach().to(dtype)) for t in tensors]

        device, wide = device or chunk.device, accumulator_dtype(dtype)
        self.chunk = chunk
        self.params, self.grads, self.plus = own(chunk.params), own(chunk.grads), own(chunk.plus)
        self.clipped, self.stepped = own(chunk.grads), own(chunk.params)
        self.velocity = own(chunk.zeros())
        self.sums, self.penalised, self.means = (own(chunk.zeros(), wide) for _ in range(3))
        self.exact, self.exact_penalised = (self._exact(device) for _ in range(2))
        self.scales = torch.full(
            (len(self.grads),), EXACT_SCALE, dtype=torch.float64, device=device
        )
        # What an op leaves out shows.
        nan = {"fill_value": float("nan"), "dtype": dtype, "device": device}
        self.shifted = torch.full((flat_size(self.params),), **nan)
        self.packed = torch.full((chunk.numel,), **nan)
        self.square = reference.squared_norm([g.to(dtype) for g in chunk.grads]).to(device)
        self.norm, self.lr = self.square.sqrt(), scalar(1e-3, device)
        self.weight = scalar(chunk.weight, device)
        self.coefficient = scalar(chunk.coefficient, device)
        # Scaled by 0.999: the values stay ordinary numbers, however often this runs.
        self.too_long = scalar(1 / 0.999, device)

    def _exact(self, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Sums in fixed point, carries, and the largest contributions."""
        zeros = (
            [torch.zeros_like(s, dtype=d) for s in self.sums] for d in (torch.int64, torch.int32)
        )
        return *zeros, torch.zeros(len(self.sums), dtype=torch.float64, device=device)

    def calls(self, ops: object) -> Calls:
        """Every op of a table of ops on these operands."""
        radius, penalty = self.chunk.radius, (self.weight, self.coefficient, self.square)
        fixed = self.weight, self.scales
        return {
            "pack_": lambda: ops.pack_(self.packed, self.grads),
            "squared_norm": lambda: ops.squared_norm(self.grads),
            "perturb_": lambda: ops.perturb_(self.shifted, self.params, self.grads, radius),
            "accumulate_": lambda: ops.accumulate_(self.sums, self.grads, self.weight),
            "accumulate_penalty_": lambda: ops.accumulate_penalty_(
                self.penalised, self.grads, self.plus, [], *penalty, radius
            ),
            "accumulate_exact_": lambda: ops.accumulate_exact_(*self.exact, self.grads, *fixed),
            "accumulate_exact_penalty_": lambda: ops.accumulate_exact_penalty_(
                *self.exact_penalised, self.grads, self.plus, [], *fixed, *penalty[1:], radius
            ),
            "exact_mean_": lambda: ops.exact_mean_(
                self.means, *self.exact, self.scales, self.weight
            ),
            "clip_": lambda: ops.clip_(self.clipped, self.too_long, 1.0),
            "sgd_step_": lambda: ops.sgd_step_(
                self.stepped, self.grads, self.velocity, self.lr, None, self.norm, 0.25, **RULE
            ),
        }

    def _value(self, exact: tuple[list[Tensor], list[Tensor], Tensor]) -> list[Tensor]:
        """What sums in fixed point stand for, in the type that contributions are rounded to."""
        pairs = zip(*exact[:2], strict=True)
        dtype = accumulator_dtype(self.grads[0].dtype)
        return [((c.double() * 2.0**64 + s.double()) / EXACT_SCALE).to(dtype) for s, c in pairs]

    def outcome(self, op: str) -> list[Tensor]:
        """What an op wrote."""
        return {
            "pack_": [self.packed],
            "squared_norm": [self.square],
            "perturb_": flat_views(self.shifted, self.params),
            "accumulate_": self.sums,
            "accumulate_penalty_": self.penalised,
            "accumulate_exact_": self._value(self.exact),
            "accumulate_exact_penalty_": self._value(self.exact_penalised),
            "exact_mean_": self.means,
            "clip_": self.clipped,
            "sgd_step_": [*self.stepped, *self.velocity],
        }[op]


def single_ops(chunk: Chunk, sets: int = 1) -> list[Contender]:
    """All kernels, each checked against its reference in float64; sets of operands in turn."""
    operands, expected = Operands(chunk, torch.float32), Operands(chunk, torch.float64)
    ours, oracle = operands.calls(dispatch), expected.calls(reference)
    for name, call in ours.items():
        returned, wanted = call(), oracle[name]()
        if wanted is not None:
            require_close(name, "the squared norm", [returned], [wanted], 1e-6)
        require_close(name, "the result", operands.outcome(name), expected.outcome(name), 1e-5)
    del expected, oracle
    tables = [ours, *(Operands(chunk, torch.float32).calls(dispatch) for _ in range(sets - 1))]
    limits = {} if chunk.device.type == "cpu" else {name: limit_name(name) for name in WORDS}
    return [
        Contender(
            name, in_turn([t[name] for t in tables]), WORDS[name] * chunk.numel, limits.get(name)
        )
        for name in WORDS
    ]


def sets_for(chunk: Chunk) -> int:
    """Sets of operands in which even the op that reads the least finds nothing in the cache."""
    least = 4 * chunk.numel * min(WORDS.values())
    return sets_beyond_cache(chunk.device, least, MOST_SETS)


def limit_name(op: str) -> str:
    """The copy that moves as many words as an op."""
    return f"{COPY}, {WORDS[op]} words"


def copies(chunk: Chunk) -> list[Contender]:
    """For each op a copy of as many words, on a GPU: small ones are slower."""
    numbers = {limit_name(op): words * chunk.numel for op, words in WORDS.items()}
    return [copy(words, chunk.device, label) for label, words in numbers.items()]
