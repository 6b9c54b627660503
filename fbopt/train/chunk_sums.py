"""Sums over chunks that note the chunks' gradient norms, and clip each chunk's gradient.

sum_c n_c g'_c min(1, max_norm/‖g'_c‖)   with g'_c = g_c + λ H_c g_c, the penalty's part included
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fbopt import GradientAccumulator
from fbopt._ops import dispatch

Parts = list[list[Tensor]]
Weight = float | Tensor
TINY = 1e-6  # added to the norm, as torch's own clipping does


class ChunkSums(GradientAccumulator):
    """A GradientAccumulator for a FullBatchClosure; see there.

    Args:
        params: as there.
        accumulation: as there.
        max_norm: the bound of every chunk's gradient norm, None not to clip.

    Attributes:
        squares: sum_c n_c ‖g'_c‖² before clipping, since the last reset; 0-dim float64.
    """

    def __init__(
        self, params: Iterable[Tensor], accumulation: str, max_norm: float | None = None
    ) -> None:
        params = list(params)
        self.squares = torch.zeros((), dtype=torch.float64, device=params[0].device)
        self.max_norm = max_norm
        self._whole = None if max_norm is None else GradientAccumulator(params)
        super().__init__(params, accumulation)

    def reset(self) -> None:
        """Start over."""
        super().reset()
        self.squares.zero_()

    def add_parts(self, parts: Parts, weight: Weight, coefficient: Tensor | None = None) -> None:
        """See GradientAccumulator; a part with a coefficient is no chunk's whole gradient."""
        if coefficient is None:
            weight = self._noted(parts, weight)
        super().add_parts(parts, weight, coefficient)

    def add_products(self, grads: Parts, products: Parts, weight: Weight, *rest: Any) -> None:
        """See GradientAccumulator."""
        if self._whole is None:
            super().add_products(grads, products, weight, *rest)
            return
        self._whole.reset()
        self._whole.add_products(grads, products, 1.0, *rest)
        self.add_parts(self._whole._operands, weight)

    def add_penalised(
        self, grads: Parts, plus: Parts, minus: Parts, weight: Weight, *rest: Any
    ) -> None:
        """See GradientAccumulator."""
        if self._whole is None:
            super().add_penalised(grads, plus, minus, weight, *rest)
            return
        self._whole.reset()
        self._whole.add_penalised(grads, plus, minus, 1.0, *rest)
        self.add_parts(self._whole._operands, weight)

    def _noted(self, parts: Parts, weight: Weight) -> Weight:
        """Note the norm; return the weight that clips it."""
        device = self.squares.device
        square = dispatch.squared_norm([g for part in parts for g in part]).to(device)
        scale = self.scalar(weight, device)
        self.squares += scale * square
        if self.max_norm is None:
            return weight
        return scale * (self.max_norm / (square.sqrt() + TINY)).clamp(max=1)
