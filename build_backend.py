"""Setuptools' build backend, which also requires torch where a wheel's kernels are compiled.

An editable install compiles nothing and needs no torch.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other hooks are setuptools' own)

from fbopt._build.compiler import BuildError, find_compiler

FOR_KERNELS = ["torch>=2.10", "ninja", "pybind11>=2.12"]


def get_requires_for_build_wheel(config_settings=None):
    """Return the requirements of a wheel's build, before any of them is installed."""
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    try:
        require_compiler()
    except BuildError:
        return needed
    return needed + FOR_KERNELS


def require_compiler():
    """Raise a BuildError that says why the wheel cannot or must not bring compiled kernels."""
    asked = os.environ.get("FBOPT_WHEEL") or None
    if asked not in (None, "source"):
        raise ValueError(f"FBOPT_WHEEL is {asked!r}; set it to source, or unset it")
    if asked:
        raise BuildError("FBOPT_WHEEL asks for the sources alone", "unset it for the kernels")
    find_compiler()
