"""Who could have written a file: for what is loaded, nobody but this user and root.

A library that is loaded runs as this user, so it must lie where no other user could put it: it, its
folder and every folder above have to belong to this user or to root, and nobody else may write to
them (to folders above, in sticky ones such as /tmp, everybody may). Links are resolved first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

GROUP, OTHERS = stat.S_IWGRP, stat.S_IWOTH


class Untrusted(OSError):
    """A file or folder that another user could have changed; the message says why."""


def checked_folder(folder: Path) -> Path:
    """Return a folder by a path without links, once nobody but this user and root can change it.

    A link that somebody turns elsewhere afterwards is then of no account. Raises Untrusted where
    others could change something, OSError where it cannot be looked at.
    """
    real = folder.resolve(strict=True)
    for above in reversed(real.parents):
        _check(above, above.lstat(), sticky=True)
    found = real.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    _check(real, found)
    return real


def open_file(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file in a folder that was checked; raise Untrusted as `checked_folder` does.

    A link, a pipe or a device is refused, and nothing is truncated. With os.O_CREAT a new file is
    for this user alone.
    """
    # Without O_NONBLOCK a pipe that nobody writes to would wait for ever.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Untrusted(f"{path} is no regular file")
        _check(path, found)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b")


def make(folder: Path) -> None:
    """Make a folder, and those above that are missing, for this user alone. Raises OSError."""
    for missing in reversed([folder, *folder.parents]):
        # What is there is left as it is: it may be a folder that others use, such as /tmp.
        missing.mkdir(mode=0o700, exist_ok=True)


def close(folder: Path) -> None:
    """Take from a folder that is this user's, and fbopt's own, what others may write."""
    found = folder.lstat()
    open_to = found.st_mode & (GROUP | OTHERS)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and open_to:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~(GROUP | OTHERS | stat.S_ISVTX))


def _check(path: Path, found: os.stat_result, sticky: bool = False) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.getuid(), 0):
        raise Untrusted(f"{path} belongs to {_name(found.st_uid)}")
    if sticky and mode & stat.S_ISVTX:
        return
    if mode & OTHERS:
        raise Untrusted(f"everybody can write to {path} (mode {mode:o})")
    if mode & GROUP and not _is_own_group(found):
        raise Untrusted(f"the group {_group(found.st_gid)} can write to {path} (mode {mode:o})")


def _is_own_group(found: os.stat_result) -> bool:
    """Whether a file's group is the one that many systems make for a user alone."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    return (
        user.pw_gid == found.st_gid
        and user.pw_name == group.gr_name
        and set(group.gr_mem) <= {user.pw_name}
    )


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user {uid}"


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
