"""A checkpoint of a run of `fbopt train` as something to measure: model, loss, chunks, momentum."""

from __future__ import annotations

import copy
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbopt.analysis.objective import Objective
from fbopt.train.analyze.options import Analysis
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.resume import check_data, check_model
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.dataset import Chunks
from fbopt.train.data.load import load
from fbopt.train.distributed import World
from fbopt.train.trainer import Run


@dataclass
class Subject:
    """A checkpoint that was read.

    Attributes:
        name: what it is called in results and figures.
        folder: the run's.
        step: of the checkpoint.
        run: the run at that step.
        objective: its loss.
        state: what the checkpoint holds.
    """

    name: str
    folder: Path
    step: int
    run: Run
    objective: Objective
    state: dict[str, Any]

    @property
    def rule(self) -> dict[str, float | bool]:
        """Learning rate, momentum and weight decay of the next step."""
        group = self.run.optimizer.param_groups[0]
        names = ("lr", "momentum", "nesterov", "dampening", "weight_decay")
        return {
            name: value if isinstance(value := group[name], bool) else float(value)
            for name in names
        }

    @property
    def momentum(self) -> list[Tensor | None] | None:
        """The momentum buffers by parameter; None where there are none."""
        states = self.run.optimizer.state
        buffers = [states.get(p, {}).get("momentum_buffer") for p in self.objective.params]
        return None if all(b is None for b in buffers) else buffers

    def pass_seconds(self, steps: int) -> float:
        """The median time of a pass of training over all samples; the run is then put back."""
        times = []
        for _ in range(steps + 1):  # the first finds cold caches
            start = time.perf_counter()
            for _ in range(self.run.steps_per_pass):
                self.run.take_step()
            self._wait()
            times.append(time.perf_counter() - start)
        self.load()
        return statistics.median(times[1:])

    def load(self) -> None:
        """Bring the run to what the checkpoint holds, of which its steps change nothing."""
        self.run.load_state_dict(copy.deepcopy(self.state))  # torch's optimizers keep the tensors

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def read(path: Path, options: Analysis) -> Subject:
    """Read a run folder's newest sound checkpoint, or one checkpoint file.

    Raises:
        OptionsError: no run, no sound checkpoint, other data or another model than it was made of.
    """
    folder, state = _state(path)
    try:
        trained = Options.from_json(state["options"])
    except TypeError as error:
        made = state.get("environment", {}).get("fbopt", "another version")
        text = f"{path} was made by fbopt {made}, which has other options ({error})"
        raise OptionsError(f"{text}; measure it with that version") from error
    if trained.threads is not None:
        torch.set_num_threads(trained.threads)
    data = load(trained.data, trained.image_size, trained.data_dir, samples=trained.samples)
    check_data(str(path), state["data"], data.sha256(), trained.data)
    device = World().device(options.device)
    data = data.to(device)
    # Products with the Hessian differentiate twice, which torch.compile cannot.
    run = Run(replace(trained, compile=False), data, device)
    check_model(str(path), state["model"], run.model.state_dict())
    objective = Objective(
        run.model,
        run.loss_fn,
        Chunks(data.train, run.chunks.size),
        batchnorm=options.batchnorm,
        dropout=options.dropout,
        seed=options.seed,
    )
    name = f"{folder.resolve().name}, step {state['step']:,}"
    subject = Subject(name, folder, state["step"], run, objective, state)
    subject.load()
    return subject


def _state(path: Path) -> tuple[Path, dict[str, Any]]:
    if path.is_dir():
        folder = RunFolder(path)
        if folder.read_options() is None:
            raise OptionsError(
                f"{path}: is no run's folder, as it has no readable options.json; give one that "
                "`fbopt train` made, or a checkpoint file"
            )
        if not folder.checkpoints():
            raise OptionsError(f"{path}: there is no checkpoint in it yet; wait for the first")
        return path, folder.load()
    if not path.exists():
        kept = ", ".join(f"{p.name}" for _, p in RunFolder(path.parent).checkpoints())
        found = f"; {path.parent} has {kept}" if re.search(r"\.pt$", path.name) and kept else ""
        raise OptionsError(f"{path}: there is no such folder or file{found}")
    try:
        return path.parent, format.read(path)
    except CheckpointError as error:
        raise OptionsError(f"{path} cannot be measured: {error}") from error
