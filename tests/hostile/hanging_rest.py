"""Ladders whose run hangs, streams that block, and a DataLoader's worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from tests.hostile.trials import (
    FEW,
    LADDER,
    RUN,
    SHORT,
    TRAIN,
    Program,
    Started,
    trial,
)


@trial("a run of a ladder is stopped", SHORT,
       r"fb-clip, seed 0 \(process \d+\) has computed nothing for \d+ s; it is waited for at most",
       r"fb-clip, seed 0: ended, as it had computed nothing for 0.2 minutes", 1)  # fmt: skip
def _(folder: Path) -> Started:
    yield (ladder := Program(folder, *LADDER, "--steps", "400", *SHORT.split()))
    ladder.wait_for_steps(run="ladder/fb-clip-s0")
    os.killpg(ladder.children()[0], signal.SIGSTOP)  # with the processes that it has started


@trial("Ctrl-C, twice, while a run of a ladder is stopped", "10 s after the second", "",
       "ending what has not stopped", 130)  # fmt: skip
def _(folder: Path) -> Started:
    yield (ladder := Program(folder, *LADDER, "--steps", "4000"))
    ladder.wait_for_steps(run="ladder/fb-clip-s0")
    os.killpg(ladder.children()[0], signal.SIGSTOP)  # with the processes that it has started
    os.kill(ladder.pid, signal.SIGINT)
    ladder.wait_for_words("again to stop at once")
    os.kill(ladder.pid, signal.SIGINT)


def full_pipe() -> int:
    """The end of a pipe that nobody reads, and that holds as much as it can."""
    _, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    return end


@trial("nobody reads the pipe that stdout is", "60 s, here 2 s", "",
       "nobody has read stdout for 2 s; the work goes on", 0)  # fmt: skip
def _(folder: Path) -> Started:
    impatient = "import sys\nfrom fbopt.train import output\noutput.PATIENCE_SECONDS = 2.0\n"
    impatient += "from fbopt.train.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    words = (sys.executable, "-c", impatient, *RUN, *FEW)
    yield Program(folder, *words, stdout=full_pipe())


@trial("nobody writes to the pipe that stdin is", "never read", "", "written: run/", 0)
def _(folder: Path) -> Started:
    yield Program(folder, *TRAIN, *RUN, *FEW, stdin=os.pipe()[0])


LOADER = """import time
import torch
from torch.utils.data import DataLoader, Dataset
from fbopt import FullBatchClosure, FullBatchGD

class Hanging(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        time.sleep(1000 if index == 5 else 0)
        return torch.ones(3), 0

model = torch.nn.Linear(3, 2)
chunks = DataLoader(Hanging(), 2, num_workers=1, timeout=5)
optimizer = FullBatchGD(model.parameters(), lr=0.1)
before = model.weight.detach().clone()
closure = FullBatchClosure(model, torch.nn.functional.cross_entropy, chunks)
try:
    optimizer.step(closure)
except RuntimeError as error:
    print(error)
    print("parameters as before:", torch.equal(before, model.weight))
"""


@trial("a DataLoader's worker hangs", "`DataLoader(timeout=5)`", "",
       "timed out after 5 seconds(.|\n)*parameters as before: True", 0)  # fmt: skip
def _(folder: Path) -> Started:
    yield Program(folder, sys.executable, "-c", LOADER)
