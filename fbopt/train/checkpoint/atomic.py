"""Files that no crash leaves half written: replaced as a whole, or JSON lines that are appended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from fbopt.train.config.options import OptionsError
from fbopt.train.config.reading import read_bytes, reading

PARTIAL = ".partial"  # the suffix of a file that is being written, until it is renamed
CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the folder writable"),
}


class WriteError(RuntimeError):
    """A file of a run that cannot be written; the message says why and what to do."""


def cure(error: OSError) -> str:
    """What the user can do about a file that cannot be written."""
    return CURES.get(error.errno, "check the disk")


def replace(path: Path, content: bytes, temporary: str | None = None) -> None:
    """Write `content` beside `path`, sync it, and rename it over `path`; an error changes nothing.

    `temporary` is the name to write it under first.
    """
    partial = path.with_name(temporary or f".{path.name}{PARTIAL}")
    try:
        if partial.is_fifo():  # a reader would be waited for
            partial.unlink()
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Sync the folder's entries, and so the new name, where the file system can."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(folder)


def replace_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file of one JSON object."""
    replace(path, (json.dumps(values, indent=2) + "\n").encode())


def replace_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines."""
    replace(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records in a file of JSON lines, none where there is no file.

    Lines that are not records are skipped, such as a last one that a crash cut short. Raises
    OptionsError where there is something that cannot be read.
    """
    with reading(f"{path}", OptionsError, "put it back, or remove it"):
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            return []
    records = []
    for line in content.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and _is_step(record)]


def _is_step(record: dict[str, Any]) -> bool:
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool)
