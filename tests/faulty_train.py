"""`fbopt train` with a fault that happens once, in a given step (MARKER records that it did).

FAULT is "RANK STEP what": kill (SIGKILL, within the rank's first chunk), raise (in its first chunk)
or wait (until the test has sent a signal, and touched a file named as the marker with .go).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fbopt.train import loop
from fbopt.train.__main__ import main
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
        go, latest = Path(f"{marker}.go"), time.monotonic() + 120
        while not go.exists() and time.monotonic() < latest:
            time.sleep(0.05)
        time.sleep(1.5)  # the launcher's signal arrives within this step


seed_chunk = Trainer.seed_chunk


def seed_or_fail(trainer: Trainer, chunk: int = 0) -> None:
    fault(trainer)
    seed_chunk(trainer, chunk)


if __name__ == "__main__":
    Trainer.seed_chunk = seed_or_fail
    loop.draw_curves = lambda folder, options: False
    sys.exit(main())
