"""What is attacked: tiny data, a finished run, one that was interrupted, and copies of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from fbopt.train import loop
from fbopt.train.__main__ import run
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.digest import GROUPS, fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted

STEPS, STOPPED_AT = 12, 5


class Arena:
    """Data, runs and a scratch folder.

    Attributes:
        data: a value of `--data`.
        finished, half: the runs, as :meth:`options` make them.
        scratch: a folder for copies.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, tiny_runs.data(root)
        self.finished, self.half, self.scratch = (root / n for n in ("finished", "half", "scratch"))
        self.scratch.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "draw_curves", _scribble)
            train(self.options(self.finished))
            tiny_runs.interrupt_after(patch, STOPPED_AT)
            with pytest.raises(Interrupted):
                train(self.options(self.half))
        self.outcome = outcome(RunFolder(self.finished))

    def options(self, out: Path, **changes: Any) -> Options:
        """Twelve steps with a checkpoint after every third, and as many lines as there can be."""
        often = {"save_every": 3, "fingerprint_every": 2, "log_every": 1, "processes": 1}
        return tiny_runs.options(self.data, out, **(often | changes))

    def copy(self, run: Path) -> RunFolder:
        """A copy of a run."""
        folder = self.clean("run")
        shutil.copytree(run, folder)
        return RunFolder(folder)

    def clean(self, name: str) -> Path:
        """A path in the scratch folder where there is nothing."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def go_on(self, folder: RunFolder, **changes: Any) -> int:
        """Begin the run in a folder, or go on with it; returns the exit status."""
        return run(self.options(folder.path, **({"resume": "auto"} | changes)))

    def check_outcome(self, folder: RunFolder) -> None:
        """Fail unless a run ended as the one did that nobody disturbed."""
        assert outcome(folder) == self.outcome
        assert folder.result.exists() and folder.curves.exists()


def outcome(folder: RunFolder) -> Any:
    """What a run has computed: the digests of all tensors after its last step."""
    record = fingerprint(format.read(folder.path_of(STEPS)))
    return [record[group] for group in GROUPS]


@contextlib.contextmanager
def without_figures() -> Iterator[pytest.MonkeyPatch]:
    """Write a few bytes in place of figures, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", _scribble)
        yield patch


@contextlib.contextmanager
def without_steps() -> Iterator[pytest.MonkeyPatch]:
    """Stop every run where its first step would be: what it reads is tried."""

    def stop(trainer, saver, signals, write, tracker):
        raise Interrupted("stopped", signals.folder)

    with without_figures() as patch:
        patch.setattr(loop, "_fit", stop)
        yield patch


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Work in a folder, which is made."""
    before = os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def _scribble(folder: RunFolder, options: Options) -> bool:
    folder.curves.write_bytes(b"curves")
    return True
