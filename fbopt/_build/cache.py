"""The cache of compiled libraries: its folder, file names, and locks between processes.

A library's file name holds a hash of its inputs and a hash of its own bytes. It is built under a
lock that the system releases when the process dies, and moved into place as the last step: a build
killed at any moment leaves nothing that blocks the next one. A folder or a file that another user
could have changed is not used: see trust.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fbopt._build import trust
from fbopt._build.compiler import BuildError, limit

POLL_SECONDS = 0.1
NEWS_SECONDS = 30.0
_told: set[str] = set()  # what was said of folders that are not used


def cache_folder() -> Path:
    """Return the cache folder: FBOPT_CACHE_DIR, or else fbopt in the user's cache folder."""
    if folder := os.environ.get("FBOPT_CACHE_DIR"):
        return Path(folder).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # The tilde of an account without a home stays as it is.
    return Path(home, "fbopt") if os.path.isabs(home) else _temporary_cache()


def cached(folder: Path, stem: str) -> Path | None:
    """Return the library if it is in the folder, nobody else could have written it, and its bytes
    match the hash in its name.
    """
    try:
        folder = trust.checked_folder(folder)
    except trust.Untrusted as error:
        _tell(error)
        return None
    except OSError:
        return None
    for path in folder.glob(f"{stem}.*.so"):
        # Another process may be replacing it just now; what is not to be trusted is built anew.
        with contextlib.suppress(OSError), trust.open_file(path) as file:
            if path.name == f"{stem}.{_hash(file.read())}.so":
                return path
    return None


def keep(built: Path, folder: Path, stem: str) -> Path:
    """Move a new library to where ``cached`` finds it."""
    built.chmod(0o755)  # whatever the umask is
    return built.replace(folder / f"{stem}.{digest(built)}.so")


def writable(folder: Path) -> Path:
    """Return the folder, without links in its path, or a private one among the temporary files if
    it is read-only, or another user could change what is in it.
    """
    try:
        trust.make(folder)
        real = trust.checked_folder(folder)
        tempfile.TemporaryFile(dir=real).close()
        return real
    except trust.Untrusted as error:
        _tell(error)
    except OSError:
        pass
    return _temporary_cache()


def _tell(error: trust.Untrusted) -> None:
    """Say once why a folder is not used, and what to do."""
    if str(error) not in _told:
        _told.add(str(error))
        print(
            f"fbopt: {cache_folder()} is not used, as others could put code there: {error}; set "
            "FBOPT_CACHE_DIR to a folder that only you can write to (or, to share one, that only "
            "root can)",
            file=sys.stderr,
            flush=True,
        )


def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir(), f"fbopt-{os.getuid()}")
    try:
        trust.make(folder)
        if folder.is_symlink():
            raise trust.Untrusted(f"{folder} is a link")
        trust.close(folder)
        return trust.checked_folder(folder)
    except trust.Untrusted as error:
        cure = "set FBOPT_CACHE_DIR to a folder that only you can write to"
        raise BuildError(str(error), cure) from error


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[Callable[[str], None]]:
    """Hold a system lock on a file, which is released when the process ends, even if killed.

    Should another hold it, say that it is doing `what`, and wait for as long as FBOPT_WAIT_MINUTES
    says. The file names the process that holds it, which may note there how far it has come, by
    the function that is yielded: then it is waited for anew.

    Raises:
        BuildError: it was held for all that time, without a note.
    """
    import fcntl

    minutes, holder = limit("FBOPT_WAIT_MINUTES"), ""
    with trust.open_file(path, os.O_RDWR | os.O_CREAT) as file:
        end, news = time.monotonic() + 60 * minutes, 0.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                now = time.monotonic()
                file.seek(0)
                before, holder = holder, file.read(200).decode(errors="replace").strip()
                holder = holder or "another process"
                if holder != before:
                    end = now + 60 * minutes
                if now > end:
                    raise BuildError(
                        f"{path} has been locked for {minutes:g} minutes by {holder}, which is "
                        f"{what}",
                        "stop that process, or set FBOPT_CACHE_DIR to another folder",
                    ) from error
                if now > news:
                    left = f"for at most {minutes:g} minutes"
                    waiting = f"fbopt: waiting {left} for {holder}, which is {what}"
                    print(waiting, file=sys.stderr, flush=True)
                    news = now + NEWS_SECONDS
            except OSError:
                break  # a file system without locks: at worst two processes do the same work
            time.sleep(POLL_SECONDS)

        def note(progress: str = "") -> None:
            with contextlib.suppress(OSError):  # a full disk
                file.seek(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}{progress}\n".encode())
                file.truncate()
                file.flush()

        note()
        yield note


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove leftovers of killed builds of this key, and broken libraries; needs the lock."""
    for path in (p for end in ("build-*", "*.so", "log") for p in folder.glob(f"{stem}.{end}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def digest(path: Path) -> str:
    """Return a hash of the file's bytes, short enough for a name."""
    return _hash(path.read_bytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
