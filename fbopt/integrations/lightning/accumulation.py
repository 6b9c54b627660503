"""WeightedAccumulation: an accumulation window's gradient, sum_b w_b g_b / sum_b w_b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fbopt._engine.weights import weigh
from fbopt.accumulate import GradientAccumulator
from fbopt.integrations.lightning.surroundings import (
    check,
    pl,
    processes,
    share_buffers,
    stop_averaging,
)


class WeightedAccumulation(pl.Callback):
    """Weigh the batches of ``Trainer(accumulate_grad_batches=N)`` by their samples or tokens.

    With w_b the weight of batch b and g_b the gradient of the loss that ``training_step`` returns,
    the optimizer's step sees ``sum_b w_b g_b / sum_b w_b`` over the window, also where the window
    is the shorter one at the end of an epoch: the gradient of the mean loss over all samples.
    Lightning's own is ``sum_b g_b / N``. Sums are kept in float32, also for parameters in half
    precision, and ``p.grad`` is None between the batches of a window.

    Gradient clipping, ``on_after_backward`` of the window's last batch and
    ``on_before_optimizer_step`` see the weighted mean. It works with a loss scale
    (``precision="16-mixed"``), ``GradientAccumulationScheduler`` and DDP, where gradients are
    summed over the processes once per window in place of DDP's own averaging; processes may have
    different weights.

    Args:
        weight: ``weight(batch)`` returns what the batch's mean loss is the mean over, such as
            ``lambda batch: (batch["labels"][:, 1:] != -100).sum()``; a number or a tensor of one
            element. By default the number of samples, the length of all the batch's tensors.
        process_group: the processes that have different data; by default all of the trainer's.

    Raises:
        RuntimeError: manual optimization (wrap ``manual_backward`` in
            ``GradientAccumulator.chunk``), a strategy that shards parameters, a training_step that
            takes ``dataloader_iter``, an optimizer that calls the closure more than once per step.

    Example:
        >>> trainer = Trainer(accumulate_grad_batches=8, callbacks=[WeightedAccumulation()])
    """

    def __init__(
        self,
        weight: Callable[[Any], float | Tensor] | None = None,
        *,
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        self.weight, self.process_group = weight, process_group
        self._accumulator: Any = None
        self._chunk: Any = None
        self._added, self._assigned = 0, False
        self._resumed: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what would be weighed wrongly; leave the sums over processes to fbopt."""
        check("WeightedAccumulation", trainer, pl_module)
        stop_averaging(trainer)
        self._group = processes(trainer, self.process_group)
        self._begin(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch's weight."""
        self._weight = weigh(batch_idx, batch, self.weight)
        self._assigned = False

    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin a window: Lightning forgets gradients before the backward of its first batch."""
        self._begin(optimizer)
        self._assigned, self._resumed = False, {}

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Undo Lightning's division by N, and take the gradients as autograd makes them."""
        if self._assigned:
            raise RuntimeError(
                "WeightedAccumulation: the optimizer calls its closure more than once per step, as "
                "LBFGS does, which would count the last batch of the window again: use "
                "FullBatchLoop, or accumulate_grad_batches=1"
            )
        self._resume()
        _undivide(loss, trainer.accumulate_grad_batches)
        self._chunk = self._accumulator.chunk(self._weight)
        self._chunk.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill p.grad where the window ends: before clipping, and before a loss scale is undone."""
        self._close()
        self._added += 1
        if not trainer.fit_loop._should_accumulate():
            self._assign(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Fill p.grad where training_step returned None for the window's last batch."""
        if self._added:
            self._assign(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the parameters."""
        self._close(exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of an open window, which a checkpoint between two steps has to hold."""
        if not self._added:
            return {}
        return {**self._accumulator._open_sums(), "is_whole": self._group is None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of a window, where the checkpoint was saved there."""
        if not state_dict.get("is_whole", True):
            raise RuntimeError(
                "WeightedAccumulation: this checkpoint was saved between two optimizer steps, and "
                "holds the gradients of one process of several: resume from one that was saved "
                "after a step, such as by ModelCheckpoint(every_n_train_steps=...)"
            )
        self._resumed = state_dict

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the sums, and take the parameters that the optimizer has now."""
        params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        known = [] if self._accumulator is None else self._accumulator.params
        if [*map(id, params)] == [*map(id, known)]:
            self._accumulator.reset()
        else:
            self._accumulator = GradientAccumulator(params, process_group=self._group)
        self._added = 0

    def _resume(self) -> None:
        """Take over the sums of a checkpoint from the middle of a window."""
        if not self._resumed:
            return
        saved, now = len(self._resumed["sums"]), len(self._accumulator.params)
        if saved != now:
            raise RuntimeError(
                f"WeightedAccumulation: the checkpoint has open sums of {saved} parameters, and "
                f"{now} are trained now: freeze what was frozen when it was saved"
            )
        self._accumulator._resume(self._resumed)
        self._added, self._resumed = 1, {}

    def _assign(self, trainer: pl.Trainer) -> None:
        self._accumulator.to_grad()
        self._added, self._assigned = 0, True
        share_buffers(trainer)

    def _close(self, exception: BaseException | None = None) -> None:
        chunk, self._chunk = self._chunk, None
        if chunk is not None:
            chunk.__exit__(exception and type(exception), exception, None)


def _undivide(loss: Tensor, batches: int) -> None:
    """Let the backward of ``loss / batches`` give the gradients of ``loss``: N / N = 1 is exact."""
    if batches == 1:
        return
    if torch.tensor(batches, dtype=loss.dtype).item() != batches:
        raise ValueError(
            f"accumulate_grad_batches={batches} has no exact value in the loss's {loss.dtype}: "
            "return the loss from training_step in float32"
        )
    loss.register_hook(lambda grad: grad * batches)  # type: ignore[no-untyped-call]
