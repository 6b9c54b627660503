"""Sums in fixed point: S = sum_c rint(w_c v_c / u) for every element, with one unit u, a power of
two, for each tensor. Integers add up to the same in any order and on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.flat import flat_size, flat_views, scalar_on

if TYPE_CHECKING:
    from fbopt._distributed import Collectives

# Every sum is right to PRECISION bits of the largest contribution. Units are chosen MARGIN bits
# finer, so that contributions may shrink from pass to pass.
PRECISION, MARGIN, LEAST_BITS = 49, 2, 58
# PRECISION bits and twice the bits of this number, for carries, fit below REACH.
MOST_ADDITIONS = 2**21
# A sum reaches to 2^94 units, see csrc/rules/exact.h.
REACH = 94
# The unit until a first pass has shown how large contributions are.
FIRST_EXPONENT = -72
# The smallest exponent of a unit, so that a weight over the unit is a float64. Only float64
# gradients come near it.
LEAST_EXPONENT = -900
# Significant bits of a weight: its product with a float32 is then exact in float64. The exponent of
# the smallest power of two in it: sums of weights are then exact.
WEIGHT_BITS, WEIGHT_GRID = 29, -24


class FixedPointSums:
    """Sums of lists of tensors as integers; the same interface as :class:`FloatSums`.

    A sum is an int64 that wraps and an int32 that counts how often, 96 bits together. The units
    follow from the largest contribution M to a tensor in the last pass, whatever the order:
    u is about 2^-58 M, and less from 128 additions on. A pass for which a unit does not fit has to
    be repeated: one in which n additions could exceed 2^94 u, or be wrong by ``n u / 2 > 2^-49 M``.
    For the sums that are kept therefore ``|S u - sum_c w_c v_c| <= 2^-49 M``. (For float64 values
    w v is rounded to float64 first, and no unit is below 2^-900.)
    """

    def __init__(self) -> None:
        self._exponents: list[int] = []
        self._next: list[int] = []
        self._loaded: list[int] = []
        self.allocate([], [])

    @torch.no_grad()
    def allocate(
        self,
        means: Sequence[list[Tensor]],
        flats: Sequence[Tensor],
        memory: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        """Make the sums of other tensors; units are kept where their number is the same.

        Args:
            means: lists of float32 or float64 tensors, each list on one device and of one dtype.
                Sums have their shapes, and :meth:`mean_` writes to them.
            flats: for each list the flat buffer that it lies in.
            memory: sums to go on with, the attribute `memory` of others of the same shapes; by
                default they begin with zeros.
        """
        self.memory = memory or [_zeros(part) for part in means]
        self._means = means
        self._flats: list[tuple[Tensor, Tensor]] = []
        self._sums: list[list[Tensor]] = []
        self._carries: list[list[Tensor]] = []
        self._maxima: list[Tensor] = []
        self._scales: list[Tensor] = []
        for part, (sums, carries, numbers) in zip(means, self.memory, strict=True):
            self._flats.append((sums, carries))
            self._sums.append(flat_views(sums, part))
            self._carries.append(flat_views(carries, part))
            self._maxima.append(numbers[0])
            self._scales.append(numbers[1])
        self._set_exponents(self._chosen(sum(map(len, means))))

    def _chosen(self, count: int) -> list[int]:
        """The units for a number of tensors: those of the last pass, those loaded, or the first."""
        known = (self._next, self._loaded, [FIRST_EXPONENT] * count)
        return next(exponents for exponents in known if len(exponents) == count)

    @property
    def width(self) -> int:
        """The length of :meth:`maxima`: the number of tensors."""
        return len(self._exponents)

    def zero_(self) -> None:
        """Start over, with the units that :meth:`fit` has chosen."""
        for tensors in (*self._flats, self._maxima):
            for tensor in tensors:
                tensor.zero_()
        if self._next != self._exponents:
            self._set_exponents(self._next)

    def add(self, part: int, values: Sequence[Tensor], weight: Tensor) -> None:
        """Add ``weight * values`` to a list; see :func:`fbopt.reference.accumulate_exact_`."""
        dispatch.accumulate_exact_(*self._kept(part), values, weight, self._scales[part])

    def add_one(self, part: int, index: int, value: Tensor, weight: Tensor) -> None:
        """Add ``weight * value`` to one tensor of a list."""
        one = slice(index, index + 1)
        sums, carries, maxima = self._kept(part)
        kept = sums[one], carries[one], maxima[one]
        dispatch.accumulate_exact_(*kept, [value], weight, self._scales[part][one])

    def add_penalised(
        self,
        part: int,
        grads: Sequence[Tensor],
        plus: Sequence[Tensor],
        minus: Sequence[Tensor],
        weight: Tensor,
        *penalty: Tensor | float,
    ) -> None:
        """Add ``weight * (g + k (g+ - g-))``; see
        :func:`fbopt.reference.accumulate_exact_penalty_`.
        """
        dispatch.accumulate_exact_penalty_(
            *self._kept(part), grads, plus, minus, weight, self._scales[part], *penalty
        )

    def _kept(self, part: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return self._sums[part], self._carries[part], self._maxima[part]

    def maxima(self) -> Tensor:
        """M of each tensor, infinite where one was not finite: 1-D, float64."""
        if not self._maxima:
            return torch.zeros(0, dtype=torch.float64)
        device = self._maxima[0].device
        joined = torch.cat([m.to(device) for m in self._maxima])
        return joined.nan_to_num(nan=math.inf, posinf=math.inf)

    def fit(self, maxima: Tensor, additions: int) -> bool:
        """Whether the units fitted; choose those of the next pass. Reads the device.

        Args:
            maxima: M of each tensor over all processes, as from :meth:`maxima`. A tensor whose M
                is infinite has NaN for its mean, and fits.
            additions: to each tensor, on all processes: at most 2^21.
        """
        if additions > MOST_ADDITIONS:
            raise RuntimeError(
                f'accumulation="exact" adds up at most {MOST_ADDITIONS:,} gradients, these are '
                f"{additions:,}: make the chunks larger"
            )
        spread = math.ceil(math.log2(max(additions, 1)))
        fits, chosen = True, []
        for exponent, largest in zip(self._exponents, maxima.tolist(), strict=True):
            if largest > 0 and math.isfinite(largest):
                top = math.frexp(largest)[1]  # 2^(top - 1) <= M < 2^top
                coarsest = max(top - PRECISION - spread, LEAST_EXPONENT)
                fits &= top + spread - REACH <= exponent <= coarsest
                bits = max(LEAST_BITS, PRECISION + MARGIN + spread)
                exponent = max(top - bits, LEAST_EXPONENT)
            chosen.append(exponent)
        for own, part in zip(self._maxima, maxima.split(list(map(len, self._maxima))), strict=True):
            own.copy_(part)
        self._next, self._loaded = chosen, []
        return fits

    def finish(self, weight: float) -> bool:
        """Write the means and return True: integers are not left for an optimizer to divide."""
        self.mean_(weight)
        return True

    def mean_(self, weight: float) -> None:
        """Write S u / weight to the means, see :func:`fbopt.reference.exact_mean_`."""
        for part, out in enumerate(self._means):
            divisor = scalar_on(out[0].device, weight)
            dispatch.exact_mean_(out, *self._kept(part), self._scales[part], divisor)

    def all_reduce_(self, collectives: Collectives, extra: Sequence[Tensor] = ()) -> None:
        """Replace sums, and `extra`, by those of all processes; an all-reduce of int64 per list."""
        if collectives.is_single:
            return
        for sums, carries in self._flats:
            high = (sums >> 32) + (carries.to(torch.int64) << 32)
            halves = torch.cat([high, sums & 0xFFFFFFFF])
            collectives.all_reduce_([halves])
            high, low = halves.chunk(2)
            high += low >> 32
            sums.copy_((high << 32) | (low & 0xFFFFFFFF))
            carries.copy_((high - (sums >> 32)) >> 32)
        collectives.all_reduce_coalesced_(extra)

    def state_dict(self) -> dict[str, Any]:
        """Return the exponents of the next pass's units: the bits of its sums depend on them."""
        return {"exponents": list(self._loaded or self._next)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved units, at once or when there are as many tensors as they are for."""
        self._loaded, self._next = list(state.get("exponents", ())), []
        self._next = self._chosen(self.width)

    def _set_exponents(self, exponents: Sequence[int]) -> None:
        self._exponents = self._next = list(exponents)
        scales = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
        for own, part in zip(self._scales, scales.split(list(map(len, self._scales))), strict=True):
            own.copy_(part)

    @staticmethod
    def check_weight(weight: float) -> None:
        """Refuse a weight whose products or sums could be rounded."""
        bits, grid = math.frexp(weight)[0] * 2**WEIGHT_BITS, weight * 2.0**-WEIGHT_GRID
        if bits != int(bits) or grid != int(grid) or weight > 2**WEIGHT_BITS:
            raise ValueError(
                f'weight is {weight!r}: accumulation="exact" takes integers up to '
                f"{2**WEIGHT_BITS:,} and multiples of 2^{WEIGHT_GRID} of at most {WEIGHT_BITS} "
                "significant bits, so that nothing is rounded: pass the number of samples, or "
                'accumulation="float32"'
            )


def _zeros(part: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and carries of a list of tensors, and two numbers for each: M, and one over the unit."""
    size, device = flat_size(part), part[0].device
    return (
        torch.zeros(size, dtype=torch.int64, device=device),
        torch.zeros(size, dtype=torch.int32, device=device),
        torch.zeros(2, len(part), dtype=torch.float64, device=device),
    )
