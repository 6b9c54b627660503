"""Whether chunks stay as they are while those after them are fetched: a loader may fill the same
memory again for every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLE = 64  # elements of each tensor


class Samples:
    """Some elements of the tensors of a group's chunks, as they were when they were fetched."""

    def __init__(self) -> None:
        self._kept: list[list[Tensor]] = []

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Copy some elements of a chunk's tensors."""
        self._kept.append([_some(t).clone() for t in tensors])

    def check(self, indices: Sequence[int], tensors: Sequence[Sequence[Tensor]]) -> None:
        """Raise RuntimeError if a chunk has changed; reads from the device."""
        for index, kept, now in zip(indices, self._kept, tensors, strict=False):
            if not all(map(_equal, kept, map(_some, now))):
                raise RuntimeError(
                    f"chunk {index} has changed while the chunks after it were fetched: chunks "
                    "fills memory again that it has given away, and vectorize= works on several "
                    "chunks at once; yield new tensors, or pass vectorize=1"
                )


@torch.no_grad()
def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is equal to itself here
