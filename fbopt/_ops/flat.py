"""Views of tensors into flat buffers, and checks of memory layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tensors in a flat buffer begin at multiples of this many elements: kAlign of csrc/stable_abi.h.
ALIGN = 16
_is_cpu, _dtype = operator.attrgetter("is_cpu"), operator.attrgetter("dtype")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat_views(flat: Tensor, like: Sequence[Tensor], align: int = ALIGN) -> list[Tensor]:
    """Views into a 1-D tensor with the shapes and dense strides of `like`, one after the other.

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


def stacks_like(tensors: Sequence[Tensor], chunks: int) -> list[Tensor]:
    """Meta tensors (chunks, *shape), each slice as dense in memory as its tensor would be.

    Their :func:`flat_views` are where :func:`fbopt.reference.perturb_` writes the shifted points of
    several chunks.
    """
    meta = [torch.empty_like(t, device="meta") for t in tensors]
    shapes = [((chunks, *t.shape), (t.numel(), *t.stride())) for t in meta]
    pairs = zip(shapes, meta, strict=True)
    return [torch.empty_strided(*shape, dtype=t.dtype, device="meta") for shape, t in pairs]


def _starts(like: Sequence[Tensor], align: int) -> list[int]:
    starts, end = [], 0
    for t in like:
        starts.append(-(-end // align) * align)
        end = starts[-1] + t.numel()
    return starts


def scalar_on(device: torch.device, value: float | Tensor) -> Tensor:
    """Return a number or a tensor of one element as a 0-dim float64 tensor on a device.

    A number is filled in on the device: a copy from the host would wait for the device.
    """
    if isinstance(value, Tensor):
        value = value.detach().reshape(())
        if value.device.type != "cpu" or device.type == "cpu":
            return value.to(device, torch.float64)
        value = value.item()
    return torch.full((), value, dtype=torch.float64, device=device)


def by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that one kernel call can take together, in order of appearance."""
    if all(map(_is_cpu, tensors)) and len(set(map(_dtype, tensors))) == 1:  # the usual case
        return [list(range(len(tensors)))]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    return list(groups.values())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements share memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0  # how far the dimensions of smaller stride extend; a stride within it may overlap
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (n - 1)
    return False


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory, in any order of dimensions."""
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()
