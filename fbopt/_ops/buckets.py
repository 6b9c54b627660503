"""Flat buckets: lists of tensors by device and dtype, many small ones packed into one tensor.

A kernel call pays about 0.2 µs for every tensor in its list before it computes anything. Many small
tensors are therefore copied into one flat buffer first, and the kernels then see one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt._ops.flat import (
    ALIGN,
    accumulator_dtype,
    by_device_and_dtype,
    flat_size,
    flat_views,
    stacks_like,
)
from fbopt._sharding import Sharding, combine, local, working_device

# Copying a tensor of this mean size costs about what it saves; fewer tensors are not worth a call.
PACK_NUMEL, PACK_COUNT = 512, 16


class FlatBuckets:
    """Hands parameters, and lists of tensors of their shapes, to the kernels.

    Of sharded parameters (DTensors) the kernels get this process's shards; those of one bucket lie
    over the same process groups.

    Attributes:
        params: the parameters.
        locals: this process's shard of each parameter, and plain parameters themselves.
        sharding: where the shards lie; None if all parameters are plain.
        indices: for each bucket its parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sharding = Sharding.of(self.params)
        self.locals = self.params if self.sharding is None else self.sharding.locals
        # What is packed, and so the units of exact sums, follows from the sizes of whole tensors.
        kinds = by_device_and_dtype(self.params)
        packed = [_worth_packing([self.params[i] for i in kind]) for kind in kinds]
        if self.sharding is None:
            self.indices, self._packed = kinds, packed
        else:
            split = [self.sharding.split(kind) for kind in kinds]
            self.indices = [bucket for buckets in split for bucket in buckets]
            self._packed = [p for p, b in zip(packed, split, strict=True) for _ in b]
        # Packed tensors lie row by row; a shard may be a view that does not.
        self._members = [
            [self.locals[i].contiguous() if packed else self.locals[i] for i in group]
            for group, packed in zip(self.indices, self._packed, strict=True)
        ]
        self._devices = [members[0].device for members in self._members]
        self._buffers: dict[str, list[Tensor | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parameters alone: the buffers hold nothing between calls."""
        return FlatBuckets, (self.params,)

    def gather(self, tensors: Sequence[Tensor], slot: str) -> list[list[Tensor]]:
        """Return the tensors of each bucket; those of a packed one as one flat tensor.

        The next call with the same slot overwrites that tensor.
        """
        if self.sharding is not None:
            tensors = self.sharding.shards(tensors)
        return self.group(tensors, slot)

    def group(self, tensors: Sequence[Tensor], slot: str) -> list[list[Tensor]]:
        """:meth:`gather` for tensors that are local already."""
        if len(self.indices) == 1:
            part = list(tensors)
            return [self.pack(0, part, slot) if self._packed[0] else part]
        parts = [[tensors[i] for i in group] for group in self.indices]
        return [
            self.pack(k, part, slot) if self._packed[k] else part for k, part in enumerate(parts)
        ]

    def gather_stacks(self, stacks: Sequence[Tensor]) -> list[list[Tensor]]:
        """:meth:`gather` for stacks (K, *shape) of plain tensors; of a packed bucket (K, total)."""
        parts = [[stacks[i] for i in group] for group in self.indices]
        return [
            [torch.cat([x.flatten(1) for x in part], dim=1)] if packed else part
            for packed, part in zip(self._packed, parts, strict=True)
        ]

    def pack(self, group: int, tensors: Sequence[Tensor], slot: str) -> list[Tensor]:
        """Return the tensors of one packed bucket as one flat tensor."""
        buffers = self._buffers.setdefault(slot, [None] * len(self.indices))
        flat = buffers[group]
        if flat is None:
            flat = buffers[group] = self._flat(group, tensors[0].dtype)
        dispatch.pack_(flat, list(tensors))
        return [flat]

    @functools.cached_property
    def devices(self) -> set[torch.device]:
        """Where the model computes with the parameters."""
        return {working_device(p) for p in self.params}

    def device(self, bucket: int) -> torch.device:
        """Where the parameters of a bucket are."""
        return self._devices[bucket]

    def current(self) -> list[Tensor]:
        """Return ``locals`` as they are now: a parameter may have got other memory."""
        return self.params if self.sharding is None else [local(p) for p in self.params]

    def memory(self) -> list[Tensor | None]:
        """For each packed bucket the flat tensor over its parameters' own memory.

        None for others, and where they do not lie as :meth:`views` lays them out.
        """
        return [
            _flat_memory(members) if packed and self.sharding is None else None
            for members, packed in zip(self._members, self._packed, strict=True)
        ]

    def buffers(self, *, wide: bool = False) -> list[Tensor]:
        """Return flat zeros for each bucket, in its dtype or (wide) in that of its sums."""
        return [
            self._flat(k, accumulator_dtype(members[0].dtype) if wide else members[0].dtype)
            for k, members in enumerate(self._members)
        ]

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return for each parameter its view into the flat buffers of the buckets."""
        found: list[Tensor] = list(self.locals)
        for k, (group, flat) in enumerate(zip(self.indices, flats, strict=True)):
            for i, view in zip(
                group, flat_views(flat, self._members[k], self._align(k)), strict=True
            ):
                found[i] = view
        return found

    def stacked_buffers(
        self, count: int, memory: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return a flat buffer of `count` copies for each bucket, and each parameter's copies.

        Those are views (count, *shape), as :meth:`gather_stacks` groups them. The buffers lie in
        `memory`, those of more copies, if it is given.
        """
        flats: list[Tensor] = []
        found: list[Tensor] = list(self.locals)
        for k, (group, members) in enumerate(zip(self.indices, self._members, strict=True)):
            whole = [self._flat(k, members[0].dtype)] if self._packed[k] else members
            stacks = stacks_like(whole, count)
            size = flat_size(stacks)
            options = {"dtype": members[0].dtype, "device": members[0].device}
            flat = memory[k][:size] if memory else torch.zeros(size, **options)
            views = flat_views(flat, stacks)
            if self._packed[k]:
                pieces = views[0].split([m.numel() for m in members], dim=1)
                pairs = zip(pieces, members, strict=True)
                views = [
                    piece.unflatten(1, m.shape) if m.dim() else piece[:, 0] for piece, m in pairs
                ]
            for i, view in zip(group, views, strict=True):
                found[i] = view
            flats.append(flat)
        return flats, found

    def operands(self, flats: Sequence[Tensor], views: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for each bucket what the kernels take: its flat buffer if packed, or views."""
        return [
            [flat] if packed else [views[i] for i in group]
            for group, packed, flat in zip(self.indices, self._packed, flats, strict=True)
        ]

    def squared_norm(self, parts: Sequence[Sequence[Tensor]], stacked: bool = False) -> Tensor:
        """Return ``||x||^2`` of gathered tensors, over all processes: 0-dim, float64; or (K,)."""
        if self.sharding is None:
            return dispatch.squared_norm([x for part in parts for x in part], stacked)
        device = self._members[0][0].device
        squares = torch.stack([dispatch.squared_norm(part).to(device) for part in parts])
        groups = [self.sharding.groups[group[0]] for group in self.indices]
        return combine(squares, groups).sum()

    def adaptive_norms(
        self,
        theta: Sequence[Sequence[Tensor]],
        parts: Sequence[Sequence[Tensor]],
        eta: float,
        stacked: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return ``||x||^2`` and ``||T x||^2``, T = abs(theta) + eta: see :meth:`squared_norm`."""
        pairs = zip(theta, parts, strict=True)
        found = [dispatch.adaptive_norms(p, x, eta) for p, x in pairs]
        if len(found) > 1 or self.sharding is not None:
            device = found[0].device
            each = torch.stack([norms.to(device) for norms in found])
            if self.sharding is not None:
                groups = [self.sharding.groups[group[0]] for group in self.indices]
                each = combine(each, groups)
            found = [each.sum(0)]
        plain, scaled = found[0].unbind()
        return plain, scaled

    def maxima(self, maxima: Tensor) -> Tensor:
        """Return the largest over all processes of a number for each tensor of :meth:`operands`.

        Buckets that are one where nothing is sharded, and packed, share one number.
        """
        if self.sharding is None or not len(maxima):
            return maxima
        counts = [1 if p else len(g) for p, g in zip(self._packed, self.indices, strict=True)]
        pairs = zip(self.indices, counts, strict=True)
        groups = [self.sharding.groups[group[0]] for group, n in pairs for _ in range(n)]
        maxima = combine(maxima, groups, largest=True)
        parts = maxima.split(counts)
        kinds = [(m[0].device, m[0].dtype) for m in self._members]
        for kind in set(kinds):
            alike = [parts[k] for k, other in enumerate(kinds) if other == kind and self._packed[k]]
            if len(alike) > 1:
                largest = torch.stack(alike).max()
                for part in alike:
                    part.fill_(largest)
        return maxima

    def _flat(self, group: int, dtype: torch.dtype) -> Tensor:
        members = self._members[group]
        size = flat_size(members, self._align(group))
        return torch.zeros(size, dtype=dtype, device=members[0].device)

    def _align(self, group: int) -> int:
        return 1 if self._packed[group] else ALIGN


def _worth_packing(members: Sequence[Tensor]) -> bool:
    small = sum(p.numel() for p in members) <= PACK_NUMEL * len(members)
    return small and len(members) >= PACK_COUNT and all(p.is_contiguous() for p in members)


def _flat_memory(members: Sequence[Tensor]) -> Tensor | None:
    """A 1-D tensor over the memory of tensors that lie one after the other; None for others."""
    first = members[0].detach()
    storage, place = first.untyped_storage(), first.data_ptr()
    for p in members:
        own = p.is_contiguous() and p.untyped_storage().data_ptr() == storage.data_ptr()
        if not own or p.data_ptr() != place:
            return None
        place += p.nbytes
    size = sum(p.numel() for p in members)
    return first.as_strided((size,), (1,), first.storage_offset())
