"""Signals to stop: the first lets a run save after the current step, a second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder


class Interrupted(Exception):
    """A run that was stopped; the message says how to go on."""

    def __init__(self, what: str, folder: RunFolder) -> None:
        super().__init__(f"{what}; go on with\n  {folder.resume_command}")


STOP = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """A context in which the first of the signals `numbers` only sets `requested`."""

    def __init__(self, folder: RunFolder, numbers: Sequence[int] = STOP) -> None:
        self.folder, self.numbers, self.requested = folder, numbers, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in self.numbers:
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.folder.checkpoints():
            raise Interrupted("stopped at once, back at the last save", self.folder)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step (again to stop at once, without it)", flush=True)
