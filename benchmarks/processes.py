"""Commands with a time limit, whose end is also the end of all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status, None after a time-out, and what it printed."""

    status: int | None
    output: str

    @property
    def last(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    echo: bool = True,
) -> Finished:
    """Run a command in a process group of its own; its output is kept and passed on as it comes."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()
    timer = threading.Timer(seconds, lambda: (late.set(), _end(process)))
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if echo:
                print(line, end="", flush=True)
        status = process.wait()
    finally:
        timer.cancel()
        _end(process)
    return Finished(None if late.is_set() else status, "".join(lines))


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of the group, which is named after the process that began it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of one that has ended
        return
    process.wait()
