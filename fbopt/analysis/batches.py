"""Random mini-batches of an objective's samples: L_B, g_B and H_B v at the same parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fbopt._random import mix
from fbopt.analysis.checks import check
from fbopt.analysis.objective import Objective


class Batches:
    """Draws of samples without replacement, as objectives with the settings of the full one.

    Args:
        objective: the full-batch loss. Its chunks are pairs (input, target) of tensors, with the
            samples along the first dimension, and are concatenated here: a copy of the data.

    Attributes:
        samples: N, the number of samples.

    Raises:
        TypeError: other chunks.
        ValueError: an objective of several processes, or with weights of its own.
    """

    def __init__(self, objective: Objective) -> None:
        objective.refuse_penalised("mini-batches are")
        if not objective.is_single:
            raise ValueError(
                "mini-batches are drawn from the chunks of one process: give it all chunks, and "
                "make the Objective with process_group='local'"
            )
        if objective.weight is not None or objective.evaluate is not None:
            raise ValueError(
                "mini-batches are drawn sample by sample: make the Objective with loss_fn and "
                "chunks of (input, target), without evaluate or weight"
            )
        check(objective)
        pairs = [_pair(index, chunk) for index, chunk in enumerate(objective.chunks)]
        self._inputs, self._targets = (torch.cat(side) for side in zip(*pairs, strict=True))
        self._objective = Objective(
            objective.model,
            objective.loss_fn,
            [(self._inputs, self._targets)],
            params=objective.params,
            autocast=objective.autocast,
            batchnorm=objective.batchnorm,
            dropout=objective.dropout,
            seed=objective.seed,
            process_group="local",
        )

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return len(self._inputs)

    def draw(self, size: int, count: int, seed: int) -> Iterator[Objective]:
        """Iterate over `count` batches of `size` samples, each as an objective of one chunk.

        It is the same object every time, with other chunks. Batch i depends on the seed, the size
        and i alone.
        """
        for index in range(count):
            generator = torch.Generator().manual_seed(mix(seed, size, index))
            chosen = torch.randperm(self.samples, generator=generator)[:size]
            sides = (self._inputs, self._targets)
            self._objective.chunks = [tuple(side[chosen.to(side.device)] for side in sides)]
            yield self._objective


def _pair(index: int, chunk: object) -> tuple[Tensor, Tensor]:
    found = tuple(chunk) if isinstance(chunk, tuple | list) else ()
    tensors = [side for side in found if isinstance(side, Tensor) and side.dim() > 0]
    if len(found) != 2 or len(tensors) != 2 or len(tensors[0]) != len(tensors[1]):
        raise TypeError(
            f"chunk {index} has to be a pair (input, target) of tensors with one row for each "
            "sample, so that mini-batches can be drawn from it"
        )
    return tensors[0], tensors[1]


def check_sizes(sizes: list[int], samples: int) -> None:
    """Raise for batch sizes that are no whole numbers from 1 to the number of samples."""
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= samples:
            raise ValueError(
                f"a batch size has to be a whole number from 1 to the {samples} samples, got "
                f"{size!r}"
            )
