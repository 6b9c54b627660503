"""`fbopt train` with a fault that happens once, in a given step (MARKER records that it did).

FAULT is "RANK STEP what", and happens in the rank's first chunk: kill (SIGKILL), raise, wait (until
a signal to stop has arrived) or wait-two (which the second of two signals ends; a file named as the
marker with .noticed says that the first has arrived).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from fbopt.train import loop
from fbopt.train.__main__ import main
from fbopt.train.signals import SignalHandler
from fbopt.train.trainer import Trainer


def fault(trainer: Trainer) -> None:
    for part in filter(None, os.environ.get("FAULT", "").split(",")):
        rank, step, what = part.split()
        marker = Path(os.environ["MARKER"] + "-".join((rank, step, what)))
        place = (trainer.context.rank, trainer.step)
        if place != (int(rank), int(step)) or marker.exists():
            continue
        marker.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ZeroDivisionError("a fault of the test")
        latest = time.monotonic() + 120
        while len(arrived) < (2 if what == "wait-two" else 1) and time.monotonic() < latest:
            time.sleep(0.02)
            if arrived:
                Path(f"{marker}.noticed").touch()


arrived: list[int] = []  # signals to stop
handle = SignalHandler._handle
seed_chunk = Trainer.seed_chunk


def note_and_handle(handler: SignalHandler, number: int, frame: FrameType | None) -> None:
    arrived.append(number)
    handle(handler, number, frame)


def install() -> None:
    """Let the training program of this process meet the fault."""
    Trainer.seed_chunk = seed_or_fail
    SignalHandler._handle = note_and_handle
    loop.draw_curves = lambda folder, options: False


def seed_or_fail(trainer: Trainer, chunk: int = 0) -> None:
    fault(trainer)
    seed_chunk(trainer, chunk)


if __name__ == "__main__":
    install()
    sys.exit(main())
