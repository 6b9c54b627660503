"""`fbopt train` with a fault: FAULT says what happens once (MARKER does not exist) in a step.

FAULT is "RANK STEP what": kill (SIGKILL, within the rank's first chunk), raise (in its first chunk)
or wait (until the test sends a signal to the launcher).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fbopt.train import loop
from fbopt.train.__main__ import main
from fbopt.train.trainer import Run


def fault(run: Run) -> None:
    for part in filter(None, os.environ.get("FAULT", "").split(",")):
        rank, step, what = part.split()
        marker = Path(os.environ["MARKER"] + "-".join((rank, step, what)))
        if (run.world.rank, run.step) != (int(rank), int(step)) or marker.exists():
            continue
        marker.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ZeroDivisionError("a fault of the test")
        time.sleep(1.5)  # the launcher's signal arrives within this step


seed_draws = Run.seed_draws


def seed_or_fail(run: Run, chunk: int = 0) -> None:
    fault(run)
    seed_draws(run, chunk)


if __name__ == "__main__":
    Run.seed_draws = seed_or_fail
    loop.draw_curves = lambda folder, options: False
    sys.exit(main())
