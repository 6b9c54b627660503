"""The cache of compiled libraries: its folder, file names, and locks between processes.

A library's file name holds a hash of its inputs and a hash of its own bytes. It is built under a
lock that the system releases when the process dies, and moved into place as the last step: a build
killed at any moment leaves nothing that blocks the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fbopt._build.compiler import BuildError


def cache_folder() -> Path:
    """Return the cache folder: FBOPT_CACHE_DIR, or else fbopt in the user's cache folder."""
    if folder := os.environ.get("FBOPT_CACHE_DIR"):
        return Path(folder).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # The tilde of an account without a home stays as it is.
    return Path(home, "fbopt") if os.path.isabs(home) else _temporary_cache()


def cached(folder: Path, stem: str) -> Path | None:
    """Return the library if it is in the folder and its bytes match the hash in its name."""
    for path in folder.glob(f"{stem}.*.so"):
        # Another process may be replacing it just now.
        with contextlib.suppress(OSError):
            if path.name == f"{stem}.{digest(path)}.so":
                return path
    return None


def keep(built: Path, folder: Path, stem: str) -> Path:
    """Move a new library to where ``cached`` finds it."""
    return built.replace(folder / f"{stem}.{digest(built)}.so")


def writable(folder: Path) -> Path:
    """Return the folder, or a private one among the temporary files if it is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError:
        return _temporary_cache()


def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir(), f"fbopt-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # Never load what another user could have written.
    if folder.lstat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user", "set FBOPT_CACHE_DIR")
    return folder


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a system lock on a file, which is released when the process ends, even if killed.

    Should another hold it, say that it is doing `what`, and wait.
    """
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting = f"fbopt: waiting for another process that is {what}"
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: at worst two processes do the same work.
            pass
        yield


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove leftovers of killed builds of this key, and broken libraries; needs the lock."""
    for path in (p for end in ("build-*", "*.so", "log") for p in folder.glob(f"{stem}.{end}")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def digest(path: Path) -> str:
    """Return a hash of the file's bytes, short enough for a name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
