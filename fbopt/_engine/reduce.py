"""The end of a step: means over the chunks of all processes, sum_c w_c x_c / sum_c w_c, from what
each process has summed over its own. A single process only divides.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fbopt._checks import refuse_flattened
from fbopt._distributed import Collectives
from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.fully_sharded import FullySharded
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.lockstep import Lockstep
from fbopt._engine.processes import Comparison, combine_sums
from fbopt._ops.sums import Sums


class Means(NamedTuple):
    """Means over all chunks, 0-dim; zero, or None, where no norm was noted or needed.

    Attributes:
        loss: of the losses.
        square: of ``||g||^2``, float64.
        norm: of ``||g||``, float64.
    """

    loss: Tensor
    square: Tensor | None = None
    norm: Tensor | None = None


class Reduction:
    """Collects the losses of a step's chunks, and reduces all sums over the processes of a group.

    Args:
        model: the module that is trained.
        sums: of its gradients.
        statistics: of its normalisation layers.
        group: as for :class:`Collectives`.
        sharded: the modules that FSDP2 has sharded.

    Raises:
        TypeError, ValueError: a group or model that cannot be used; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        sums: GradientSums,
        statistics: RunningStatistics,
        group: Any,
        sharded: FullySharded,
    ) -> None:
        self._sums, self._statistics = sums, statistics
        self.collectives = Collectives(group)
        self.collectives.refuse_unknown_processes(sums.params)
        _refuse_wrapped(model, self.collectives.is_single)
        self._comparison = Comparison(self.collectives, sums, model)
        self.sharded, self.needs_norms = sharded, False
        self.follow_params(model)

    def follow_params(self, model: nn.Module) -> None:
        """Note how parameters are sharded, which may be others than before."""
        if getattr(self, "_followed", None) is not self._sums.buckets:
            self.sharded.check_complete(model)
            averaged = self.sharded.averaged
            self.lockstep = Lockstep(self._sums.params, self.collectives, averaged)
            self._comparison.is_joint = self.lockstep.is_joint
            self._followed = self._sums.buckets

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        """Report an error in this process to the others, which would wait in :meth:`begin`."""
        if not self.collectives.is_single:
            return self._preparing()
        self.collectives.refuse_unknown_processes(self._sums.params)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _preparing(self) -> Iterator[None]:
        with self._comparison.reporting():
            self.collectives.refuse_unknown_processes(self._sums.params)
            yield

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
        facts["the modes of normalisation layers (E: eval, T: training)"] = self._statistics.modes
        self._comparison(facts)

    @property
    def _stores(self) -> tuple[Sums, Sums]:
        return self._sums.store, self._statistics.store

    @contextlib.contextmanager
    def visiting(self, apart: bool) -> Iterator[None]:
        """Begin a visit of all chunks; an error in it reaches the others in :meth:`combine`.

        Not one within a chunk that processes visit together: they meet in its collectives, where
        they learn that this process has ended.

        Args:
            apart: exact sums may add the gradients of FSDP2's processes one by one.
        """
        self._losses: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._weights: list[float] = []
        try:
            if self.sharded and self._sums.accumulation == "exact":
                with self.sharded.exactly(apart and self.lockstep.is_joint):
                    yield
            else:
                yield
        except Exception as error:
            if self.lockstep.is_joint:  # which has told the others, or they wait in the chunk
                raise
            params, numbers = self._sums.params, len(self._counts())
            width = sum(store.width for store in self._stores)
            maxima = torch.zeros(width, dtype=torch.float64, device=params[0].device)
            self.collectives.report_error(error, len(params), numbers, params[0].device, maxima)
            raise

    def add(self, loss: Tensor, square: Tensor | None, weight: float) -> None:
        """Note a chunk's loss, ||g||^2 and weight; nothing is read from the device."""
        if not weight:  # in step with processes whose chunks count; the loss may be NaN
            return
        self._losses.append(loss)
        self._weights.append(weight)
        if square is not None:
            self._squares.append(square)

    def _counts(self) -> list[float]:
        """How many chunks, their weight, and whether a loss is float64."""
        wide = any(loss.dtype == torch.float64 for loss in self._losses)
        return [len(self._losses), math.fsum(self._weights), wide]

    def combine(self) -> Means | None:
        """Reduce over the processes: sums of gradients, and means of BatchNorm's statistics.

        Exact sums become means. Returns the means of the losses and of gradient norms; or None
        where the units of exact sums did not fit, and all chunks have to be visited again.

        Raises:
            PeerError: another process failed.
            ValueError: no process had a chunk.
        """
        sums, statistics = self._sums, self._statistics
        counts, joint = self._counts(), self.lockstep.is_joint
        found = combine_sums(
            sums, self.collectives, counts, _nothing(), statistics.store, is_joint=joint
        )
        if found is None:
            return None
        statistics.all_reduce_(self.collectives)
        statistics.commit(sums.total_weight)
        return self._means(found.table)

    def mean_loss(self, losses: Iterable[tuple[Tensor, float]]) -> Tensor:
        """The mean of losses by their weights, over all processes; an error reaches the others."""
        self._losses, self._squares, self._weights = [], [], []
        device = self._sums.buckets.device(0)
        try:
            for loss, weight in losses:
                self.add(loss, None, weight)
        except Exception as error:
            self.collectives.report_error(error, 0, len(self._counts()), device)
            raise
        found = self.collectives.agree([], self._counts(), device)
        if not any(row[0] for row in found.table):
            raise _nothing()
        return self._means(found.table).loss

    def _means(self, table: Sequence[Sequence[float]]) -> Means:
        """The means, from the counts of all processes."""
        everyones, weights, wide = zip(*table, strict=True)
        total = math.fsum(weights)
        dtype = torch.float64 if any(wide) else torch.float32
        if self.collectives.is_single and _lie_on_host(self._losses, self._squares):
            mean = _sum_on_host(self._losses, self._weights) / total
            loss = torch.scalar_tensor(mean, dtype=dtype)
            if not self._squares:
                return Means(loss)
            kinds = self._squares, self._norms()
            found = [_sum_on_host(v, self._weights) / total for v in kinds]
            return Means(loss, *(torch.scalar_tensor(v, dtype=torch.float64) for v in found))
        device = self._sums.params[0].device
        loss, *norms = self._means_of_all([int(n) for n in everyones], total, device)
        return Means(loss.to(dtype), *norms)

    def _norms(self) -> list[Tensor]:
        return [square.sqrt() for square in self._squares] if self.needs_norms else []

    def _means_of_all(
        self, counts: list[int], total_weight: float, device: torch.device
    ) -> list[Tensor]:
        """The means of losses, of ||g||^2 and of ||g|| over all chunks, 0-dim, float64.

        The products are sorted before they are added: the order of the chunks does not matter.
        """
        kinds = self._losses, self._squares, self._norms()
        found = [_products(v, self._weights) for v in kinds]
        if not self.collectives.is_single:
            rows = torch.zeros(3, len(self._losses), dtype=torch.float64, device=device)
            for row, products in zip(rows, found, strict=True):
                row[: len(products)] = products
            found = list(self.collectives.all_gather(rows, counts))
        return [products.sort().values.sum() / total_weight for products in found]


