"""Orthonormal vectors in parameter space, each orthogonalised twice against all earlier ones (Golub
and Van Loan, Matrix Computations, section 10.3), so that no eigenpair appears twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
BLOCK = 16  # vectors per allocation


class Basis:
    """Orthonormal vectors, stored in blocks that are allocated as needed."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.length = like, 0
        self.blocks: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def _rows(self) -> list[Tensor]:
        """The used rows of every block."""
        return [block[: self.length - BLOCK * i] for i, block in enumerate(self.blocks)]

    def add(self, vector: Tensor) -> None:
        """Add a unit vector orthogonal to the others."""
        if self.length == BLOCK * len(self.blocks):
            self.blocks.append(self.like.new_empty(BLOCK, len(self.like)))
        self.blocks[-1][self.length % BLOCK] = vector
        self.length += 1

    def orthogonalize(self, vector: Tensor) -> tuple[Array, Tensor]:
        """Return a vector's components along the basis (float64) and the remainder."""
        rest, total = vector.clone(), np.zeros(self.length)
        for _ in range(2):  # rounding in the first is relative to the components it removes
            components = [rows @ rest for rows in self._rows()]
            for rows, part in zip(self._rows(), components, strict=True):
                rest -= part @ rows
            if components:
                total += torch.cat(components).double().cpu().numpy()
        return total, rest

    def random(self) -> Tensor:
        """Draw a random unit vector orthogonal to the basis."""
        draw = torch.randn(len(self.like), dtype=torch.float64, generator=self.generator)
        _, rest = self.orthogonalize((draw / draw.norm()).to(self.like))
        _, rest = self.orthogonalize(rest / rest.norm())
        return rest.div_(rest.norm())

    def combine(self, coefficients: Array) -> Tensor:
        """Linear combinations of the vectors, by the columns of (length, k), as rows of (k, P)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.like)
        parts = torch.split(weights, [len(rows) for rows in self._rows()], dim=1)
        products = (w @ rows for w, rows in zip(parts, self._rows(), strict=True))
        return sum(products, weights.new_zeros(()))
