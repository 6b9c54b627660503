"""The chunks of a full-batch step: this process's batches of the trainer's dataloader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from fbopt._engine.weights import weigh
from fbopt.integrations.lightning.surroundings import pl


class Batches:
    """Iterate over (index, batch on the device, weight).

    Args:
        trainer: whose dataloader it is; one process visits all batches.
        limit: as ``Trainer(limit_train_batches=...)``.
        weight: ``weight(batch)``, or None for the number of samples.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        limit: int | float | None,
        weight: Callable[[Any], float] | None,
    ) -> None:
        self.trainer, self._limit, self._weight = trainer, limit, weight

    def check(self) -> None:
        """Refuse dataloaders of which processes would visit samples twice or never."""
        loader, sampler = self.trainer.train_dataloader, self._sampler()
        if isinstance(loader, (list, tuple, dict)):
            raise RuntimeError("FullBatchLoop takes one train dataloader, not several")
        if self.trainer.world_size == 1:
            return
        if isinstance(sampler, DistributedSampler):
            samples = len(cast("Sized", sampler.dataset))
            if sampler.drop_last or samples % sampler.num_replicas == 0:
                return
            raise RuntimeError(
                f"FullBatchLoop: the sampler repeats some of {samples} samples to give "
                f"{sampler.num_replicas} processes as many, and they would count twice: pass "
                "Trainer(use_distributed_sampler=False), then batches are dealt out instead"
            )
        if not isinstance(sampler, SequentialSampler):
            raise RuntimeError(
                f"FullBatchLoop cannot know whether processes that draw batches with {sampler!r} "
                "visit every sample once: pass a DataLoader with shuffle=False, whose batches are "
                "dealt out, or with a torch.utils.data.DistributedSampler"
            )

    def __iter__(self) -> Iterator[tuple[int, Any, float]]:
        trainer = self.trainer
        module = trainer.lightning_module
        for index, batch in self._own():
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            yield index, batch, weigh(index, batch, self._weight)

    def _own(self) -> Iterator[tuple[int, Any]]:
        """Iterate over the numbered batches of this process."""
        trainer, limit = self.trainer, self._limit
        loader = trainer.train_dataloader
        if isinstance(limit, float):
            limit = None if limit == 1.0 else int(len(loader) * limit)
        batches = islice(enumerate(loader), limit)
        if isinstance(self._sampler(), DistributedSampler):
            return batches
        return islice(batches, trainer.global_rank, None, trainer.world_size)

    def _sampler(self) -> Any:
        """Return what draws the samples; None where that cannot be known."""
        loader = self.trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            return None
        batches = loader.batch_sampler
        sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
        is_plain = batches is None or type(batches) is BatchSampler
        return sampler if is_plain or isinstance(sampler, DistributedSampler) else batches
