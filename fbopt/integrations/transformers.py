"""Transformers' Trainer, with the gradient of a step the mean over all its tokens or samples:
g = sum_c n_c g_c / N over the micro-batches c of all processes, through FullBatchClosure.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import Trainer

from fbopt.closure import FullBatchClosure
from fbopt.penalty import GradientPenalty
from fbopt.sharpness import SharpnessAware

STATE = "fbopt.pt"
# Overridden below: what another version of Trainer does not call would be left out without a word.
OVERRIDDEN = (
    *("get_batch_samples", "set_initial_training_values", "_prepare_for_training"),
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
)


class WeightedTrainer(Trainer):
    """Transformers' Trainer, whose steps weigh micro-batches by their labels.

    With n_c labels (other than -100) in micro-batch c, mean losses L_c with gradients g_c, and N
    the sum of n_c over the micro-batches of a step, of all processes::

        loss    L = sum_c (n_c / N) L_c
        p.grad    = sum_c (n_c / N) g'_c          g'_c = g_c, or with a penalty g_c + lambda H_c g_c

    whatever the model makes of ``num_items_in_batch``, and of a label smoother, a
    ``compute_loss_func`` or an overridden ``compute_loss``. Sums are kept in float32 where the
    parameters are bfloat16. Several processes add up once per step, every sample once: where
    Trainer repeats samples to make shards equal, a process visits fewer. Trainer then clips
    (``max_grad_norm``), steps, schedules, logs and saves as always; checkpoints hold the closure's
    state in ``fbopt.pt``. For a subclass of Trainer: ``class Mine(WeightedTrainer, OtherTrainer)``.

    Args:
        penalty, accumulation, chunk_max_norm, backward: as for :class:`fbopt.FullBatchClosure`; a
            micro-batch is a chunk. Reentrant checkpointing needs ``backward=True``.
        args, kwargs: as for the trainer.

    Attributes:
        closure: the :class:`fbopt.FullBatchClosure` of the last ``train()``, or None.

    Raises:
        ValueError: a set-up in which the gradients would be wrong: fp16, FSDP, DeepSpeed, tensor or
            sequence parallelism, an optimizer that steps during the backward pass, several
            processes that share an iterable dataset.
    """

    def __init__(
        self,
        *args: Any,
        penalty: GradientPenalty | SharpnessAware | None = None,
        accumulation: str = "float32",
        chunk_max_norm: float | None = None,
        backward: bool = False,
        **kwargs: Any,
    ) -> None:
        self.closure: Any = None
        self._options: dict[str, Any] = {
            "penalty": penalty,
            "accumulation": accumulation,
            "chunk_max_norm": chunk_max_norm,
            "backward": backward,
        }
        self._window: list[Any] = []
        self._counted = False
        self._skips: bool | None = None
        self._loaded: Mapping[str, Any] | None = None
        super().__init__(*args, **kwargs)
        _refuse(self)

    def chunk_weight(self, inputs: Mapping[str, Any]) -> int:
        """Return n_c, the number of labels, or without labels of samples; override it for others.

        It has to be what the loss of a micro-batch is the mean over. Causal language models leave
        the first label of a sequence out: whether this one does is tried out once.
        """
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs.get("labels")
            if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
                labels = labels[:, 1:] if self._skips_first_label(inputs) else labels
        if not isinstance(labels, Tensor):
            return int(find_batch_size(inputs))
        return int(labels.ne(-100).sum())

    @torch.no_grad()
    def _skips_first_label(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the loss of labels of which only the first of each sequence counts is empty."""
        if self._skips is None:
            model, labels = self.closure.model, inputs["labels"]
            only = torch.full_like(labels, -100)
            only[:, 0] = labels.max().clamp(min=0)
            count = torch.ones((), device=self.args.device) if self.compute_loss_func else None
            model.eval()
            try:
                loss = self._loss(model, {**inputs, "labels": only}, count)
            finally:
                model.train()
            self._skips = not (loss > 0 and loss.isfinite())  # the mean of none is NaN, the sum 0
        return self._skips

    def get_train_dataloader(self) -> Any:
        """Return the trainer's; no process repeats samples of another."""
        loader = super().get_train_dataloader()
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, BatchSamplerShard):
            sampler.__class__ = _UnevenShard
        elif self.accelerator.num_processes > 1:
            raise ValueError(
                "train_dataset is iterable, or dispatch_batches is set: processes would then "
                "repeat samples; use a dataset with a length, and dispatch_batches=False"
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return a step's micro-batches, empty ones where this process has fewer than others."""
        with _set(self.args, average_tokens_across_devices=False):  # each counts its own
            found, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window, self._counted = list(found), count is not None
        if found or self.accelerator.num_processes > 1:
            name = getattr(self.model, "main_input_name", "input_ids")
            empty = {name: torch.zeros(0, dtype=torch.long)}
            found = found + [empty] * (num_batches - len(found))
        return found, count

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Fill ``p.grad`` and return the mean loss at the last micro-batch, else return 0."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self.closure.chunks = self._window
        mean: Tensor = self.closure()
        return mean

    def _mean_loss(self, model: nn.Module, chunk: Mapping[str, Any]) -> Tensor:
        weight = self.chunk_weight(chunk) if self._counted else None
        count = None if weight is None else torch.tensor(weight, device=self.args.device)
        return self._loss(model, chunk, count)

    def _loss(self, model: nn.Module, chunk: Mapping[str, Any], count: Tensor | None) -> Tensor:
        inputs = self._prepare_inputs(chunk)  # a new mapping: compute_loss may take labels out
        with (
            _set(self.args, average_tokens_across_devices=False),
            self.compute_loss_context_manager(),
        ):
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._loaded = self._skips = None
        model, loader = super()._prepare_for_training(*args, **kwargs)
        _refuse(self)
        several = self.accelerator.num_processes > 1
        self.closure = FullBatchClosure(
            self.accelerator.unwrap_model(model),
            evaluate=self._mean_loss,
            chunks=self._window,
            weight=self.chunk_weight,
            optimizer=self.optimizer,
            process_group=torch.distributed.group.WORLD if several else None,
            **self._options,
        )
        if self._loaded is not None:
            self.closure.load_state_dict(self._loaded)
        return model, loader

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.closure is not None:
            torch.save(self.closure.state_dict(), os.path.join(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", STATE)
        if checkpoint is not None and os.path.isfile(path):
            self._loaded = torch.load(path, map_location="cpu", weights_only=True)


class FullBatchTrainer(WeightedTrainer):
    """A :class:`WeightedTrainer` that makes one step an epoch, of the whole training set.

    ``per_device_train_batch_size`` is the size of a chunk; ``args.gradient_accumulation_steps`` is
    set to the number of chunks.
    """

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Accumulate over all micro-batches of an epoch."""
        args.gradient_accumulation_steps = len(dataloader)
        return super().set_initial_training_values(args, dataloader)


class _UnevenShard(BatchSamplerShard):
    """A process's batches without repeated samples; the length is still that of the longest."""

    def __iter__(self) -> Iterator[list[int]]:
        shard = copy.copy(self)
        shard.even_batches = False
        yield from BatchSamplerShard.__iter__(shard)


@contextlib.contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(before)


def _refuse(trainer: Any) -> None:
    """Raise ValueError for set-ups whose gradients would be wrong."""
    sizes = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    missing = [name for name in OVERRIDDEN if not hasattr(Trainer, name)]
    for found, what, cure in (
        (missing, f"Trainer has no {', '.join(missing)} any more", "install transformers 5.24"),
        (trainer.accelerator.scaler is not None, "fp16 scales the losses", "set bf16=True instead"),
        (
            trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or max(sizes) > 1,
            "FSDP, DeepSpeed and tensor or sequence parallelism reduce gradients themselves",
            "use GradientAccumulator in a loop of your own, see the guide on processes",
        ),
        (
            "lomo" in optim or "layerwise" in optim,
            f"optim={optim!r} steps during the backward pass, before the mean is known",
            "choose another optimizer",
        ),
    ):
        if found:
            raise ValueError(f"{type(trainer).__name__}: {what}: {cure}")
