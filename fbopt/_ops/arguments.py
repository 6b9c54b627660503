"""What every op refuses before it changes anything: derivatives, and results that overlap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fbopt._ops.overlap import check_apart

P, R = ParamSpec("P"), TypeVar("R")


def checked(writes: int, steps: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of an op in plain torch, of which the first so many are written.

    With `steps` it is the optimizer's: gradients are written only where they are sums, with a
    divisor; else each may be the parameter itself, as each element is read before it is written.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(op).parameters)

        @functools.wraps(op)
        def run(*args: P.args, **rest: P.kwargs) -> R:
            given = [*zip(names, args, strict=False), *rest.items()]
            refuse_derivatives(op.__name__, given)
            if writes and not torch.compiler.is_compiling():
                reads_grads = steps and dict(given)["divisor"] is None
                written = [n for n in names[:writes] if n != "grads" or not reads_grads]
                outputs = [pair for pair in given if pair[0] in written]
                inputs = [pair for pair in given if pair[0] not in written]
                check_apart(outputs, inputs, ("params", "grads") if reads_grads else None)
            return op(*args, **rest)

        return run

    return decorate


def refuse_derivatives(op: str, arguments: Iterable[tuple[str, Any]]) -> None:
    """Raise a RuntimeError where autograd would record the op, which has no derivative.

    Args:
        op: its name.
        arguments: the name and the value of each argument.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in arguments:
        is_list = isinstance(value, list | tuple)
        for i, t in enumerate(value if is_list else (value,)):
            if isinstance(t, Tensor) and t.requires_grad:
                which = f"{name}[{i}]" if is_list else name
                raise RuntimeError(
                    f"{which} requires grad, and {op} has no derivative: call it under "
                    f"torch.no_grad(), or on {which}.detach()"
                )
