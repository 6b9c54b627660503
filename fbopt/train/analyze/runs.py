"""Checkpoints of `fbopt train` as objectives to measure: model, loss, chunks, momentum."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbopt.analysis import Objective
from fbopt.train.analyze.options import Analysis
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.resume import check_data, check_model, load, made_with
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError
from fbopt.train.curvature import training_loss
from fbopt.train.data.load import load_for
from fbopt.train.distributed import select_device
from fbopt.train.precision import parameter_dtype, set_arithmetic
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
    folder, state = _state(path)
    trained = made_with(str(path), state)
    if trained.threads is not None:
        torch.set_num_threads(trained.threads)
    data = load_for(replace(trained, download=False))
    check_data(str(path), state["data"], data.sha256(), trained.data)
    device = select_device(options.device)
    data = data.to(device, dtype=parameter_dtype(trained.precision))
    # A few steps at most: not worth the wait for a compiler.
    run = Trainer(replace(trained, compile=False), data, device)
    check_model(str(path), state["model"], run.model.state_dict())
    conditions = {name: getattr(options, name) for name in ("batchnorm", "dropout", "seed")}
    name = f"{folder.resolve().name}, step {state['step']:,}"
    subject = Subject(name, folder, run, training_loss(run, **conditions), state)
    load(str(path), run, copy.deepcopy(state))
    return subject


def _state(path: Path) -> tuple[Path, dict[str, Any]]:
    if path.is_dir():
        folder = RunFolder(path)
        if folder.read_options() is None:
            raise OptionsError(
                f"{path}: is no run's folder, as it has no readable options.json; give a folder "
                "that `fbopt train` made, or a checkpoint file"
            )
        if not folder.checkpoints():
            raise OptionsError(f"{path}: there is no checkpoint in it yet; wait for the first")
        return path, folder.load()
    if not path.exists():
        kept = ", ".join(p.name for _, p in RunFolder(path.parent).checkpoints())
        found = f"; {path.parent} has {kept}" if path.suffix == ".pt" and kept else ""
        raise OptionsError(f"{path}: there is no such folder or file{found}")
    try:
        return path.parent, format.read(path)
    except CheckpointError as error:
        raise OptionsError(f"{path} cannot be measured: {error}") from error