def _nothing() -> ValueError:
    return ValueError(
        "chunks is empty, or every chunk has weight 0: there is no sample to average over"
    )


def _products(values: list[Tensor], weights: list[float]) -> Tensor:
    """Weight times value of each chunk, in float64."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.stack(values).double()
    return torch.stack(torch._foreach_mul(list(wide.unbind()), weights))


def _lie_on_host(*values: list[Tensor]) -> bool:
    return all(map(operator.attrgetter("is_cpu"), itertools.chain(*values)))


def _sum_on_host(values: list[Tensor], weights: list[float]) -> float:
    """The sum of the sorted products, the same bits with few small operations."""
    products = sorted(map(operator.mul, map(Tensor.item, values), weights))
    if len(products) < 2:
        return products[0] if products else 0.0
    return torch.tensor(products, dtype=torch.float64).sum().item()


def _refuse_wrapped(model: nn.Module, is_single: bool) -> None:
    """Refuse modules that talk to other processes in every pass: shares may be uneven."""
    refuse_flattened(model.parameters(), "FullBatchClosure", "train with plain backward passes")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model is a DistributedDataParallel, which averages in .backward() alone, at every "
                "chunk: pass the module in it (model.module) with process_group=, the closure sums "
                "once per step; or pass backward=True, which does that by itself"
            )
        if isinstance(module, nn.SyncBatchNorm) and not is_single:
            raise ValueError(
                "model has a SyncBatchNorm, which mixes chunks of different processes: use "
                "BatchNorm, whose batch is a chunk; the closure averages its statistics"
            )
