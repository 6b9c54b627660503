"""One process trains into a run folder at a time: a lock that the system drops with the process."""

from __future__ import annotations

from filelock import FileLock, Timeout

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError

NAME = ".lock"
PATIENCE = 1.0  # seconds; a killed process may be about to disappear


class Lock:
    """A context in which this process may hold a run folder; leaving it lets go."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()  # the file stays: one that is removed could be locked twice
            self._lock = None

    def hold_existing(self, folder: RunFolder) -> None:
        """Hold the folder of a run if there is one. Raises OptionsError where another does."""
        if folder.options.exists():
            with folder.writing(folder.path):
                self._acquire(folder)

    def hold(self, folder: RunFolder) -> None:
        """Hold the folder, which is made where it is missing. Raises OptionsError."""
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._acquire(folder)
        except OSError as error:
            raise OptionsError(
                f"--out {folder.path}: cannot be written ({atomic.reason(error)}); "
                f"{atomic.cure(error)}, or give another --out"
            ) from error

    def _acquire(self, folder: RunFolder) -> None:
        if self._lock is not None:
            return
        lock = FileLock(folder.path / NAME)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise OptionsError(
                f"{folder.path} is in use: another process is training into it; wait for it or "
                "stop it, or give another --out"
            ) from error
        self._lock = lock
