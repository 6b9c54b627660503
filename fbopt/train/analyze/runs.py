"""Checkpoints of `fbopt train` as objectives to measure: model, loss, chunks, momentum."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbopt.analysis import Objective
from fbopt.train.analyze.options import Analysis
from fbopt.train.checkpoint.resume import load
from fbopt.train.curvature import training_loss
from fbopt.train.precision import set_arithmetic
from fbopt.train.reopen import open_run, read_run
from fbopt.train.trainer import Trainer

# The means of gradients in the state of update rules; the others' momenta are of their steps.
MEANS = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg",),
    "adamw": ("exp_avg",),
    "muon": ("momentum_buffer", "exp_avg"),
}


@dataclass
class Subject:
    """A checkpoint to measure.

    Attributes:
        name: its name in results and figures.
        folder: the run's folder.
        run: the run at the checkpoint's step.
        objective: its loss.
        state: the content of the checkpoint.
    """

    name: str
    folder: Path
    run: Trainer
    objective: Objective
    state: dict[str, Any]

    @property
    def momentum(self) -> list[Tensor | None] | None:
        """The mean of gradients that the update rule keeps of each parameter; None if it keeps
        none.
        """
        states, names = self.run.optimizer.state, MEANS.get(self.run.options.optimizer, ())
        found = [states.get(p, {}) for p in self.objective.params]
        buffers = [next((s[n] for n in names if n in s), None) for s in found]
        return None if all(b is None for b in buffers) else buffers

    @property
    def has_labels(self) -> bool:
        """Whether the run's loss is a cross-entropy, so that the model has labels of its own."""
        return self.run.options.loss == "cross-entropy"

    def pass_seconds(self, steps: int) -> float:
        """The median time of a pass of training; restores the run afterwards."""
        self.set_precision()
        times = []
        for _ in range(steps + 1):  # the first warms up
            start = time.perf_counter()
            self.run.take_step()
            while self.run.position[1]:  # an epoch of SGD has several steps
                self.run.take_step()
            if self.run.device.type == "cuda":
                torch.cuda.synchronize(self.run.device)
            times.append(time.perf_counter() - start)
        self.load()
        return statistics.median(times[1:])

    def load(self) -> None:
        """Restore the run to the checkpoint."""
        self.run.load_state_dict(copy.deepcopy(self.state))  # optimizers keep and change tensors

    def set_precision(self) -> None:
        """Let CUDA multiply float32 numbers as this run did; the setting is one per process."""
        set_arithmetic(self.run.options.precision, self.run.device)


def read(path: Path, options: Analysis) -> Subject:
    """Read the newest readable checkpoint of a run folder, or one checkpoint file.

    Raises:
        OptionsError: no run, no readable checkpoint, or other data or another model than the run's.
    """
    folder, state, made = read_run(path)
    run = open_run(path, state, made, options.device)
    conditions = {name: getattr(options, name) for name in ("batchnorm", "dropout", "seed")}
    name = f"{folder.resolve().name}, step {state['step']:,}"
    load(str(path), run, copy.deepcopy(state))
    loss = training_loss(run, options.penalised, **conditions)
    return Subject(name, folder, run, loss, state)
