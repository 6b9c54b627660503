"""FullBatchLoop: one optimizer step per epoch, on the full-batch gradient of the dataloader."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fbopt.closure import FullBatchClosure
from fbopt.integrations.lightning.batches import Batches
from fbopt.integrations.lightning.surroundings import check, pl, processes, stop_averaging
from fbopt.integrations.lightning.training_steps import TrainingSteps


class FullBatchLoop(pl.Callback):
    """Make one optimizer step per epoch, on the full-batch gradient over the train dataloader.

    The module stays as it is: ``training_step(batch, batch_idx)`` returns the batch's mean loss,
    and a :class:`fbopt.FullBatchClosure` calls it, whose chunks are the dataloader's batches.
    For Lightning the epoch is a single batch, whose loss is the full-batch loss: clipping,
    schedulers, ``trainer.global_step``, ``max_epochs``, checkpoints and any optimizer, also LBFGS,
    work as usual. ``trainer.limit_train_batches`` is 1 meanwhile; what it was limits the chunks.

    What ``training_step`` logs is averaged over the batches by their weights, and logged once per
    epoch. It runs at perturbed parameters also where there is a penalty; what it logs there, and
    updates of torchmetrics, do not count.

    Under DDP each process visits its own batches, and the sums go over all processes. With
    ``Trainer(use_distributed_sampler=False)`` and no shuffling the batches themselves are dealt
    out, and the result is that of one process. With Lightning's sampler a process makes its batches
    from its own samples, which is refused where it would repeat some to make shares even.

    Args:
        weight: ``weight(batch)`` returns n_c; by default the number of samples.
        loss_name: the name under which the full-batch loss is logged; None does not log it.
        options: further arguments of :class:`fbopt.FullBatchClosure`: ``penalty``,
            ``accumulation``, ``chunk_max_norm``, ``chunk_norms``, ``process_group``, and
            ``backward=True`` for modules with reentrant checkpointing.

    Attributes:
        closure: the :class:`fbopt.FullBatchClosure` at work; Lightning's checkpoints hold its
            state.

    Raises:
        TypeError: an option that the closure does not have, or that the loop sets itself.
        RuntimeError: manual optimization, gradient accumulation, a loss scale (``"16-mixed"``), a
            strategy that shards parameters, batches that processes would visit twice.

    Example:
        >>> loop = FullBatchLoop(penalty=GradientPenalty(), accumulation="exact")
        >>> Trainer(max_epochs=300, callbacks=[loop]).fit(module, train_dataloader)
    """

    OPTIONS = (
        "penalty",
        "accumulation",
        "chunk_max_norm",
        "chunk_norms",
        "backward",
        "process_group",
    )

    def __init__(
        self,
        weight: Callable[[Any], float] | None = None,
        *,
        loss_name: str | None = "full_batch_loss",
        **options: Any,
    ) -> None:
        if unknown := set(options).difference(self.OPTIONS):
            raise TypeError(
                f"FullBatchLoop passes {', '.join(self.OPTIONS)} on to its closure, not "
                f"{', '.join(sorted(unknown))}"
            )
        self.weight, self.loss_name, self.options = weight, loss_name, options
        self.closure: FullBatchClosure | None = None
        self._limit: int | float | None = None
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let an epoch be one batch to Lightning."""
        if stage == "fit" and trainer.limit_train_batches:
            self._limit, trainer.limit_train_batches = trainer.limit_train_batches, 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the closure, or refuse what it cannot do."""
        check("FullBatchLoop", trainer, pl_module)
        if trainer.accumulate_grad_batches != 1:
            raise RuntimeError(
                "FullBatchLoop makes one step over all batches: leave out accumulate_grad_batches"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise RuntimeError(
                "FullBatchLoop: precision='16-mixed' scales the loss of one backward pass, and the "
                "closure makes many: use precision='bf16-mixed'"
            )
        stop_averaging(trainer)
        if self.closure is not None and self.closure.model is pl_module and not self._state:
            self._state = self.closure.state_dict()
        self._steps = TrainingSteps(pl_module)
        self._batches = Batches(trainer, self._limit, self.weight)
        options = dict(self.options)
        options["process_group"] = processes(trainer, options.get("process_group"))
        self.closure = FullBatchClosure(
            pl_module,
            chunks=self._batches,
            evaluate=self._steps.evaluate,
            weight=None if self.weight is None else itemgetter(2),
            optimizer=trainer.optimizers[0],
            autocast=torch.bfloat16 if trainer.precision == "bf16-mixed" else None,
            on_pass_start=self._steps.begin_pass,
            **options,
        )
        if self._state:
            self.closure.load_state_dict(self._state)
        self._state = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse dataloaders of which processes would visit samples twice or never."""
        self._batches.check()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the closure in the place of the module's training_step, for this step only."""
        self._steps.replace(self._step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *ignored: Any
    ) -> None:
        """Give the module its own training_step back."""
        self._steps.restore()

    def on_exception(self, trainer: pl.Trainer, *ignored: Any) -> None:
        """Leave module and trainer as they were."""
        if self.closure is not None:
            self._steps.restore()
        self._set_limit_back(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        self._set_limit_back(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the closure's state, for Lightning's checkpoints."""
        return {} if self.closure is None else self.closure.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint once training starts."""
        self._state = state_dict

    def _step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the full-batch loss, whose backward fills p.grad."""
        assert self.closure is not None
        trainer, counts = self._batches.trainer, self._steps.none_yet
        with torch.autocast(trainer.strategy.root_device.type, enabled=False):
            loss = self.closure.accumulate()  # whose autocast is its own
        if self.loss_name is not None and counts:
            name = self.loss_name
            trainer.lightning_module.log(name, loss, on_step=False, on_epoch=True, batch_size=1)
        loss = loss.detach().requires_grad_()
        loss.register_hook(self._assign)  # type: ignore[no-untyped-call]
        return loss

    def _assign(self, gradient_of_loss: Tensor) -> None:
        assert self.closure is not None
        self.closure.assign()

    def _set_limit_back(self, trainer: pl.Trainer) -> None:
        if self._limit is not None:
            trainer.limit_train_batches, self._limit = self._limit, None
