"""A description of the work that torch and JAX share: weights and samples as NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Workload:
    """The penalised gradient of a network's mean loss over chunks of equal size.

    Args:
        network: its name: cnn, mlp, pinn or resnet18.
        title: the work in words.
        weights: the parameters by their names in torch, in its order and layout.
        arrays: what chunks are cut from along the first axis: inputs and labels, or what the loss
            of the network takes.
        chunk: samples in a chunk.
        radius, coefficient: of the penalty, by forward differences.
        precision: fp32 or bf16.
        width: of the network, None for the usual one.
        together: chunks that vectorised contenders work on at once, 0 for all.
    """

    network: str
    title: str
    weights: dict[str, np.ndarray]
    arrays: Arrays
    chunk: int
    radius: float = 0.1
    coefficient: float = 0.1
    precision: str = "fp32"
    width: int | None = None
    together: int = 0

    @property
    def samples(self) -> int:
        return len(self.arrays[0])

    @property
    def count(self) -> int:
        """The number of chunks."""
        if self.samples % self.chunk:
            raise ValueError(f"{self.samples} samples are no whole number of chunks {self.chunk}")
        return self.samples // self.chunk

    @property
    def group(self) -> int:
        """The number of chunks at once."""
        return min(self.together or self.count, self.count)

    @property
    def at_once(self) -> str:
        """That in words, the same for any number of samples."""
        return f"{self.together or 'all'} at once"

    def chunks(self) -> Iterator[Arrays]:
        """The arrays of every chunk."""
        for start in range(0, self.count * self.chunk, self.chunk):
            yield tuple(array[start : start + self.chunk] for array in self.arrays)

    def head(self, chunk: int, count: int) -> Workload:
        """The first samples, in `count` smaller chunks."""
        arrays = tuple(array[: chunk * count] for array in self.arrays)
        return replace(self, arrays=arrays, chunk=chunk)

    def double(self) -> Workload:
        """The same in float64."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        arrays = tuple(a.astype(np.float64) if a.dtype.kind == "f" else a for a in self.arrays)
        return replace(self, weights=weights, arrays=arrays, precision="fp64")


@dataclass(frozen=True)
class Result:
    """What a call leaves: the mean loss and the gradient, by the parameters' names in torch."""

    loss: float
    grads: dict[str, np.ndarray]
