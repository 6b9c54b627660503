"""glibc's malloc settings that keep freed memory in the process."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed() -> bool:
    """Let glibc keep the memory of freed CPU tensors; return whether it does.

    By default it returns large blocks to the system at once, and in the next step the system clears
    the same pages again, which is noticeable where layers are cheap. Results do not change. The
    setting holds for the whole process, so a program makes it, not a library. Nothing is done with
    other C libraries, or where the environment configures glibc's allocator already.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(os.environ.get(name) for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; a system without dlopen(NULL)
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
