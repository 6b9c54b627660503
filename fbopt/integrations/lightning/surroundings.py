"""What both callbacks have to know of the Trainer: what they refuse, processes, DDP's averaging."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

__all__ = ["check", "pl", "processes", "share_buffers", "stop_averaging"]
# By name, as subclasses of both libraries have them.
STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}


def check(callback: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse surroundings in which the callback's numbers would be wrong."""
    if not module.automatic_optimization:
        raise RuntimeError(
            f"{callback} works with automatic optimization; with manual optimization use "
            "fbopt.GradientAccumulator or fbopt.FullBatchClosure in training_step"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RuntimeError(
            f"{callback} has to see every batch: let training_step take (batch, batch_idx), not "
            "dataloader_iter"
        )
    strategy = trainer.strategy
    known = STRATEGIES.intersection(base.__name__ for base in type(strategy).__mro__)
    if not known or strategy.handles_gradient_accumulation:
        raise RuntimeError(
            f"{callback} works on one device and with DDP, not with {type(strategy).__name__}: "
            "pass Trainer(strategy='ddp'), or use fbopt.GradientAccumulator in a loop of your own"
        )


def processes(trainer: pl.Trainer, given: Any) -> Any:
    """Return the process group to sum over: the given one, or the trainer's processes."""
    several = given is None and trainer.world_size > 1
    return torch.distributed.group.WORLD if several else given


def stop_averaging(trainer: pl.Trainer) -> None:
    """Keep DDP from averaging gradients, which are summed by their weights instead."""
    model: Any = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False


def share_buffers(trainer: pl.Trainer) -> None:
    """Let DDP's next forward pass share the first process's buffers, as after its averaging."""
    model: Any = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_forward_param_sync = True
