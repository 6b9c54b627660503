"""Who could have written a file: for what is loaded, nobody but this user and root.

A library that is loaded runs as this user, so it must lie where no other user could put it: it, its
folder and every folder above have to belong to this user or to root, and nobody else may write to
them (to folders above, in sticky ones such as /tmp, everybody may). Links are not followed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

GROUP, OTHERS = stat.S_IWGRP, stat.S_IWOTH


class Untrusted(OSError):
    """A file or folder that another user could have changed; the message says why."""


def check_folder(folder: Path) -> None:
    """Raise Untrusted unless nobody but this user and root can change what is in a folder.

    Of links in its path, both where they lie and where they lead to is looked at. Raises OSError
    where it cannot be looked at.
    """
    ways = {folder.absolute(), folder.resolve()}
    for above in sorted({parent for way in ways for parent in way.parents}):
        _check(above, above.stat(), sticky=True)
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    _check(folder, found)


def open_file(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file in a folder that was checked; raise Untrusted as `check_folder` does.

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


def make_private(folder: Path) -> None:
    """Make a folder for this user alone; from one that is this user's take what others may write.

    Raises OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
