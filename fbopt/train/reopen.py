"""Runs that `fbopt train` made, opened again to be measured: checkpoint, data and trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.resume import check_data, check_model, made_with
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.load import load_for
from fbopt.train.distributed import select_device
from fbopt.train.precision import parameter_dtype, set_arithmetic
from fbopt.train.trainer import Trainer


def read_run(path: Path) -> tuple[Path, dict[str, Any], Options]:
    """The folder of a run, the content of its checkpoint, and the options that it was made with.

    `path` is a folder, whose newest readable checkpoint is taken, or a checkpoint. Raises
    OptionsError.
    """
    folder, state = _read(path)
    return folder, state, made_with(str(path), state)


def open_run(path: Path, state: dict[str, Any], made: Options, device_name: str) -> Trainer:
    """The trainer of a run before its first step, on its data.

    It is not compiled, as few steps are taken of it. torch gets the run's threads and arithmetic.

    Raises:
        OptionsError, DataError: other data or another model than the run's.
    """
    if made.threads is not None:
        torch.set_num_threads(made.threads)
    data = load_for(replace(made, download=False))
    check_data(str(path), state["data"], data.sha256(), made.data)
    device = select_device(device_name)
    set_arithmetic(made.precision, device)
    data = data.to(device, dtype=parameter_dtype(made.precision))
    run = Trainer(replace(made, compile=False), data, device)
    check_model(str(path), state["model"], run.model.state_dict())
    return run


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
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
