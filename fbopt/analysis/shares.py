"""One pass over the chunks of all processes: each visits its own, and gradients and losses are
summed over the group once at the end. A single process only adds up its own.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._distributed import Collectives, checksum
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.processes import combine_sums

EMPTY = "chunks is empty, or every chunk has weight 0: there is no sample to average over"


class Shares:
    """This process's share of the current pass, and its sums with the others'.

    All processes have to make the same passes at the same parameters; where they differ, or one of
    them fails, all raise an error.

    Args:
        collectives: of the group.
        sums: of the gradients.
        names: of the parameters, for messages.
    """

    def __init__(
        self, collectives: Collectives, sums: GradientSums, names: Sequence[str | None]
    ) -> None:
        self._collectives, self._sums, self._names = collectives, sums, names
        self._device = min({p.device for p in sums.params}, key=str)
        self.weights: list[float] = []
        self._losses: list[Tensor] = []

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Report an error in this process to the others, which would wait in :meth:`begin`."""
        try:
            self._collectives.refuse_unknown_processes(self._sums.params)
            yield
        except Exception as error:
            self._collectives.report_error(error, 0, 1, self._device)
            raise

    def begin(self, what: str, summed: bool, vectors: Sequence[Tensor]) -> None:
        """Begin a pass at the parameters as they are now, along vectors that all have to share.

        Args:
            what: the name of the pass.
            summed: whether it is for gradients, or for losses alone.
            vectors: the same on all processes.

        Raises:
            PeerError: another process failed.
            ValueError: the processes differ in the pass, the parameters or the vectors.
        """
        self.weights, self._losses = [], []
        self._is_summed = summed
        if summed:
            self._sums.reset()
        if self._collectives.is_single:
            return
        facts: dict[str, Any] = {"the pass": what}
        for i, (name, bits) in enumerate(
            zip(self._names, checksum(self._sums.params), strict=True)
        ):
            facts[f"{name or f'params[{i}]'}, or the shift from it,"] = f"of checksum {bits}"
        facts |= {"the vector": f"of checksum {checksum(vectors)}"} if vectors else {}
        number = zlib.crc32(repr(facts).encode())
        table = self._collectives.agree([], [number], self._device).table
        if any(row != table[0] for row in table):
            self._collectives.check_same(
                facts,
                "call the same functions in the same order on all, with the same model, arguments "
                "and seeds",
            )

    @contextlib.contextmanager
    def visiting(self) -> Iterator[None]:
        """Visit this process's chunks; afterwards the sums are those of all processes."""
        try:
            yield
        except Exception as error:
            flags = len(self._sums.params) if self._is_summed else 0
            self._collectives.report_error(error, flags, 2, self._sums.params[0].device)
            raise
        counts = len(self.weights), math.fsum(self.weights)
        if self._is_summed:
            found = combine_sums(self._sums, self._collectives, counts, ValueError(EMPTY))
            assert found is not None  # the units of float sums always fit
        else:
            found = self._collectives.agree([], counts, self._sums.params[0].device)
        self._numbers = [int(n) for n, _ in found.table]
        if not any(self._numbers):
            raise ValueError(EMPTY)

    def add(self, weight: float, loss: Tensor, grads: Sequence[Tensor | None] | None) -> None:
        """Add a chunk's loss, and its gradients unless the pass is for losses alone."""
        self.weights.append(weight)
        self._losses.append(loss.detach().double())
        if grads is not None:
            self._sums.add(self._sums.gather(grads), weight)
            self._sums.total_weight += weight

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the (k, n) tensors of all processes by columns, one for each chunk."""
        return self._collectives.all_gather(rows.to(self._device), self._numbers)

    def loss(self) -> float:
        """The mean loss over the chunks of all processes, whatever their order."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        losses = torch.stack([x.cpu() for x in self._losses]) if self._losses else weights
        products = self.gather(torch.stack([weights * losses, weights]))
        total, weight = products.sort(dim=1).values.sum(dim=1).tolist()
        return float(total) / float(weight)
