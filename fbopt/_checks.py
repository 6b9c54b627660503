"""Checks of arguments; an error names the argument and the cure."""

from __future__ import annotations

import itertools
import math
import numbers
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fbopt._ops.flat import DTYPES, is_dense, overlaps_itself
from fbopt._sharding import any_sharded, local

PLAIN = {Tensor, torch.nn.Parameter}


def check_params(params: Iterable[Tensor], name: str = "params") -> list[Tensor]:
    """Return the parameters as a list, each once, or raise an error that names the bad one."""
    if isinstance(params, Tensor):
        raise TypeError(f"{name} must be an iterable of tensors, not one tensor: pass [{name}]")
    found = list(params)
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(p).__name__}")
    unique = list(dict.fromkeys(found))
    if not unique:
        raise ValueError(f"{name} is empty: pass the parameters to optimize")
    for i, p in enumerate(unique):
        check_storage(p, f"{name}[{i}]")
    check_disjoint(unique, name)
    return unique


def check_storage(tensor: Tensor, name: str) -> None:
    """Refuse tensors that are lazy, meta, sparse, complex, integer or overlap themselves."""
    if type(tensor) not in PLAIN:
        tensor = local(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{name} is uninitialized (of a lazy module): run the model on one input first"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device, which holds no data: move it to a real one, a model "
            "with model.to_empty(device=...)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} is sparse ({tensor.layout}): use a dense one (for an embedding, sparse=False)"
        )
    if tensor.dtype not in DTYPES:
        hint = " (torch.view_as_real makes it two real numbers)" if tensor.is_complex() else ""
        raise TypeError(
            f"{name} is {tensor.dtype}: fbopt takes float32, float64, bfloat16 and float16{hint}"
        )
    if overlaps_itself(tensor):
        raise ValueError(f"{name} overlaps itself (an expanded tensor): pass {name}.contiguous()")


def is_flattened(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors is a piece of a flat parameter of FullyShardedDataParallel."""
    works = torch.distributed.is_available() and torch.distributed.is_initialized()
    return works and any(getattr(t, "_fsdp_flattened", False) for t in tensors)


def refuse_flattened(params: Iterable[Tensor], what: str, cure: str) -> None:
    """Raise ValueError for parameters of FSDP1, which do not say what other processes hold."""
    if is_flattened(params):
        raise ValueError(
            f"{what}: the model is a FullyShardedDataParallel (FSDP1), each process of which holds "
            f"a piece of the gradient alone: {cure}, or shard the model with "
            "torch.distributed.fsdp.fully_shard"
        )


def built_by_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer, which holds some parameters only, makes this optimizer."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    for _ in range(8):
        if frame is None:
            break
        maker = frame.f_locals.get("self")
        if isinstance(maker, module.ZeroRedundancyOptimizer):
            return bool(maker.world_size > 1)
        frame = frame.f_back
    return False


def check_disjoint(tensors: Sequence[Tensor], name: str) -> None:
    """Raise for different tensors that share memory, where an update in place would count twice.

    Strided views may interleave without overlap: of those only the first element is compared.
    """
    if any_sharded(tensors):
        tensors = [local(t) for t in tensors]
    spans = sorted(
        (t.data_ptr(), t.nbytes if is_dense(t) else 1, i)
        for i, t in enumerate(tensors)
        if t.data_ptr() and t.numel()
    )
    for (start, size, i), (other, _, j) in itertools.pairwise(spans):
        if start + size > other and tensors[i].device == tensors[j].device:
            raise ValueError(
                f"{name}[{min(i, j)}] and {name}[{max(i, j)}] share memory but are different "
                "tensors: to tie weights, use the same Parameter object in both places"
            )


def check_grads(
    grads: Sequence[Tensor | None], params: Sequence[Tensor], name: str = "grads"
) -> None:
    """Raise for gradients (or None) that do not fit their parameters, one for one."""
    if isinstance(grads, Tensor):
        raise TypeError(f"{name} must be a list of tensors, one for each parameter, not one tensor")
    if len(grads) != len(params):
        raise ValueError(
            f"{name} has {len(grads)} entries for {len(params)} parameters: pass one each"
        )
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g is None:
            continue
        if not isinstance(g, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor or None, got {type(g).__name__}")
        if g.layout != torch.strided:
            raise TypeError(
                f"{name}[{i}] is sparse: use a dense gradient (for an embedding, sparse=False)"
            )
        for what in ("shape", "dtype", "device"):
            if getattr(g, what) != getattr(p, what):
                raise ValueError(
                    f"{name}[{i}] has {what} {getattr(g, what)}, its parameter {getattr(p, what)}"
                )


def check_number(
    name: str, value: float, *, above: float | None = None, least: float | None = None
) -> float:
    """Return a finite number within its bounds, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return value


def check_scalar(
    name: str,
    value: float | Tensor,
    *,
    read: bool = True,
    above: float | None = None,
    least: float | None = None,
    finite: bool = True,
) -> None:
    """Check a number, or a real tensor of one element: its value only with `read`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a number or a real tensor of one element, got {value.dtype} of "
                f"shape {tuple(value.shape)}"
            )
        if not read:
            return
        value = value.item()
    if finite or value != math.inf:
        check_number(name, value, above=above, least=least)


def check_weight(value: float | Tensor, name: str = "weight") -> float:
    """Return a weight, given as a number or a tensor of one element: at least 0, finite."""
    check_scalar(name, value, least=0)
    return value.item() if isinstance(value, Tensor) else value
