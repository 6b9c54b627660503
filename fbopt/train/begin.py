"""What a run begins with: its start, its data, and the trainer made of them in every process."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch

from fbopt.train import precision
from fbopt.train.checkpoint.resume import Start, find_start
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.dataset import Data
from fbopt.train.data.load import load_for
from fbopt.train.distributed import DistributedContext, select_device
from fbopt.train.processes import check_number
from fbopt.train.reporting.tensorboard import check_installed
from fbopt.train.trainer import Trainer


class Loaded(NamedTuple):
    """A data set on the CPU, and its SHA-256."""

    data: Data
    digest: str


def find(options: Options, lock: ExitStack) -> Start:
    """Where a run begins, with resolved options; its folder is locked if there is one."""
    start = find_start(options, lock)
    if start.options.log:
        check_installed()
    return start


def read(options: Options) -> Loaded:
    """Load the data of a run."""
    data = load_for(options)
    return Loaded(data, data.sha256())


def build_trainer(
    options: Options, context: DistributedContext, loaded: Loaded | None = None
) -> tuple[Trainer, str]:
    """The trainer of this process, and the SHA-256 of its data, which are read unless `loaded`."""
    check_number(options, context.world_size)
    if not context.is_single and (options.stochastic or options.switch_at):
        what = "--recipe sgd runs" if options.stochastic else "--switch-at's mini-batches are taken"
        raise OptionsError(
            f"{what} in one process, not in {context.world_size}, which would change its "
            "mini-batches; start it without torchrun, or choose a full-batch recipe"
        )
    data, digest, device = place(options, context.world_size, loaded)
    options = replace(options, processes=context.world_size)
    return Trainer(options, data, device, context), digest


def place(
    options: Options, world_size: int = 1, loaded: Loaded | None = None
) -> tuple[Data, str, torch.device]:
    """Set up the device as the options say; return the data on it, their SHA-256, and it."""
    device = select_device(options.device, world_size)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data, digest = loaded or read(options)
    precision.set_arithmetic(options.precision, device)
    dtype = precision.parameter_dtype(options.precision)
    return data.to(device, options.channels_last, dtype), digest, device


def broadcast_model(trainer: Trainer, digest: str) -> None:
    """Give every rank the initial weights of rank 0; refuse other data than rank 0 has."""
    context = trainer.context
    if context.is_single:
        return
    model = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
    theirs, state = context.from_rank_zero(lambda: (digest, model))
    with context.raising_together():
        if theirs != digest:
            raise DataError(
                f"--data {trainer.options.data}: process {context.rank} has other samples or "
                f"labels than process 0 (SHA-256 {digest[:12]}…, not {theirs[:12]}…); give all the "
                "same"
            )
        trainer.model.load_state_dict(state)
