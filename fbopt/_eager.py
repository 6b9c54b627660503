"""Methods that torch.compile does not trace: a caller that is compiled breaks its graph there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method as plain Python also where the caller is compiled.

    Unlike ``torch.compiler.disable`` as a decorator, this does not import the compiler.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return run
