"""The ops as the rest of the library calls them: the compiled kernels where there are some for the
device, fbopt.reference elsewhere. The only file that uses torch.ops, and calls past it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fbopt._build import load
from fbopt._ops import reference, registration
from fbopt._ops.flat import by_device_and_dtype

P, R = ParamSpec("P"), TypeVar("R")
NAMES = (
    "pack_",
    "squared_norm",
    "perturb_",
    "adaptive_norms",
    "perturb_adaptive_",
    "accumulate_",
    "accumulate_penalty_",
    "accumulate_exact_",
    "accumulate_exact_penalty_",
    "exact_mean_",
    "clip_",
    "sgd_step_",
    "row_products_",
    "combine_rows_",
)
_registering = threading.Lock()
LIBRARIES = {"cpu": load.kernels, "cuda": load.cuda_kernels}


@functools.cache
def table(device_type: str) -> SimpleNamespace | ModuleType:
    """The ops for a device, by name. The first call for a compiled device may build them."""
    library = LIBRARIES[device_type]() if device_type in LIBRARIES else None
    if library is None:
        return reference
    with _registering:
        _register()
    found = {name: getattr(torch.ops.fbopt, name).default for name in NAMES}
    ops = {name: registration.past_autograd(op) for name, op in found.items()}
    if device_type == "cpu":
        ops = {name: _direct(getattr(library, name), op) for name, op in ops.items()}
    return SimpleNamespace(**ops)


@functools.cache
def _register() -> None:
    registration.register("fbopt", NAMES)


def _direct(kernel: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """Call a kernel past torch's dispatcher, unless its arguments need that."""

    def run(*args: Any) -> Any:
        found = kernel(*args)
        return op(*args) if found is NotImplemented else found

    return run


def _on_device_of(position: int, op: Callable[P, R]) -> Callable[P, R]:
    """The op of the reference's name, signature and docstring, on the device of one argument."""
    name, signature = op.__name__, inspect.signature(op)
    names = tuple(signature.parameters)

    @functools.wraps(op)
    def run(*args: P.args, **rule: P.kwargs) -> R:
        given: tuple[Any, ...] = args
        if rule:
            try:
                given += tuple(rule[name] for name in names[len(args) :])
            except KeyError:  # one is left out; ten times as slow as the line above
                given = signature.bind(*args, **rule).args
        return getattr(_table_for(given[position]), name)(*given)

    return run


def _table_for(tensor: Tensor) -> SimpleNamespace | ModuleType:
    # On the CPU without tensor.device, which would take longer than all else here.
    return table("cpu" if tensor.is_cpu else tensor.device.type)


pack_ = _on_device_of(0, reference.pack_)
perturb_ = _on_device_of(0, reference.perturb_)
perturb_adaptive_ = _on_device_of(0, reference.perturb_adaptive_)
accumulate_ = _on_device_of(2, reference.accumulate_)
accumulate_penalty_ = _on_device_of(4, reference.accumulate_penalty_)
accumulate_exact_ = _on_device_of(4, reference.accumulate_exact_)
accumulate_exact_penalty_ = _on_device_of(6, reference.accumulate_exact_penalty_)
exact_mean_ = _on_device_of(5, reference.exact_mean_)
clip_ = _on_device_of(1, reference.clip_)
sgd_step_ = _on_device_of(3, reference.sgd_step_)
row_products_ = _on_device_of(1, reference.row_products_)
combine_rows_ = _on_device_of(1, reference.combine_rows_)


def squared_norm(tensors: Sequence[Tensor], stacked: bool = False) -> Tensor:
    """See :func:`fbopt.reference.squared_norm`; here over several devices and dtypes, or none."""
    if not tensors:
        if stacked:
            raise ValueError("tensors must hold at least one stack: it says how many chunks")
        return torch.zeros((), dtype=torch.float64)
    groups = by_device_and_dtype(tensors)
    parts = [[tensors[i] for i in group] for group in groups]
    squares = [_table_for(part[0]).squared_norm(part, stacked) for part in parts]
    if len(squares) == 1:
        return squares[0]
    return torch.stack([s.to(tensors[0].device) for s in squares]).sum(0)


def adaptive_norms(params: Sequence[Tensor], grads: Sequence[Tensor], eta: float) -> Tensor:
    """See :func:`fbopt.reference.adaptive_norms`; of one device and dtype, at least one tensor."""
    return _table_for(params[0]).adaptive_norms(params, grads, eta)


def are_alike(first: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether tensors are plain, on the CPU, of one dtype that the ops take and without gaps in
    memory, those of the other lists like those of the first. One call answers for all.
    """
    if not first or not first[0].is_cpu:
        return False
    library = load.kernels()
    return library is not None and library.alike(first, *others)
