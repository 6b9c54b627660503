"""The kernels one by one, as fbopt._ops.dispatch calls them, checked and ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Operands, require_close
from benchmarks.timing import Contender
from fbopt import reference
from fbopt._ops import dispatch
from fbopt._ops.flat import accumulator_dtype, flat_size, flat_views, scalar_on

RULE = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4}
RULE |= {"nesterov": True, "maximize": False, "first": False}
# float32 words per parameter, read or written.
WORDS = {
    "pack_": 2,
    "squared_norm": 1,
    "perturb_": 4,
    "adaptive_norms": 2,
    "perturb_adaptive_": 3,
    "accumulate_": 3,
    "accumulate_penalty_": 4,
    "accumulate_exact_": 5,
    "accumulate_exact_penalty_": 6,
    "exact_mean_": 4,
    "clip_": 2,
    "sgd_step_": 5,
    # Of three rows.
    "row_products_": 5,
    "combine_rows_": 4,
}
# Of ASAM's scale T = abs(p) + eta.
ETA = 0.01
# The inverse of the unit of exact sums: as fine as sums of some hundred chunks need.
EXACT_SCALE = 2.0**48
Tensors = list[Tensor]
Exact = tuple[Tensors, Tensors, Tensor]
Place = Callable[[Tensors], Tensors]


def cloned(tensors: Tensors) -> Tensors:
    """In memory of their own, as torch lays them out."""
    return [t.clone() for t in tensors]


class KernelArguments:
    """Arguments for all kernels, in one dtype; `place` lays out tensors in memory."""

    def __init__(
        self,
        chunk: Operands,
        dtype: torch.dtype,
        place: Place = cloned,
        device: torch.device | None = None,
    ) -> None:
        device, wide = device or chunk.device, accumulator_dtype(dtype)

        def own(tensors: Sequence[Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
            return place([t.detach().to(device, dtype) for t in tensors])

        zeros = [torch.zeros_like(p) for p in chunk.params]
        self.chunk = chunk
        self.params, self.grads, self.plus = own(chunk.params), own(chunk.grads), own(chunk.plus)
        self.clipped, self.stepped, self.velocity = own(chunk.grads), own(chunk.params), own(zeros)
        self.sums, self.penalised, self.means = (own(zeros, wide) for _ in range(3))
        self.exact, self.exact_penalised = (self._exact(device) for _ in range(2))
        self.scales = torch.full_like(self.exact[2], EXACT_SCALE)
        # NaN, so that an element which an op leaves out is found.
        nan = {"fill_value": float("nan"), "dtype": dtype, "device": device}
        self.perturbed = torch.full((flat_size(self.params),), **nan)
        self.adapted = torch.full((flat_size(self.params),), **nan)
        self.packed = torch.full((chunk.numel,), **nan)
        flat = (
            torch.cat([t.reshape(-1) for t in ts]) for ts in (self.params, self.grads, self.plus)
        )
        self.rows = torch.stack(list(flat)).to(wide)
        self.products = torch.full((2, 3), float("nan"), dtype=torch.float64, device=device)
        self.mix = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64, device=device)
        self.combined = torch.full_like(self.rows[0], float("nan"))
        self.square = reference.squared_norm([g.to(dtype) for g in chunk.grads]).to(device)
        lists = ([x.to(dtype) for x in xs] for xs in (chunk.params, chunk.grads))
        self.scaled = reference.adaptive_norms(*lists, ETA)[1].to(device)
        self.norm, self.lr = self.square.sqrt(), scalar_on(device, 1e-3)
        self.weight = scalar_on(device, chunk.weight)
        self.coefficient = scalar_on(device, chunk.coefficient)
        # Clips to 0.999 times the values, which stay ordinary numbers however often this runs.
        self.long_norm = scalar_on(device, 1 / 0.999)

    def _exact(self, device: torch.device) -> Exact:
        """Sums in fixed point, carries, and the largest contributions."""
        sums = [torch.zeros_like(s, dtype=torch.int64) for s in self.sums]
        carries = [torch.zeros_like(s, dtype=torch.int32) for s in self.sums]
        return sums, carries, torch.zeros(len(sums), dtype=torch.float64, device=device)

    def calls(self, ops: object) -> dict[str, Callable[[], object]]:
        """A call of every op, of fbopt._ops.dispatch or of fbopt.reference, with these."""
        radius, penalty = self.chunk.radius, (self.coefficient, self.square, self.chunk.radius)
        fixed = self.weight, self.scales
        return {
            "pack_": lambda: ops.pack_(self.packed, self.grads),
            "squared_norm": lambda: ops.squared_norm(self.grads),
            "perturb_": lambda: ops.perturb_(self.perturbed, self.params, self.grads, radius),
            "adaptive_norms": lambda: ops.adaptive_norms(self.params, self.grads, ETA),
            "perturb_adaptive_": lambda: ops.perturb_adaptive_(
                self.adapted, self.params, self.grads, radius, ETA, self.scaled
            ),
            "accumulate_": lambda: ops.accumulate_(self.sums, self.grads, self.weight),
            "accumulate_penalty_": lambda: ops.accumulate_penalty_(
                self.penalised, self.grads, self.plus, [], self.weight, *penalty
            ),
            "accumulate_exact_": lambda: ops.accumulate_exact_(*self.exact, self.grads, *fixed),
            "accumulate_exact_penalty_": lambda: ops.accumulate_exact_penalty_(
                *self.exact_penalised, self.grads, self.plus, [], *fixed, *penalty
            ),
            "exact_mean_": lambda: ops.exact_mean_(
                self.means, *self.exact, self.scales, self.weight
            ),
            "clip_": lambda: ops.clip_(self.clipped, self.long_norm, 1.0),
            "sgd_step_": lambda: ops.sgd_step_(
                self.stepped, self.grads, self.velocity, self.lr, None, self.norm, 0.25, **RULE
            ),
            "row_products_": lambda: ops.row_products_(
                self.products, self.rows, self.rows[0], self.rows[2]
            ),
            "combine_rows_": lambda: ops.combine_rows_(self.combined, self.rows, self.mix),
        }

    def outcome(self, op: str) -> list[Tensor]:
        """What an op wrote."""
        return {
            "pack_": [self.packed],
            "squared_norm": [self.square],
            "perturb_": flat_views(self.perturbed, self.params),
            "adaptive_norms": [self.scaled],
            "perturb_adaptive_": flat_views(self.adapted, self.params),
            "accumulate_": self.sums,
            "accumulate_penalty_": self.penalised,
            "accumulate_exact_": self._values(self.exact),
            "accumulate_exact_penalty_": self._values(self.exact_penalised),
            "exact_mean_": self.means,
            "clip_": self.clipped,
            "sgd_step_": [*self.stepped, *self.velocity],
            "row_products_": [self.products],
            "combine_rows_": [self.combined],
        }[op]

    def _values(self, exact: Exact) -> list[Tensor]:
        """What sums in fixed point stand for, in the dtype that contributions are rounded to."""
        pairs = zip(*exact[:2], strict=True)
        dtype = accumulator_dtype(self.grads[0].dtype)
        return [((c.double() * 2.0**64 + s.double()) / EXACT_SCALE).to(dtype) for s, c in pairs]


def kernels(chunk: Operands) -> list[Contender]:
    """All kernels, each checked against its reference in float64."""
    ours = KernelArguments(chunk, torch.float32)
    right = KernelArguments(chunk, torch.float64)
    calls, references = ours.calls(dispatch), right.calls(reference)
    for name, call in calls.items():
        returned, wanted = call(), references[name]()
        if wanted is not None:
            pairs = zip(returned.reshape(-1, 1), wanted.reshape(-1, 1), strict=True)
            for found, right_one in pairs:
                require_close(name, "the squared norm", [found], [right_one], 1e-6)
        require_close(name, "the result", ours.outcome(name), right.outcome(name), 1e-5)
    return [Contender(name, calls[name], words * chunk.numel) for name, words in WORDS.items()]
