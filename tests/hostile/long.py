"""Runs that are longer and wider than anyone's: 10,000 chunks, a day in minutes, 16 processes.

    python -m tests.hostile long               about 15 minutes on two cores
    python -m tests.hostile long "16 processes"

Memory, open files and the files of the run must not grow with the steps; processes of any number
must end on the same bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fbopt.train.checkpoint import atomic
from tests.hostile.growth import Sample, slope, start, watch
from tests.hostile.tables import Row, show

RUN = (  # of every case
    "--data",
    "npz:data.npz",
    "--width",
    "4",
    "--out",
    "run",
    "--log-every",
    "1",
    "--threads",
    "1",
)
CHUNKS = 10_000
SIDE = 12


class Case(NamedTuple):
    """A run, the number of its training samples, and how much it may grow."""

    name: str
    words: tuple[str, ...]
    samples: int
    bytes_per_step: float  # of memory, at most


# A day at the defaults has 288 checkpoints, 100 evaluations and 400 lines of metrics.
DAY = (
    "--recipe", "fb-penalty", "--chunk-size", "16", "--vectorize", "1", "--save-every", "2",
    "--eval-every", "5", "--fingerprint-every", "1",
)  # fmt: skip
GROWTH = (
    Case(
        "10,000 chunks a step, with a penalty",
        ("--recipe", "fb-penalty", "--chunk-size", "1", "--vectorize", "1", "--steps", "3",
         "--processes", "1"),
        CHUNKS, 2**20,
    ),
    Case(
        "10,000 chunks a step, 32 at once",
        ("--recipe", "fb-penalty", "--chunk-size", "1", "--vectorize", "32", "--steps", "5",
         "--processes", "1"),
        CHUNKS, 2**20,
    ),
    Case("a day in minutes", (*DAY, "--steps", "600", "--processes", "1"), 64, 4096),
    Case("a day, two processes", (*DAY, "--steps", "600", "--processes", "2"), 64, 4096),
    Case(
        "1,000 epochs of SGD",
        ("--recipe", "sgd", "--batch-size", "32", "--epochs", "1000", "--save-every", "100",
         "--eval-every", "100"),
        64, 4096,
    ),
)  # fmt: skip
NUMBERS = (1, 2, 16)  # of processes
WIDE = (
    "--recipe", "fb-penalty", "--chunk-size", "16", "--vectorize", "1", "--steps", "12",
    "--fingerprint-every", "1", "--save-every", "4", "--model", "resnet18", "--dropout", "0.2",
)  # fmt: skip
WIDE_SAMPLES = 40 * 16 - 3  # 40 chunks, the last ragged: 16 processes have 2 or 3 each
HEADER = ("run", "steps", "memory", "growth of memory", "open files", "files of the run", "end")


def write_data(home: Path, samples: int) -> None:
    """data.npz: images of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", samples), ("test", 30)):
        arrays[f"x_{part}"] = rng.normal(size=(count, 1, SIDE, SIDE)).astype(np.float32)
        arrays[f"y_{part}"] = np.arange(count) % 3
    np.savez(home / "data.npz", **arrays)


def grow(case: Case, home: Path) -> Row:
    """Run a case, and measure how it grows."""
    home.mkdir()
    write_data(home, case.samples)
    process = start((*RUN, *case.words), home)
    samples = watch(process, home / "run")
    status = process.wait()
    if status or len(samples) < 20:
        said = (home / "said").read_text()
        return Row((case.name, "", "", "", "", "", f"status {status}: {said}"), False)
    return _row(case, samples)


def _row(case: Case, samples: list[Sample]) -> Row:
    half = samples[len(samples) // 2 :]
    growth = slope(samples, "memory")
    handles = {name: sorted({getattr(s, name) for s in half}) for name in ("handles", "files")}
    flat = all(abs(slope(samples, name)) * samples[-1].step < 1 for name in ("handles", "threads"))
    few = (
        handles["files"][-1] - handles["files"][0] <= 2
    )  # one checkpoint more while one is written
    holds = growth < case.bytes_per_step and flat and few
    cells = (
        case.name,
        f"{samples[-1].step + 1:,} ({len(samples)} samples)",
        f"{half[0].memory / 1e6:.1f} to {half[-1].memory / 1e6:.1f} MB",
        f"{growth:+,.0f} bytes a step, of at most {case.bytes_per_step:,.0f}",
        _range(handles["handles"]),
        _range(handles["files"]),
        "flat" if holds else "GROWS",
    )
    return Row(cells, holds)


def _range(values: list[int]) -> str:
    return f"{values[0]} to {values[-1]}" if values[0] < values[-1] else f"{values[0]}"


def compare(home: Path) -> Row:
    """The same run in each number of processes."""
    home.mkdir()
    found, steps = {}, 0
    for number in NUMBERS:
        (own := home / f"{number}").mkdir()
        write_data(own, WIDE_SAMPLES)
        process = start((*RUN, *WIDE, "--processes", f"{number}"), own)
        samples = watch(process, own / "run")
        if status := process.wait():
            return Row((f"{number} processes", "", "", "", "", "", f"status {status}"), False)
        found[number] = atomic.read_lines(own / "run" / "fingerprints.jsonl")
        steps = len(found[number])
    same = all(one == found[1] for one in found.values()) and steps > 12
    names = ", ".join(map(str, NUMBERS))
    last = samples[-1]
    cells = (f"{names} processes", f"{steps} fingerprints", f"{last.memory / 1e6:.0f} MB each", "–")
    end = "the same bits" if same else "DIFFERENT BITS"
    return Row((*cells, f"{last.handles} each", f"{last.files}", end), same)


def main(names: Sequence[str] = ()) -> tuple[list[Row], str]:
    """Run the cases, or those whose names have the words of one of `names`."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fbopt-long-") as folder:
        for number, case in enumerate(GROWTH):
            if not names or any(name in case.name for name in names):
                rows.append(grow(case, Path(folder, f"{number}")))
                show(rows[-1])
        if not names or any("processes" in name for name in names):
            rows.append(compare(Path(folder, "wide")))
            show(rows[-1])
    return rows, ""
