"""How the memory, open files and run folder of a training program grow with its steps.

Samples are taken from the end of the first step to that of the last, also within steps. Growth is
the slope of a
straight line through the second half of them, by least squares, for the time of a step on average.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EVERY_SECONDS = 0.25
TAIL_BYTES = 4096  # of a file of metrics: more than a line


class Sample(NamedTuple):
    """What a run held at a time, when so many steps were done."""

    seconds: float
    step: int
    memory: int  # bytes that are in memory: VmRSS, the most of any process
    handles: int  # open files, sockets and pipes, the most of any process
    threads: int
    files: int  # in the run folder


def start(words: Sequence[str], home: Path) -> subprocess.Popen[bytes]:
    """`fbopt train` in a process of its own, in the folder `home`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    with open(home / "said", "wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "fbopt.train", *words],
            cwd=home, env=environment, stdout=said, stderr=said,
        )  # fmt: skip


def watch(process: subprocess.Popen[bytes], folder: Path) -> list[Sample]:
    """Sample a run until it ends."""
    samples: list[Sample] = []
    while process.poll() is None:
        time.sleep(EVERY_SECONDS)
        with contextlib.suppress(OSError, TypeError):  # it begins or ends just now
            samples.append(_sample(process.pid, folder, _last_step(folder / "metrics.jsonl")))
    last = samples[-1].step if samples else 0
    return [sample for sample in samples if sample.step < last]  # then it draws its curves


def _last_step(path: Path) -> int:
    """The step of the last whole line; TypeError before there is one."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        return int(re.search(rb'.*"step": (\d+),.*\n', file.read(), re.S)[1])


def _sample(pid: int, folder: Path, step: int) -> Sample:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = [Path(f"/proc/{one}/status").read_text() for one in (pid, *children)]
    memory = max(1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in status)
    threads = max(int(re.search(r"Threads:\s+(\d+)", text)[1]) for text in status)
    handles = max(len(os.listdir(f"/proc/{one}/fd")) for one in (pid, *children))
    return Sample(time.monotonic(), step, memory, handles, threads, len(os.listdir(folder)))


def slope(samples: Sequence[Sample], name: str) -> float:
    """By how much something grows in the time of a step, in the second half of the samples."""
    half, step = samples[len(samples) // 2 :], _seconds(samples)
    steps = [sample.seconds / step for sample in half]
    values = [getattr(sample, name) for sample in half]
    middle, mean = sum(steps) / len(steps), sum(values) / len(values)
    square = sum((step - middle) ** 2 for step in steps)
    product = sum((s - middle) * (v - mean) for s, v in zip(steps, values, strict=True))
    return product / square if square else 0.0


def _seconds(samples: Sequence[Sample]) -> float:
    """The time of a step, on average."""
    whole = [sample for sample in samples if sample.step > samples[0].step] or samples[-1:]
    steps = whole[-1].step - samples[0].step
    begin = next(s.seconds for s in samples if s.step == whole[-1].step)
    return max(begin - samples[0].seconds, EVERY_SECONDS) / max(steps, 1)
