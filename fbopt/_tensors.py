"""Lists of tensors: the checks of every public entry, written once, and flat buffers over them."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where tensors of a flat buffer begin, in elements: kAlign of csrc/compat.h.
ALIGN = 16


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat_views(flat: Tensor, like: Sequence[Tensor], align: int = ALIGN) -> list[Tensor]:
    """Views into a 1-D tensor, one after the other, with the tensors' shapes and dense strides.

    Each begins at a multiple of `align` elements.
    """
    views, first = [], flat.storage_offset()
    for t, start in zip(like, _starts(like, align), strict=True):
        strides = torch.empty_like(t, device="meta").stride()
        views.append(flat.as_strided(t.shape, strides, first + start))
    return views


def flat_size(like: Sequence[Tensor], align: int = ALIGN) -> int:
    """The number of elements that a flat tensor needs for :func:`flat_views`."""
    return _starts(like, align)[-1] + like[-1].numel() if like else 0


def _starts(like: Sequence[Tensor], align: int) -> list[int]:
    starts, end = [], 0
    for t in like:
        starts.append(-(-end // align) * align)
        end = starts[-1] + t.numel()
    return starts


def scalar_on(device: torch.device, value: float | Tensor) -> Tensor:
    """Return a number or a tensor of one element as a 0-dim float64 tensor on a device.

    What the host knows is filled in there: a copy would wait for the device.
    """
    if isinstance(value, Tensor):
        value = value.detach().reshape(())
        if value.device.type != "cpu" or device.type == "cpu":
            return value.to(device, torch.float64)
        value = value.item()
    return torch.full((), value, dtype=torch.float64, device=device)


def by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that one kernel call can take together, in order of appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    return list(groups.values())


def check_params(params: Iterable[Tensor], name: str = "params") -> list[Tensor]:
    """Return the parameters as a list, each once, or raise an error that names the one at fault."""
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
    """Refuse what the kernels cannot work on: lazy, meta, sparse, complex, integer, overlapping."""
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


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0  # of all smaller strides together; a stride within it may meet one of their elements
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (n - 1)
    return False


def check_disjoint(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse different tensors that share memory: an update in place would count twice there.

    Strided views may lie between each other's elements: of those only the first is compared.
    """
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


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in any order of the dimensions."""
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def check_grads(
    grads: Sequence[Tensor | None], params: Sequence[Tensor], name: str = "grads"
) -> None:
    """Refuse gradients that do not fit their parameters, one for one (None: no gradient)."""
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
