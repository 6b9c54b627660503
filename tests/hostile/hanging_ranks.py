"""Processes of a job that are stopped, stuck, killed, or never start."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.hostile.trials import (
    LONG,
    MINUTES,
    RUN,
    SHORT,
    TRAIN,
    Program,
    Started,
    stop,
    trial,
)

SILENT = (
    r"process {} \(\d+ on \S+\) has not been heard of for \d+ s; it is waited for at most 0.2 m"
)
NO_ANSWER = (
    r"process {} \(\d+ on \S+\) did not answer for 0.2 minutes: look after it, and start all"
)


def ranks(folder: Path, number: int = 2, minutes: float = MINUTES, *start: str) -> list[Program]:
    """The first processes of a job of two, as a cluster's own launcher would start them."""
    found = [f"{os.getpid()}", f"{folder}"]
    port = 20000 + hash(tuple(found)) % 20000
    return [
        Program(
            folder, *(start or TRAIN), *RUN, *LONG, "--timeout", f"{minutes:g}", RANK=f"{rank}",
            LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=f"{port}",
            TORCHELASTIC_RUN_ID="hostile",
        )
        for rank in range(number)
    ]  # fmt: skip


def torchrun(folder: Path, *more: str) -> Program:
    words = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return Program(folder, *words, "-m", "fbopt.train", "--", *RUN, *LONG, *SHORT.split(), *more)


@trial("process 1 of 2 is stopped", SHORT, SILENT.format(1), NO_ANSWER.format(1), 1)
def _(folder: Path) -> Started:
    first, second = ranks(folder)
    yield from (second, first)
    first.wait_for_steps()
    stop(second.pid)


@trial("process 0 of 2 is stopped", SHORT, SILENT.format(0), NO_ANSWER.format(0), 1)
def _(folder: Path) -> Started:
    first, second = ranks(folder)
    yield from (first, second)
    first.wait_for_steps()
    stop(first.pid)


@trial("one of two is stopped, torchrun", SHORT, SILENT.format(r"\d"), NO_ANSWER.format(r"\d"), 1)
def _(folder: Path) -> Started:
    yield (job := torchrun(folder))
    job.wait_for_steps()
    stop(job.children()[-1])


@trial("one of `--processes 2` is stopped", SHORT, SILENT.format(r"\d"), NO_ANSWER.format(r"\d"), 1)
def _(folder: Path) -> Started:
    yield (job := Program(folder, *TRAIN, *RUN, *LONG, *SHORT.split(), "--processes", "2"))
    job.wait_for_steps()
    stop(job.children()[-1])


LOOP = """import sys
from fbopt.train import trainer
seed_chunk = trainer.Trainer.seed_chunk
def loop(self, chunk=0):
    while self.context.rank == 1 and self.step == 3:
        pass
    seed_chunk(self, chunk)
trainer.Trainer.seed_chunk = loop
from fbopt.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@trial(
    "process 1 of 2 loops for ever",
    SHORT,
    r"process 1 \(\d+ on \S+\) runs, but has not come to where the others wait since",
    r"process 1 \(\d+ on \S+\) did not come to where the others wait for 0.2 minutes",
    1,
)
def _(folder: Path) -> Started:
    first, second = ranks(folder, 2, MINUTES, sys.executable, "-c", LOOP)
    yield from (second, first)


MEET = r"process {} of 2 waits for the others at localhost:\d+, at most 0.2 minutes"
MET = r"process {} of 2 has not met the others at localhost:\d+ within \d+ s"


@trial("process 1 of 2 never starts", SHORT, MEET.format(0), MET.format(0), 1)
def _(folder: Path) -> Started:
    yield from ranks(folder, 1)


@trial("process 0 of 2 never starts", SHORT, MEET.format(1), MET.format(1), 1)
def _(folder: Path) -> Started:
    first, second = ranks(folder, 2, MINUTES)
    first.kill()
    yield second


@trial("process 1 of 2 is killed", "at once", "", "one of which has probably died", 1)
def _(folder: Path) -> Started:
    first, second = ranks(folder, 2, 30)
    yield from (second, first)
    first.wait_for_steps()
    second.kill()


@trial("one of two is killed, torchrun", "at once", "", r"exitcode: (-9|1)\b", 1)
def _(folder: Path) -> Started:
    yield (job := torchrun(folder, "--timeout", "30"))
    job.wait_for_steps()
    os.kill(job.children()[-1], signal.SIGKILL)


@trial("one of `--processes 2` is killed", "at once", "", "process 1 of 2 was ended by SIGKILL", 1)
def _(folder: Path) -> Started:
    yield (job := Program(folder, *TRAIN, *RUN, *LONG, "--processes", "2"))
    job.wait_for_steps()
    os.kill(job.children()[-1], signal.SIGKILL)
