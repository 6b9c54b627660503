"""The clip of each chunk's gradient: w_c <- w_c min(1, max_norm / (||g'_c|| + 1e-6)), where g'_c is
g_c + lambda H_c g_c with a penalty. All of it is work on the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from fbopt._engine.gradient_sums import GradientSums, Parts
from fbopt._ops.reference import clip_coefficient


class ChunkClip:
    """Clips each chunk's gradient, then adds it to the sums; has the sums' interface.

    Args:
        sums: where the gradients of all chunks are added.

    Attributes:
        max_norm: the bound; may change between steps.
    """

    max_norm: float = math.inf

    def __init__(self, sums: GradientSums) -> None:
        self._sums, self._buckets = sums, sums.buckets

    def fits(self, sums: GradientSums) -> bool:
        """Whether this was made for these sums and their current parameters."""
        return sums is self._sums and sums.buckets is self._buckets

    def weight(self, weight: float | Tensor, squared_norm: Tensor) -> Tensor:
        """The weight of a chunk times the factor that clips its gradient."""
        scale = self._sums.scalar(weight, squared_norm.device)
        return scale * clip_coefficient(self.max_norm, squared_norm.sqrt())

    def add_penalised(
        self, grads: Parts, plus: Parts, minus: Parts, weight: float | Tensor, *penalty: Any
    ) -> None:
        """See :meth:`GradientSums.add_penalised`."""
        self._whole.reset()
        self._whole.add_penalised(grads, plus, minus, 1.0, *penalty)
        self._add_whole(weight)

    @functools.cached_property
    def _whole(self) -> GradientSums:
        """One chunk's gradient, penalty included, in float32: the clip needs its norm."""
        return GradientSums(self._sums.params)

    def _add_whole(self, weight: float | Tensor) -> None:
        parts = self._whole.parts
        self._sums.add(parts, self.weight(weight, self._whole.squared_norm(parts)))
