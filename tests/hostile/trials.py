"""Trials of what may hang: the programs, what they wait for, and how they have to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fbopt.train.checkpoint import atomic

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 100.0  # seconds after which a trial hangs
SOON = 60.0  # seconds within which what a trial needs is there
MINUTES = 0.2  # the limit in most trials
SHORT = f"--timeout {MINUTES:g}"
STEPS = ("--recipe", "fb-clip", "--width", "4", "--chunk-size", "16", "--log-every", "1")
RUN = (*STEPS, "--data", "npz:tiny.npz", "--save-every", "5", "--out", "run")
LONG = ("--steps", "1000000")
FEW = ("--steps", "3", "--processes", "1")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FBOPT_BACKEND": "reference",
    "MPLBACKEND": "agg", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
TRAIN = (sys.executable, "-m", "fbopt.train")


class Program:
    """A program in a session of its own, with what it says in a file."""

    def __init__(self, folder: Path, *words: str, stdin: int = subprocess.DEVNULL,
                 stdout: int | None = None, **environment: str) -> None:  # fmt: skip
        self.folder = folder
        self.log = folder / f"said-{len(list(folder.glob('said-*')))}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                words, cwd=folder, env=os.environ | ENVIRONMENT | environment, stdin=stdin,
                stdout=log if stdout is None else stdout, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid

    def wait_for_steps(self, count: int = 3, run: str = "run") -> None:
        """Wait until so many steps are logged."""
        end = time.monotonic() + SOON
        while len(atomic.read_lines(self.folder / run / "metrics.jsonl")) < count:
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"no step was taken: {self.said()}")
            time.sleep(0.05)

    def wait_for_words(self, words: str) -> None:
        """Wait until it has said something."""
        end = time.monotonic() + SOON
        while words not in self.said():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"was not said: {words}; but {self.said()}")
            time.sleep(0.05)

    def children(self) -> list[int]:
        """The processes that it has started."""
        return list(
            map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


Started = Iterator[Program]  # the programs of a trial; the last one is judged


class Trial(NamedTuple):
    """What is waited for, under which limit, the words meanwhile and at the end (patterns)."""

    cause: str
    limit: str
    meanwhile: str
    end: str
    status: int
    start: Callable[[Path], Started]


TRIALS: list[Trial] = []


def trial(cause: str, limit: str, meanwhile: str, end: str, status: int):
    """Keep a function that starts the programs of a trial."""

    def keep(start: Callable[[Path], Started]) -> Callable[[Path], Started]:
        TRIALS.append(Trial(cause, limit, meanwhile, end, status, start))
        return start

    return keep


def write_data(folder: Path) -> None:
    """tiny.npz: three classes of noisy images."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 75), ("test", 30)):
        arrays[f"x_{part}"] = rng.normal(size=(count, 1, 12, 12)).astype(np.float32)
        arrays[f"y_{part}"] = np.arange(count) % 3
    np.savez(folder / "tiny.npz", **arrays)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def write_images(folder: Path, test: str = "test") -> Path:
    """Two classes of images; returns one of them."""
    from PIL import Image

    for part in ("train", test):
        for name in ("cat", "dog"):
            (own := folder / "images" / part / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8), (number, 40, 200)).save(own / f"{number}.png")
    return own / "3.png"


LADDER = (
    sys.executable, "-m", "fbopt.cli", "ladder", "--data", "npz:tiny.npz", "--rows", "fb",
    "fb-clip", "--seeds", "1", "--jobs", "1", "--width", "4", "--chunk-size", "16",
    "--log-every", "1", "--out", "ladder",
)  # fmt: skip
