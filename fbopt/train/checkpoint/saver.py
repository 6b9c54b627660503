"""When a run is saved: checkpoints by steps or by time, fingerprints by steps."""

from __future__ import annotations

import time
from typing import Any

from fbopt.train.checkpoint.digest import fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.trainer import Run

SAVE_SECONDS = 300.0


class Saver:
    """Writes a run's checkpoints and fingerprints as its options say.

    `extra` goes into every checkpoint beside the run's state. `saved` is the step of the last
    checkpoint, None before the first.
    """

    def __init__(
        self, run: Run, folder: RunFolder, extra: dict[str, Any], saved: int | None
    ) -> None:
        self.run, self.folder, self.extra = run, folder, extra
        self.saved = saved
        self.time = time.monotonic()
        self.every = run.options.fingerprint_every
        if self.every and run.step == 0:
            self._fingerprint(run.state_dict())

    def after_step(self, at_once: bool) -> None:
        """Save what is due after a step; a checkpoint in any case if `at_once`."""
        if at_once or self._due():
            self.save()
        elif self.every and self.run.step % self.every == 0:
            self._fingerprint(self.run.state_dict())

    def save(self) -> None:
        """Write a checkpoint and its fingerprint, unless this step has one. Raises Diverged."""
        if self.saved == self.run.step:
            return
        self.run.check_finite()
        state = self.run.state_dict() | self.extra
        self._fingerprint(
            state
        )  # first: what a crash leaves too much is dropped, what lacks is not
        self.folder.save(state, self.run.options.keep)
        self.saved, self.time = self.run.step, time.monotonic()

    def _due(self) -> bool:
        if self.run.options.save_every is None:
            return time.monotonic() - self.time > SAVE_SECONDS
        return self.run.step % self.run.options.save_every == 0

    def _fingerprint(self, state: dict[str, Any]) -> None:
        self.folder.append(self.folder.fingerprints, fingerprint(state))
