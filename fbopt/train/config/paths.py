"""Words of the command line as paths, refused where the system could never follow them."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

# What another file could cure: there may be something later, or something else.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def path_of(word: str) -> Path:
    """The path that a word names, with ~ for the home folder where it is known.

    Raises argparse.ArgumentTypeError where nobody could look there: for a name that is too long,
    for one with a zero byte, or without permission.
    """
    path = os.path.expanduser(word)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in MISSING:
            reason = f"{error.strerror}; give another path"
            raise argparse.ArgumentTypeError(f"{_short(word)}: {reason}") from error
    except ValueError as error:
        reason = f"{error}; give another path"  # such as "embedded null byte"
        raise argparse.ArgumentTypeError(f"{_short(word)!r}: {reason}") from error
    return Path(path)


def _short(word: str) -> str:
    return word if len(word) <= 60 else f"{word[:40]}… ({len(word):,} characters)"
