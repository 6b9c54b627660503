"""The end of a step: means over the chunks of all processes, sum_c w_c x_c / sum_c w_c, from what
each process has summed over its own. A single process only divides.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._distributed import Collectives, checksum
from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.gradient_sums import GradientSums
from fbopt._ops.sums import Sums


class Reduction:
    """Collects the losses of a step's chunks, and reduces all sums over the processes of a group.

    Args:
        model: the module that is trained.
        sums: of its gradients.
        statistics: of its normalisation layers.
        group: as for :class:`Collectives`.

    Raises:
        TypeError, ValueError: a group or model that cannot be used; the message says why.
    """

    def __init__(
        self, model: nn.Module, sums: GradientSums, statistics: RunningStatistics, group: Any
    ) -> None:
        self._sums, self._statistics = sums, statistics
        self.collectives = Collectives(group)
        devices = {p.device for p in sums.params}
        self.collectives.check_devices(devices)
        if not self.collectives.is_single:
            _refuse_wrapped(model)
        self._device = min(devices, key=str)
        self._compared: object = None
        self._model = model

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Report an error in this process to the others, which would wait in :meth:`begin`."""
        try:
            yield
        except Exception as error:
            self.collectives.report_error(error, 1, 1, self._device)
            raise

    def begin(self, **facts: Any) -> None:
        """Check before the first chunk that the processes agree; compare new parameters, too.

        Args:
            **facts: what else has to be the same on all processes.

        Raises:
            PeerError: another process failed.
            ValueError: the processes differ in parameters, training modes or a fact.
        """
        if self.collectives.is_single:
            return
        self._statistics.count_passes()
        sums, modes = self._sums, self._statistics.modes
        layout = repr((facts, modes, [(p.dtype, p.shape) for p in sums.params]))
        new, number = self._compared is not sums.buckets, zlib.crc32(layout.encode())
        found = self.collectives.agree([new], [number], self._device)
        if found.flags[0] or any(row != found.table[0] for row in found.table):
            facts["the modes of normalisation layers (E: eval, T: training)"] = modes
            self.collectives.check_same(
                facts | self._describe(),
                "build the same model on all, and load or broadcast the same parameters",
            )
            self._compared = sums.buckets

    @property
    def _stores(self) -> tuple[Sums, Sums]:
        return self._sums.store, self._statistics.store

    def _describe(self) -> dict[str, str]:
        params = self._sums.params
        names = {id(p): name for name, p in self._model.named_parameters()}
        found = {"the number of parameters": str(len(params))}
        for i, (p, bits) in enumerate(zip(params, checksum(params), strict=True)):
            name = f"parameter {i} ({names.get(id(p), 'unnamed')})"
            found[name] = f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}, checksum {bits},"
        return found

    @contextlib.contextmanager
    def visiting(self) -> Iterator[None]:
        """Begin a visit of all chunks; an error in it reaches the others in :meth:`combine`."""
        self._losses: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._weights: list[float] = []
        try:
            yield
        except Exception as error:
            params, numbers = self._sums.params, len(self._counts())
            width = sum(store.width for store in self._stores)
            maxima = torch.zeros(width, dtype=torch.float64, device=params[0].device)
            self.collectives.report_error(error, len(params), numbers, params[0].device, maxima)
            raise

    def add(self, loss: Tensor, square: Tensor | None, weight: float) -> None:
        """Note a chunk's loss, ||g||^2 and weight; nothing is read from the device."""
        self._losses.append(loss)
        self._weights.append(weight)
        if square is not None:
            self._squares.append(square)

    def _counts(self) -> list[float]:
        """How many chunks, their weight, and whether a loss is float64."""
        wide = any(loss.dtype == torch.float64 for loss in self._losses)
        return [len(self._losses), math.fsum(self._weights), wide]

    @torch.no_grad()
    def combine(self) -> tuple[Tensor, Tensor] | None:
        """Reduce over the processes: sums of gradients, and means of BatchNorm's statistics.

        Exact sums become means. Returns the mean loss and the mean of ||g||^2 (0 where none was
        noted), 0-dim; or None where the units of exact sums did not fit, and all chunks have to be
        visited again.

        Raises:
            PeerError: another process failed.
            ValueError: no process had a chunk.
        """
        sums, statistics, device = self._sums, self._statistics, self._sums.params[0].device
        seen = [i not in sums.unseen for i in range(len(sums.params))]
        widths, maxima = [store.width for store in self._stores], None
        if any(widths):
            own = sums.maxima(), statistics.store.maxima()
            maxima = torch.cat([m.to(device) for m in own])
        found = self.collectives.agree(seen, self._counts(), device, maxima=maxima)
        counts, weights, wide = zip(*found.table, strict=True)
        if not any(counts):
            raise ValueError("chunks is empty: there is no sample to average over")
        if found.maxima is not None:
            pairs = zip(self._stores, found.maxima.split(widths), strict=True)
            if not all([store.fit(share, int(sum(counts))) for store, share in pairs]):
                return None
        sums.store.all_reduce_(self.collectives)
        sums.unseen = {i for i, by_any in enumerate(found.flags) if not by_any}
        sums.total_weight = math.fsum(weights)
        sums.finish()
        statistics.all_reduce_(self.collectives)
        statistics.commit(sums.total_weight)
        loss, square = self._means([int(n) for n in counts], sums.total_weight, device)
        return loss.to(torch.float64 if any(wide) else torch.float32), square

    def _means(
        self, counts: list[int], total_weight: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The means of losses and of ||g||^2 over all chunks, 0-dim, float64.

        The products are sorted before they are added: the order of the chunks does not matter.
        """
        losses, squares = (_products(v, self._weights) for v in (self._losses, self._squares))
        if not self.collectives.is_single:
            rows = torch.zeros(2, len(self._losses), dtype=torch.float64, device=device)
            for row, products in zip(rows, (losses, squares), strict=True):
                row[: len(products)] = products
            losses, squares = self.collectives.all_gather(rows, counts)
        return losses.sort().values.sum() / total_weight, squares.sort().values.sum() / total_weight


def _products(values: list[Tensor], weights: list[float]) -> Tensor:
    """Weight times value of each chunk, in float64."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.stack(values).double()
    return torch.stack(torch._foreach_mul(list(wide.unbind()), weights))


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
