"""Lightning's rows of benchmarks.trainers."""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import trainers
from fbopt.integrations.lightning import WeightedAccumulation

MORE = (trainers.BFLOAT16,)


class Module(pl.LightningModule):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.network = case, trainers.model(case)
        self.gradient_error = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return trainers.loss_fn(self.network(x), labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.case == trainers.BFLOAT16:
            self.gradient_error = trainers.gradient_error(self.network, self.case)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=trainers.LR)


def run(case: str, ours: bool) -> float:
    """Train with ``Trainer(accumulate_grad_batches=...)`` and return the error."""
    windows = trainers.windows(case)
    module = Module(case)
    trainer = quiet_trainer(
        precision="bf16-true" if case == trainers.BFLOAT16 else "64-true",
        max_epochs=1,
        accumulate_grad_batches=len(windows[0]),
        callbacks=[WeightedAccumulation(lambda batch: trainers.tokens(batch[1]))] if ours else [],
    )
    batches = [batch for window in windows for batch in window]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.gradient_error or trainers.error(module.network, case)


def quiet_trainer(**arguments: object) -> pl.Trainer:
    """Return a Trainer on the CPU that writes and prints nothing."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(**({"accelerator": "cpu", "devices": 1} | silent | arguments))
