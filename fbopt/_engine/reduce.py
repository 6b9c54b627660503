"""A step of several processes: each visits its own chunks, then all have the sums of all chunks."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fbopt._distributed import Collectives, checksum
from fbopt._engine.batchnorm import RunningStatistics
from fbopt.accumulate import GradientAccumulator


class ChunkTotals:
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
        self, collectives: Collectives, table: Sequence[Sequence[float]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The weighted means of losses and of squared norms (0 without), 0-dim, float64.

        The products are sorted before they are added: the sum knows no order of the chunks.

        Args:
            collectives: whose chunks to count.
            table: the :meth:`numbers` of each of them.
            device: where several processes gather theirs.
        """
        counts, weights, _ = zip(*table, strict=True)
        total = math.fsum(weights)
        losses, squares = (_products(v, self.weights) for v in (self.losses, self.squares))
        if not collectives.is_single:
            rows = torch.zeros(2, len(self.losses), dtype=torch.float64, device=device)
            for row, products in zip(rows, (losses, squares), strict=True):
                row[: len(products)] = products
            losses, squares = collectives.all_gather(rows, [int(n) for n in counts])
        return losses.sort().values.sum() / total, squares.sort().values.sum() / total


def _products(values: list[Tensor], weights: list[float]) -> Tensor:
    """Weight times value of each chunk, in float64."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.stack(values).double()
    return torch.stack(torch._foreach_mul(list(wide.unbind()), weights))


class Reduction:
    """What the processes of a group do with the sums of a step; alone, only their means.

    Args:
        model: whose normalisation layers count their passes.
        devices: where its parameters are.
        group: as for :class:`Collectives`.

    Raises:
        TypeError, ValueError: a group or model that cannot be used; the message says why.
    """

    def __init__(self, model: nn.Module, devices: set[torch.device], group: Any) -> None:
        self.collectives = Collectives(group)
        self.collectives.check_devices(devices)
        if not self.collectives.is_single:
            _refuse_wrapped(model)
        self._device = min(devices, key=str)
        self._compared: GradientAccumulator | None = None
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._layers = [m for m in model.modules() if isinstance(m, _NormBase)]
        self._before: list[Tensor] = []

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Let the others, which would wait in :meth:`begin`, know of an error in this process."""
        try:
            yield
        except Exception as error:
            self.collectives.report_error(error, 1, 1, self._device)
            raise

    @contextlib.contextmanager
    def visiting(
        self, accumulator: GradientAccumulator, statistics: RunningStatistics
    ) -> Iterator[None]:
        """The same for those that would wait in :meth:`combine`."""
        try:
            yield
        except Exception as error:
            params, maxima = accumulator.params, None
            if accumulator.fixed is not None:
                length = len(accumulator.fixed) + statistics.width
                maxima = torch.zeros(length, dtype=torch.float64, device=params[0].device)
            self.collectives.report_error(
                error, len(params), ChunkTotals.NUMBERS, params[0].device, maxima
            )
            raise

    def begin(self, accumulator: GradientAccumulator, **facts: Any) -> None:
        """Before the first chunk; new parameters are compared between the processes.

        Args:
            accumulator: of the parameters.
            **facts: what else has to be the same on all.

        Raises:
            PeerError: another process failed.
            ValueError: the processes differ in parameters, training modes or a fact.
        """
        if self.collectives.is_single:
            return
        self._before = [count.clone() for count in self._counts()]
        modes = "".join("ET"[m.training] for m in self._layers)
        layout = repr((modes, [(p.dtype, p.shape) for p in accumulator.params]))
        new, number = self._compared is not accumulator, zlib.crc32(layout.encode())
        found = self.collectives.agree([new], [number], self._device)
        if found.flags[0] or any(row != found.table[0] for row in found.table):
            facts["the modes of normalisation layers (E: eval, T: training)"] = modes
            self.collectives.check_same(
                facts | self._describe(accumulator.params),
                "build the same model on all, and load or broadcast the same parameters",
            )
            self._compared = accumulator

    def _describe(self, params: Sequence[Tensor]) -> dict[str, str]:
        found = {"the number of parameters": str(len(params))}
        for i, (p, bits) in enumerate(zip(params, checksum(params), strict=True)):
            name = f"parameter {i} ({self._names.get(id(p), 'unnamed')})"
            found[name] = f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}, checksum {bits},"
        return found

    @torch.no_grad()
    def combine(
        self, accumulator: GradientAccumulator, statistics: RunningStatistics, totals: ChunkTotals
    ) -> tuple[Tensor, Tensor] | None:
        """Leave the sums of all chunks in the accumulator, their means in BatchNorm's statistics.

        Exact sums are made means. Returns the mean loss and the mean squared norm, 0-dim; or None
        where the units of exact sums did not fit, and all chunks have to be visited again.

        Raises:
            PeerError: another process failed.
            ValueError: none had a chunk.
        """
        collectives, device = self.collectives, accumulator.params[0].device
        seen = [accumulator.has_grad(i) for i in range(len(accumulator.params))]
        exact, maxima = accumulator.fixed, None
        if exact is not None:
            maxima = torch.cat([exact.maxima(), statistics.maxima().to(device)])
        seen, table, maxima = collectives.agree(seen, totals.numbers(), device, maxima=maxima)
        counts, weights, wide = zip(*table, strict=True)
        if not any(counts):
            raise ValueError("chunks is empty: there is no sample to average over")
        if exact is not None:
            shares = maxima.split([len(exact), statistics.width])
            parts = zip((exact, statistics), shares, strict=True)
            if not all([part.fit(share, int(sum(counts))) for part, share in parts]):
                return None
        accumulator.all_reduce_(collectives)
        accumulator.unseen = {i for i, by_any in enumerate(seen) if not by_any}
        accumulator.total_weight = math.fsum(weights)
        self._sum_statistics(statistics, device)
        statistics.commit(accumulator.total_weight)
        if exact is not None:
            accumulator.settle(set())
        loss, square = totals.means(collectives, table, device)
        return loss.to(torch.float64 if any(wide) else torch.float32), square

    def _sum_statistics(self, statistics: RunningStatistics, device: torch.device) -> None:
        """Replace BatchNorm's sums and counts of passes by those of all processes."""
        if self.collectives.is_single or not self._layers:
            return
        statistics.all_reduce_(self.collectives)
        counts = self._counts()
        passes = [now - before for now, before in zip(counts, self._before, strict=True)]
        sums = [*statistics.sums, *statistics.weights]
        parts = [*sums, *passes]
        flat = torch.cat([t.reshape(-1).to(device, torch.float64) for t in parts])
        self.collectives.all_reduce_([flat])
        found = flat.split([t.numel() for t in parts])
        for tensor, part in zip(sums, found[: len(sums)], strict=True):
            tensor.copy_(part.view_as(tensor))
        for count, before, part in zip(counts, self._before, found[len(sums) :], strict=True):
            count.copy_(before + part.view_as(before).to(before))

    def _counts(self) -> list[Tensor]:
        found = (m.num_batches_tracked for m in self._layers)
        return [count for count in found if count is not None]


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse modules that talk to other processes in every pass: shares may be uneven."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model is a DistributedDataParallel, which sums at every chunk: pass the module in "
                "it (model.module), the closure sums once per step"
            )
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                "model has a SyncBatchNorm, which mixes chunks of different processes: use "
                "BatchNorm, whose batch is a chunk; the closure averages its statistics"
            )
