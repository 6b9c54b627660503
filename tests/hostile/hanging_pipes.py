"""Pipes that nobody writes to, among the files that a run reads and writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.hostile.trials import (
    FEW,
    LADDER,
    RUN,
    SOON,
    STEPS,
    TRAIN,
    Program,
    Started,
    trial,
    write_images,
)


def pipe_in_place_of(path: Path) -> None:
    """A pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@trial("a pipe among images", "at once", "", r"3.png: not a readable image: .*no regular file", 2)
def _(folder: Path) -> Started:
    pipe_in_place_of(write_images(folder))
    words = ("--data", "imagefolder:images", "--model", "cnn", "--image-size", "8", "--out", "run")
    yield Program(folder, *TRAIN, *STEPS, *FEW, *words)


@trial("a pipe for an npz file", "at once", "", "not an .npz file of plain arrays: .*no regular", 2)
def _(folder: Path) -> Started:
    pipe_in_place_of(folder / "tiny.npz")
    yield Program(folder, *TRAIN, *RUN, *FEW)


@trial("a pipe for TinyImageNet's list of classes", "at once", "", "val_annotations.txt", 2)
def _(folder: Path) -> Started:
    (folder / "images" / "train" / "cat" / "images").mkdir(parents=True)
    (folder / "images" / "val").mkdir(parents=True)
    pipe_in_place_of(folder / "images" / "val" / "val_annotations.txt")
    yield Program(folder, *TRAIN, *STEPS, *FEW, "--data", "tinyimagenet:images", "--out", "run")


@trial("a pipe among the files of CIFAR-10", "at once", "", "data_batch_3 is no regular file", 2)
def _(folder: Path) -> Started:
    (own := folder / "data" / "cifar-10-batches-py").mkdir(parents=True)
    pipe_in_place_of(own / "data_batch_3")
    for name in ("data_batch_1", "data_batch_2"):
        (own / name).write_bytes(b"")
    yield Program(folder, *TRAIN, *STEPS, *FEW, "--data", "cifar10", "--out", "run")


def after_a_run(folder: Path, name: str, *words: str) -> Program:
    """A run's folder that has a pipe in place of a file, and the program that meets it."""
    made = Program(folder, *TRAIN, *RUN, "--steps", "10", "--processes", "1")
    if made.process.wait(SOON):
        raise RuntimeError(made.said())
    (folder / "run" / "result.json").unlink(missing_ok=name != "result.json")
    pipe_in_place_of(folder / "run" / name)
    return Program(folder, *(words or (*TRAIN, "--resume", "run")))


REFUSED = "no regular file, as all files of a run are; remove it"
RESUMED = (
    ("checkpoint-10.pt", REFUSED, 2),
    ("options.json", REFUSED, 2),
    ("metrics.jsonl", REFUSED, 2),
    ("fingerprints.jsonl", REFUSED, 2),
    (".checkpoint.pt.partial", "", 0),  # fbopt's own, replaced
    (".lock", REFUSED, 2),
)


def resumed(name: str) -> Callable[[Path], Started]:
    def start(folder: Path) -> Started:
        yield after_a_run(folder, name)

    return start


for _name, _end, _status in RESUMED:
    trial(f"a pipe for {_name} of a run", "at once", "", _end, _status)(resumed(_name))


@trial("a pipe for a run's options, `fbopt analyze`", "at once", "", "options.json", 2)
def _(folder: Path) -> Started:
    yield after_a_run(folder, "options.json", sys.executable, "-m", "fbopt.cli", "analyze", "run")


@trial("a pipe for `--tuned`", "at once", "", "--tuned tuned.json: cannot be read", 2)
def _(folder: Path) -> Started:
    pipe_in_place_of(folder / "tuned.json")
    yield Program(folder, *LADDER, "--tuned", "tuned.json")
