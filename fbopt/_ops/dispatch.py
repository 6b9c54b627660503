"""The ops as the rest of the library calls them: the compiled kernels where there are some for the
device, fbopt.reference elsewhere. The only file that uses torch.ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fbopt._build import load
from fbopt._ops import reference
from fbopt._ops.flat import by_device_and_dtype

P, R = ParamSpec("P"), TypeVar("R")
NAMES = (
    "pack_",
    "squared_norm",
    "perturb_",
    "accumulate_",
    "accumulate_penalty_",
    "accumulate_exact_",
    "accumulate_exact_penalty_",
    "exact_mean_",
    "clip_",
    "sgd_step_",
)
LIBRARIES = {"cpu": load.kernels, "cuda": load.cuda_kernels}


@functools.cache
def table(device_type: str) -> SimpleNamespace | ModuleType:
    """The ops for a device, by name. The first call for a compiled device may build them."""
    if device_type not in LIBRARIES or LIBRARIES[device_type]() is None:
        return reference
    _register_fakes()
    return SimpleNamespace(**{name: getattr(torch.ops.fbopt, name).default for name in NAMES})


@functools.cache
def _register_fakes() -> None:
    """Tell torch.compile and fake tensors what the ops return; the schema says the rest."""
    for name in NAMES:
        returns = name in ("squared_norm", "perturb_")
        torch.library.register_fake(f"fbopt::{name}", _fake_norm if returns else _fake_none)


def _fake_norm(first: Tensor | list[Tensor], *args: object) -> Tensor:
    like = first if isinstance(first, Tensor) else first[0]
    return like.new_empty((), dtype=torch.float64)


def _fake_none(*args: object) -> None:
    return None


def _on_device_of(position: int, op: Callable[P, R]) -> Callable[P, R]:
    """The op of the reference's name, signature and docstring, on the device of one argument."""
    name = op.__name__

    @functools.wraps(op)
    def run(*args: P.args, **rule: P.kwargs) -> R:
        return getattr(table(args[position].device.type), name)(*args, **rule)

    return run


pack_ = _on_device_of(0, reference.pack_)
perturb_ = _on_device_of(0, reference.perturb_)
accumulate_ = _on_device_of(2, reference.accumulate_)
accumulate_penalty_ = _on_device_of(4, reference.accumulate_penalty_)
accumulate_exact_ = _on_device_of(4, reference.accumulate_exact_)
accumulate_exact_penalty_ = _on_device_of(6, reference.accumulate_exact_penalty_)
exact_mean_ = _on_device_of(5, reference.exact_mean_)
clip_ = _on_device_of(1, reference.clip_)
sgd_step_ = _on_device_of(3, reference.sgd_step_)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`fbopt.reference.squared_norm`; here over several devices and dtypes, or none."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    groups = by_device_and_dtype(tensors)
    parts = [[tensors[i] for i in group] for group in groups]
    squares = [table(part[0].device.type).squared_norm(part) for part in parts]
    if len(squares) == 1:
        return squares[0]
    return torch.stack([s.to(tensors[0].device) for s in squares]).sum()
