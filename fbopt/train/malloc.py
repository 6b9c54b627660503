"""Memory that the C library has been given back stays with the process."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed() -> bool:
    """Let glibc keep what tensors on the CPU have freed; returns whether it does.

    By default it hands large blocks back to the system at once, and the next step waits for the
    system to clear the same pages anew, which shows where layers are cheap. Results do not change.
    A program's choice, not a library's: it holds for the whole process. Nothing is done for other C
    libraries, or where the environment tunes glibc's allocator already.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(os.environ.get(name) for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; a system without dlopen(NULL)
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
