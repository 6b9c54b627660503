"""Lightning's rows of benchmarks.trainers."""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import tiny_language as tiny
from benchmarks.trainers import Task
from fbopt.integrations.lightning import FullBatchLoop, WeightedAccumulation

PRECISION = {torch.float64: "64-true", torch.float32: "32-true", torch.bfloat16: "bf16-true"}


class Module(pl.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.optimizer = task.model, task.optimizer

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def fit(task: Task, window: int, *callbacks: pl.Callback) -> None:
    """Train with ``Trainer(accumulate_grad_batches=window)``."""
    trainer = quiet_trainer(
        precision=PRECISION[task.case.dtype],
        max_epochs=task.case.epochs,
        accumulate_grad_batches=window,
        callbacks=list(callbacks),
    )
    trainer.fit(Module(task), DataLoader(task.batches, batch_size=None))


def quiet_trainer(**arguments: object) -> pl.Trainer:
    """Return a Trainer on the CPU that writes and prints nothing."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(**({"accelerator": "cpu", "devices": 1} | silent | arguments))


WAYS = {
    "Lightning": lambda task: fit(task, task.window),
    "WeightedAccumulation": lambda task: fit(task, task.window, WeightedAccumulation(tiny.targets)),
    "FullBatchLoop": lambda task: fit(task, 1, FullBatchLoop(tiny.targets)),
}
