"""Weighted sums over lists of tensors, S = sum_c w_c v_c and its mean, in floating point. The other
strategy, in integers, is in fixed_point.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.fixed_point import FixedPointSums
from fbopt._ops.flat import scalar_on

if TYPE_CHECKING:
    from fbopt._distributed import Collectives

ACCUMULATIONS = ("float32", "exact")


class FloatSums:
    """Sums of lists of tensors in float32, or float64, in the memory of their means.

    There are no units to fit: :meth:`maxima` and :meth:`state_dict` are empty.
    """

    width = 0
    memory: Sequence[Sequence[Tensor]] = ()

    def __init__(self) -> None:
        self._sums: Sequence[list[Tensor]] = ()
        self._flats: Sequence[Tensor] = ()

    def allocate(
        self,
        means: Sequence[list[Tensor]],
        flats: Sequence[Tensor],
        memory: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        """Sum new tensors; see :meth:`fbopt._ops.fixed_point.FixedPointSums.allocate`."""
        self._sums, self._flats = means, flats

    def zero_(self) -> None:
        """Start over."""
        for flat in self._flats:
            flat.zero_()

    def add(self, part: int, values: Sequence[Tensor], weight: Tensor) -> None:
        """Add ``weight * values`` to a list; see :func:`fbopt.reference.accumulate_`."""
        dispatch.accumulate_(self._sums[part], values, weight)

    def add_penalised(
        self,
        part: int,
        grads: Sequence[Tensor],
        plus: Sequence[Tensor],
        minus: Sequence[Tensor],
        weight: Tensor,
        *penalty: Tensor | float,
    ) -> None:
        """Add ``weight * (g + k (g+ - g-))``; see :func:`fbopt.reference.accumulate_penalty_`."""
        dispatch.accumulate_penalty_(self._sums[part], grads, plus, minus, weight, *penalty)

    def maxima(self) -> Tensor:
        """An empty 1-D float64 tensor."""
        return torch.zeros(0, dtype=torch.float64)

    def fit(self, maxima: Tensor, additions: int) -> bool:
        """Return True: there are no units that could fail to fit."""
        return True

    def finish(self, weight: float) -> bool:
        """Return False: the sums are left for the optimizer's step to divide."""
        return False

    def mean_(self, weight: float) -> None:
        """Divide the sums by their weight."""
        for flat in self._flats:  # a CUDA kernel would multiply by the reciprocal of a number
            flat.div_(weight if flat.is_cpu else scalar_on(flat.device, weight))

    def all_reduce_(self, collectives: Collectives, extra: Sequence[Tensor] = ()) -> None:
        """Replace sums, and `extra`, by those of all processes; with `extra` in one all-reduce."""
        if extra:
            collectives.all_reduce_coalesced_([*self._flats, *extra])
        else:
            collectives.all_reduce_(self._flats)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: sums do not depend on earlier ones."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    @staticmethod
    def check_weight(weight: float) -> None:
        """Accept every weight."""


Sums = FloatSums | FixedPointSums


def make_sums(accumulation: str) -> Sums:
    """Return the strategy of that name, or raise a ValueError."""
    if accumulation not in ACCUMULATIONS:
        raise ValueError(f"accumulation must be one of {ACCUMULATIONS}, got {accumulation!r}")
    return FixedPointSums() if accumulation == "exact" else FloatSums()
