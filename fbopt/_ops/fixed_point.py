"""Sums in fixed point: S = sum_c rint(w_c v_c / u) for every element, with one unit u, a power of
two, for each tensor. Integers add up to the same in any order and on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.flat import flat_size, flat_views, scalar_on

if TYPE_CHECKING:
    from fbopt._distributed import Collectives

# Every sum is right to PRECISION bits of the largest contribution; units are chosen finer by a few,
# MARGIN, so that contributions may shrink from pass to pass.
PRECISION, MARGIN, LEAST_BITS = 49, 2, 58
# Those bits and twice the additions', for carries, fit below REACH.
MOST_ADDITIONS = 2**21
# A sum reaches to 2^94 units, see csrc/rules/exact.h.
REACH = 94
# The unit until a first pass has shown how large contributions are.
FIRST_EXPONENT = -72
# The least exponent of a unit, so that a weight over it is a float64; for float64 gradients only.
LEAST_EXPONENT = -900
# Significant bits of a weight, with which its product with a float32 is exact in float64, and the
# least power of two in it, with which sums of weights are.
WEIGHT_BITS, WEIGHT_GRID = 29, -24


class FixedPoint:
    """Integer sums of lists of tensors.

    A sum is an int64 that wraps and an int32 that counts how often, 96 bits together. The units
    follow from the largest contributions M of a tensor in the last pass, which depend on no order:
    u is some 2^-58 M, and less from 128 additions on. A pass for which a unit does not fit has to
    be repeated: one in which n additions could exceed 2^94 u, or be wrong by ``n u / 2 > 2^-49 M``.
    For the sums that are kept therefore ``|S u - sum_c w_c v_c| <= 2^-49 M``. (For float64 values
    w v is rounded to float64 first, and no unit is below 2^-900.)

    Args:
        parts: lists of tensors, each list of one device and dtype; the sums are of their shapes.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._flats: list[tuple[Tensor, Tensor]] = []
        self._sums: list[list[Tensor]] = []
        self._carries: list[list[Tensor]] = []
        self._maxima: list[Tensor] = []
        self._scales: list[Tensor] = []
        for part in parts:
            size, device = flat_size(part), part[0].device
            sums = torch.zeros(size, dtype=torch.int64, device=device)
            carries = torch.zeros(size, dtype=torch.int32, device=device)
            self._flats.append((sums, carries))
            self._sums.append(flat_views(sums, part))
            self._carries.append(flat_views(carries, part))
            numbers = torch.zeros(2, len(part), dtype=torch.float64, device=device)
            self._maxima.append(numbers[0])
            self._scales.append(numbers[1])
        self._set_exponents([FIRST_EXPONENT] * sum(map(len, parts)))

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._exponents)

    def reset(self) -> None:
        """Start over, with the units that :meth:`fit` has chosen."""
        for tensors in (*self._flats, self._maxima):
            for tensor in tensors:
                tensor.zero_()
        if self._next != self._exponents:
            self._set_exponents(self._next)

    def add(self, part: int, values: Sequence[Tensor], weight: Tensor) -> None:
        """Add ``weight * values`` to a list; see :func:`fbopt.reference.accumulate_exact_`."""
        dispatch.accumulate_exact_(*self._kept(part), values, weight, self._scales[part])

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
        device = self._maxima[0].device
        joined = torch.cat([m.to(device) for m in self._maxima])
        return joined.nan_to_num(nan=math.inf, posinf=math.inf)

    def fit(self, maxima: Tensor, additions: int) -> bool:
        """Whether the sums are right; choose the units of the next pass. Reads the device.

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
        self._next = chosen
        return fits

    def means_(self, means: Sequence[list[Tensor]], weight: float) -> None:
        """Write S u / weight to tensors of float32 or float64, see
        :func:`fbopt.reference.exact_mean_`.
        """
        for part, out in enumerate(means):
            divisor = scalar_on(out[0].device, weight)
            dispatch.exact_mean_(out, *self._kept(part), self._scales[part], divisor)

    def all_reduce_(self, collectives: Collectives) -> None:
        """Replace the sums by those of all processes: one all-reduce of int64 for each list."""
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

    def state_dict(self) -> list[int]:
        """Return the exponents of the next pass's units: its bits depend on them."""
        return list(self._next)

    def load_state_dict(self, exponents: Sequence[int]) -> None:
        """Go on with saved units; where they are of another number of tensors, with the first."""
        fits = len(exponents) == len(self._exponents)
        self._next = list(exponents) if fits else [FIRST_EXPONENT] * len(self._exponents)

    def _set_exponents(self, exponents: Sequence[int]) -> None:
        self._exponents = self._next = list(exponents)
        scales = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
        for own, part in zip(self._scales, scales.split(list(map(len, self._scales))), strict=True):
            own.copy_(part)


def check_weight(weight: float) -> None:
    """Refuse a weight whose products or sums could be rounded."""
    bits, grid = math.frexp(weight)[0] * 2**WEIGHT_BITS, weight * 2.0**-WEIGHT_GRID
    if bits != int(bits) or grid != int(grid) or weight > 2**WEIGHT_BITS:
        raise ValueError(
            f'weight is {weight!r}: accumulation="exact" takes integers up to {2**WEIGHT_BITS:,} '
            f"and multiples of 2^{WEIGHT_GRID} of at most {WEIGHT_BITS} significant bits, so that "
            'nothing is rounded: pass the number of samples, or accumulation="float32"'
        )
