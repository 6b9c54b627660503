"""A process that ends with the one that started it, however that one ends. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
VARIABLE = "FBOPT_PARENT"  # the process that a run of a ladder ends with


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the system send this process a signal as soon as its parent has ended.

    If it has ended already, the signal is sent now.
    """
    with contextlib.suppress(AttributeError, OSError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_ladder() -> None:
    """Save and stop once the ladder that started this run has ended, if one did.

    Raises ValueError where the environment names no process.
    """
    if parent := os.environ.pop(VARIABLE, None):
        if not (parent.isdecimal() and len(parent) < 10):
            raise ValueError(f"{VARIABLE} is {parent!r}, which only a ladder sets; unset it")
        end_with(int(parent), signal.SIGTERM)
