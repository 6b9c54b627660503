"""Runs of the training program that take a second, and helpers for several test files."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options, flag
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.trainer import Trainer


def data(folder: Path, count: int = 75, side: int = 12) -> str:
    """`--data` for three classes of noisy images, `count` to train and 30 to test."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(3, 1, side, side))
    arrays = {}
    for part, samples in (("train", count), ("test", 30)):
        labels = np.arange(samples) % 3
        x = patterns[labels] + 0.7 * rng.normal(size=(samples, 1, side, side))
        arrays |= {f"x_{part}": x.astype(np.float32), f"y_{part}": labels}
    path = folder / "tiny.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


def options(tiny: str, out: Path, recipe: str = "fb-penalty", **changes: Any) -> Options:
    """Twelve passes in chunks of 32, or mini-batches of 16, unless `changes` say otherwise."""
    passes = {"epochs": 12, "batch_size": 16} if recipe == "sgd" else {"steps": 12}
    if recipe != "sgd":
        passes["chunk_size"] = 32
    common = {"warmup": 2, "cosine": 16, "lr": 0.2, "width": 4, "threads": 1}
    return Options(data=tiny, recipe=recipe, out=out, **(common | passes | changes))


def with_noise(tiny: str, out: Path, recipe: str = "fb-penalty", **changes: Any) -> Options:
    """The same for a model with BatchNorm and dropout, with fingerprints of every step."""
    noise = {"model": "resnet18", "width": 2, "dropout": 0.3, "fingerprint_every": 1}
    return options(tiny, out, recipe, **(noise | changes))


def trainer_of(tiny: str, recipe: str = "fb-penalty", **changes: Any) -> Trainer:
    """The trainer of :func:`options`, which writes nothing."""
    chosen = resolve(options(tiny, Path("never written"), recipe, **changes))
    return Trainer(chosen, load(tiny), torch.device("cpu"))


def checkpoint(step: int, **entries: Any) -> dict[str, Any]:
    """The least that a checkpoint has to hold, and `entries`."""
    nothing, zero = {"state": {}, "param_groups": []}, torch.zeros(())
    return {
        "step": step, "options": {}, "parameters": [], "seconds": 0.0, "fitted": 0, "model": {},
        "optimizer": nothing, "scheduler": {}, "rng": torch.get_rng_state(), "correct": zero,
        "loss": zero, "chunk_sqnorm": zero, "data": "", "environment": {},
    } | entries  # fmt: skip


def command_line(options: Options) -> list[str]:
    """The arguments of `fbopt train` that give these options."""
    words = []
    for name, value in vars(options).items():
        if value != getattr(Options, name):
            words += [flag(name), str(value)]
    return words


def interrupt_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the given step."""
    take_step = Trainer.take_step

    def interrupted(trainer: Trainer) -> None:
        take_step(trainer)
        if trainer.step == step:
            signal.raise_signal(number)

    patch.setattr(Trainer, "take_step", interrupted)


def die_before(patch: pytest.MonkeyPatch, step: int) -> None:
    """Raise MemoryError once so many steps are done."""
    take_step = Trainer.take_step

    def dying(trainer: Trainer) -> None:
        if trainer.step == step:
            raise MemoryError
        take_step(trainer)

    patch.setattr(Trainer, "take_step", dying)


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """What a run has logged, without the times."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in folder.read_metrics()]


def digest(source: Any) -> str:
    """SHA-256 of a model's parameters and buffers, or of those in a checkpoint."""
    state = source if isinstance(source, dict) else source.state_dict()
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
