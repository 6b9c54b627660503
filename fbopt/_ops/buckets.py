"""Flat buckets: lists of tensors by device and dtype, many small ones packed into one tensor.

A kernel call pays about 0.2 µs for every tensor in its list before it computes anything. Many small
tensors are therefore copied into one flat buffer first, and the kernels then see one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.flat import ALIGN, accumulator_dtype, by_device_and_dtype, flat_size, flat_views

# Copying a tensor of this mean size costs about what it saves; fewer tensors are not worth a call.
PACK_NUMEL, PACK_COUNT = 512, 16


class FlatBuckets:
    """Hands parameters, and lists of tensors of their shapes, to the kernels."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.indices = by_device_and_dtype(self.params)
        self._members = [[self.params[i] for i in group] for group in self.indices]
        self._packed = [_worth_packing(members) for members in self._members]
        self._buffers: dict[str, list[Tensor | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parameters alone: the buffers hold nothing between calls."""
        return FlatBuckets, (self.params,)

    def gather(self, tensors: Sequence[Tensor], slot: str) -> list[list[Tensor]]:
        """Return the tensors of each bucket; those of a packed one as one flat tensor.

        The next call with the same slot overwrites that tensor.
        """
        if len(self.indices) == 1:
            parts = [list(tensors)]
        else:
            parts = [[tensors[i] for i in group] for group in self.indices]
        if not any(self._packed):
            return parts
        buffers = self._buffers.setdefault(slot, [None] * len(parts))
        for k, part in enumerate(parts):
            if self._packed[k]:
                if buffers[k] is None:
                    buffers[k] = self._flat(k, part[0].dtype)
                dispatch.pack_(buffers[k], part)
                parts[k] = [buffers[k]]
        return parts

    def buffers(self, *, wide: bool = False) -> list[Tensor]:
        """Return flat zeros for each bucket, in its dtype or (wide) in that of its sums."""
        return [
            self._flat(k, accumulator_dtype(members[0].dtype) if wide else members[0].dtype)
            for k, members in enumerate(self._members)
        ]

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return for each parameter its view into the flat buffers of the buckets."""
        found: list[Tensor] = list(self.params)
        for k, (group, flat) in enumerate(zip(self.indices, flats, strict=True)):
            for i, view in zip(
                group, flat_views(flat, self._members[k], self._align(k)), strict=True
            ):
                found[i] = view
        return found

    def operands(self, flats: Sequence[Tensor], views: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for each bucket what the kernels take: its flat buffer if packed, or views."""
        return [
            [flat] if packed else [views[i] for i in group]
            for group, packed, flat in zip(self.indices, self._packed, flats, strict=True)
        ]

    def _flat(self, group: int, dtype: torch.dtype) -> Tensor:
        members = self._members[group]
        size = flat_size(members, self._align(group))
        return torch.zeros(size, dtype=dtype, device=members[0].device)

    def _align(self, group: int) -> int:
        return 1 if self._packed[group] else ALIGN


def _worth_packing(members: Sequence[Tensor]) -> bool:
    small = sum(p.numel() for p in members) <= PACK_NUMEL * len(members)
    return small and len(members) >= PACK_COUNT and all(p.is_contiguous() for p in members)
