"""Which process the others wait for: every few seconds each counts on in the job's store.

A process that was stopped, whose machine hangs or that the network has lost counts no more. One
that runs, but is stuck elsewhere, does not come to where the others wait. The others say so while
they wait, and name it when their time is up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any, NamedTuple

from fbopt._distributed import meetings

SILENT_SECONDS = 30.0  # after which a process is named, while the others wait; less if they wait
SHARE = 0.25  # for a short time: this part of it
LATE_SHARE = 0.1  # of it, after which one that runs elsewhere is named
BEATS = 6  # in the time after which a process is silent


class Heard(NamedTuple):
    """What a process has said last: its count of beats, where it is, its number and machine."""

    beat: int
    meetings: int
    where: str
    since: float  # by time.monotonic(), when it was new


class Heartbeat:
    """A context in which a thread counts on and listens to the other processes; another tells.

    Args:
        store: of torch.distributed, shared by all processes.
        rank: this process's.
        world_size: the number of processes.
        minutes: for how long the others are waited for, to say so.
    """

    def __init__(self, store: Any, rank: int, world_size: int, minutes: float) -> None:
        self._store, self._rank, self._minutes = store, rank, minutes
        self._others = [other for other in range(world_size) if other != rank]
        self.silent_seconds = min(SILENT_SECONDS, SHARE * 60 * minutes)
        self._late_seconds = max(self.silent_seconds, LATE_SHARE * 60 * minutes)
        self._heard: dict[int, Heard] = {}
        self._named: set[int] = set()
        self._late: set[int] = set()
        self._ended = threading.Event()
        # The store does not answer where its own process is the one that was stopped.
        self._threads = [
            threading.Thread(target=target, name="heartbeat", daemon=True)
            for target in (self._beat, self._watch)
        ]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    @property
    def silent(self) -> list[int]:
        """The processes that have not been heard of for a while."""
        now = time.monotonic()
        return [
            r for r, heard in list(self._heard.items()) if now - heard.since > self.silent_seconds
        ]

    @property
    def behind(self) -> list[int]:
        """Those that have not come to where this process waits, or waited last, but run."""
        silent = self.silent
        return [
            rank
            for rank, heard in list(self._heard.items())  # another thread adds to them
            if heard.meetings < meetings.count and rank not in silent
        ]

    def _beat(self) -> None:
        where, count = f"{os.getpid()} on {os.uname().nodename}", 0
        while True:
            with contextlib.suppress(Exception):  # the store is gone: so is the job
                self._store.set(f"{self._rank}", f"{count} {meetings.count} {where}")
                self._listen()
            count += 1
            if self._ended.wait(self.silent_seconds / BEATS):
                return

    def _watch(self) -> None:
        while not self._ended.wait(self.silent_seconds / BEATS):
            self._tell_of_silent()
            self._tell_of_late()

    def _listen(self) -> None:
        """Note who has counted on since the last time."""
        for other in self._others:
            if self._store.check([f"{other}"]):
                beat, met, where = self._store.get(f"{other}").decode().split(" ", 2)
                if other not in self._heard or int(beat) != self._heard[other].beat:
                    self._heard[other] = Heard(int(beat), int(met), where, time.monotonic())

    def _tell_of_silent(self) -> None:
        """Tell who is silent, and who is no more."""
        silent = self.silent
        if self._tells(silent):
            for rank in silent:
                if rank not in self._named:
                    since = f"has not been heard of for {self.silent_seconds:.0f} s"
                    self._tell(rank, f"{since}; {self._limit}")
            for rank in self._named.difference(silent):
                self._tell(rank, "is back")
        self._named = set(silent)

    def _tell_of_late(self) -> None:
        """Tell who runs, but has let this process wait for long."""
        since, count = meetings.since, meetings.count
        late = []
        if since is not None and time.monotonic() - since > self._late_seconds:
            late = self.behind
        if count == meetings.count and self._tells([*late, *self.silent]):
            for rank in set(late) - self._late:
                where = "runs, but has not come to where the others wait since"
                self._tell(rank, f"{where} {self._late_seconds:.0f} s; {self._limit}")
        self._late = set(late)

    @property
    def _limit(self) -> str:
        return f"it is waited for at most {self._minutes:g} minutes"

    def _tells(self, others: list[int]) -> bool:
        """Whether this is the process that tells of others: the first that is none of them."""
        return all(rank in others for rank in range(self._rank))

    def _tell(self, rank: int, what: str) -> None:
        print(f"fbopt train: {self.name(rank)} {what}", file=sys.stderr, flush=True)

    def name(self, rank: int) -> str:
        """A process with its number and machine."""
        heard = self._heard.get(rank)
        return f"process {rank} ({heard.where})" if heard else f"process {rank}"

    def why(self, seconds: float) -> tuple[str, bool] | None:
        """Why the others have been waited for in vain for so long, and whether this process is the
        one to tell; None where nothing is known.
        """
        silent, behind = self.silent, self.behind
        if silent:
            waited = f"{self._minutes:g} minutes"
            if seconds < 0.9 * 60 * self._minutes:
                waited = f"{self.silent_seconds:.0f} s and more"
            what = f"did not answer for {waited}: look after it"
            return f"{self._names(silent)} {what}", self._tells(silent)
        if behind and seconds > 0.9 * 60 * self._minutes:
            what = f"did not come to where the others wait for {self._minutes:g} minutes: it runs, "
            return f"{self._names(behind)} {what}so see what it does", self._tells(behind)
        return None

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(map(self.name, ranks))


@contextlib.contextmanager
def telling(text: str, minutes: float) -> Any:
    """Print a text to stderr if what is done within takes long."""
    timer = threading.Timer(
        min(SILENT_SECONDS, SHARE * 60 * minutes),
        lambda: print(text, file=sys.stderr, flush=True),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
