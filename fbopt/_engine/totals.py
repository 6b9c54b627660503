"""What a step adds up besides gradients: weights, losses, squared norms.

The order of the chunks, and which process visited them, leaves no trace in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fbopt._distributed import Ranks


class Totals:
    """Losses, squared gradient norms (with a penalty) and weights of the chunks visited here."""

    NUMBERS = 3  # the length of `numbers`

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.weights: list[float] = []

    def add(self, loss: Tensor, square: Tensor | None, weight: float) -> None:
        """Add a chunk's loss, ||g||^2 and weight; nothing is read from the device."""
        self.losses.append(loss)
        self.weights.append(weight)
        if square is not None:
            self.squares.append(square)

    def numbers(self) -> list[float]:
        """How many chunks, their weight, and whether their losses are float64."""
        wide = any(loss.dtype == torch.float64 for loss in self.losses)
        return [len(self.losses), math.fsum(self.weights), wide]

    def means(
        self, ranks: Ranks, table: Sequence[Sequence[float]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The weighted means of losses and of squared norms (0 without), 0-dim, float64.

        The products are sorted before they are added: the sum knows no order of the chunks.

        Args:
            ranks: whose chunks to count.
            table: the :meth:`numbers` of each of them.
            device: where several processes gather theirs.
        """
        counts, weights, _ = zip(*table, strict=True)
        total = math.fsum(weights)
        losses, squares = (_products(v, self.weights) for v in (self.losses, self.squares))
        if not ranks.alone:
            rows = torch.zeros(2, len(self.losses), dtype=torch.float64, device=device)
            for row, products in zip(rows, (losses, squares), strict=True):
                row[: len(products)] = products
            losses, squares = ranks.gather(rows, [int(n) for n in counts])
        return losses.sort().values.sum() / total, squares.sort().values.sum() / total


def _products(values: list[Tensor], weights: list[float]) -> Tensor:
    """Weight times value of each chunk, in float64."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.stack(values).double()
    return torch.stack(torch._foreach_mul(list(wide.unbind()), weights))
