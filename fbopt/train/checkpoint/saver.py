"""When a run is saved: checkpoints by steps or by time, fingerprints by steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fbopt.train.checkpoint.digest import fingerprint
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.trainer import Trainer

SAVE_SECONDS = 300.0


class Saver:
    """Writes a run's checkpoints and fingerprints as its options say.

    `extra` returns what is added to the trainer's state in every checkpoint. `saved` is the step of
    the last checkpoint, None before the first.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        extra: Callable[[], dict[str, Any]],
        saved: int | None,
    ) -> None:
        self.trainer, self.folder, self.extra = trainer, folder, extra
        self.saved = saved
        self.time = time.monotonic()
        self.every = trainer.options.fingerprint_every
        if self.every and trainer.step == 0:
            self._write_fingerprint(trainer.state_dict())

    def due(self) -> str:
        """What is to be written after this step: "checkpoint", "fingerprint" or ""."""
        if self._checkpoint_is_due():
            return "checkpoint"
        return "fingerprint" if self._fingerprint_is_due() else ""

    def write(self, what: str) -> None:
        """Write what is due: a checkpoint, which has a fingerprint, or this alone."""
        if what == "checkpoint":
            self.save()
        elif what:
            self._write_fingerprint(self.trainer.state_dict())

    def _checkpoint_is_due(self) -> bool:
        every = self.trainer.options.save_every
        if every is None:
            return time.monotonic() - self.time > SAVE_SECONDS
        return self.trainer.step % every == 0

    def _fingerprint_is_due(self) -> bool:
        return bool(self.every) and self.trainer.step % self.every == 0

    def save(self) -> None:
        """Write a checkpoint and its fingerprint, unless this step has one. Raises Diverged."""
        if self.saved == self.trainer.step:
            return
        self.trainer.check_finite()
        state = self.trainer.state_dict() | self.extra()
        # The fingerprint first: resuming drops extra lines but cannot restore a missing one.
        self._write_fingerprint(state)
        self.folder.save(state, self.trainer.options.keep)
        self.saved, self.time = self.trainer.step, time.monotonic()

    def _write_fingerprint(self, state: dict[str, Any]) -> None:
        self.folder.append(self.folder.fingerprints, fingerprint(state))
