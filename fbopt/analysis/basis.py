"""An orthonormal basis that grows by one vector at a time, for Lanczos iterations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 16  # vectors in a piece of memory


class Basis:
    """Orthonormal vectors, in blocks of memory that are added as they are needed."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.length = like, 0
        self.blocks: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def _rows(self) -> list[Tensor]:
        """The blocks' rows that are in use."""
        left = [self.length - BLOCK * i for i in range(len(self.blocks))]
        return [b[: min(BLOCK, n)] for b, n in zip(self.blocks, left, strict=True)]

    def add(self, vector: Tensor) -> None:
        """Add a unit vector that is orthogonal to the others."""
        if self.length == BLOCK * len(self.blocks):
            self.blocks.append(self.like.new_empty(BLOCK, len(self.like)))
        self.blocks[-1][self.length % BLOCK] = vector
        self.length += 1

    def orthogonalize(self, vector: Tensor) -> tuple[np.ndarray, Tensor]:
        """The components of a vector along the basis (float64), and what is left of it."""
        rest, total = vector.clone(), np.zeros(self.length)
        for _ in range(2):  # the first leaves an error in proportion to what it takes away
            components = [rows @ rest for rows in self._rows()]
            for rows, part in zip(self._rows(), components, strict=True):
                rest -= part @ rows
            if components:
                total += torch.cat(components).double().cpu().numpy()
        return total, rest

    def random(self) -> Tensor:
        """A random unit vector orthogonal to the basis."""
        draw = torch.randn(len(self.like), dtype=torch.float64, generator=self.generator)
        _, rest = self.orthogonalize((draw / draw.norm()).to(self.like))
        _, rest = self.orthogonalize(rest / rest.norm())
        return rest / rest.norm()

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """The combinations with the columns of (length, k), as the rows of (k, P)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.like)
        parts = weights.split([len(rows) for rows in self._rows()], dim=1)
        return sum(w @ rows for w, rows in zip(parts, self._rows(), strict=True))
