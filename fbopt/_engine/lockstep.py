"""Chunks that processes visit together. Where they share the shards of parameters (DTensors) they
have to work on the same chunk at a time; where FSDP2 averages gradients over them, the k-th chunks
of all form one: g_k = sum_r w_r g_r / W_k, W_k = sum_r w_r, by losses scaled by w_r |G| / W_k.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from fbopt._distributed import Collectives
from fbopt._engine.inputs import tensors
from fbopt._sharding import any_sharded, mesh_groups

Weighed = tuple[int, Any, float]
BLOCK = 2**20


class Lockstep:
    """Keeps processes that share parameters at the same chunk; nothing where none does.

    Args:
        params: the parameters.
        collectives: of the processes with different chunks.
        averaged: the names of process groups over which FSDP2 averages gradients.

    Attributes:
        is_joint: whether backward passes average gradients over the processes of `collectives`.
        weight: the joint weight W_k of the chunk at work.
        scale: what this process's loss has to be multiplied by.
        weights: the weights of all processes' chunks by rank.

    Raises:
        ValueError: the group and the parameters' meshes do not go together.
    """

    def __init__(
        self, params: Sequence[Tensor], collectives: Collectives, averaged: set[str]
    ) -> None:
        self._collectives, self._device = collectives, params[0].device
        self._same: list[Collectives] = []
        own = set() if collectives.is_single else set(collectives.ranks())
        me = collectives.global_rank()
        size, joint = 1, False
        for name in mesh_groups(params):
            group = Collectives.named(name)
            ranks = set(group.ranks())
            if not ranks & own - {me}:
                self._same.append(group)
            elif name not in averaged:
                raise ValueError(_misfit("has processes that share a tensor-parallel parameter"))
            elif ranks <= own:
                size, joint = size * group.world_size, True
            else:
                raise ValueError(_misfit("lacks processes that FSDP2 averages gradients over"))
        if joint and size != len(own):
            raise ValueError(_misfit("has processes that FSDP2 does not average gradients over"))
        if joint and not all(any_sharded([p]) for p in params):
            raise ValueError(
                "FSDP2 averages gradients over process_group, but not those of parameters that are "
                "no DTensors (ignored_params?): let fully_shard shard all, or freeze them"
            )
        self.is_joint = joint
        self._is_watched = joint or bool(averaged)
        self._is_compared = False
        self.weight, self.scale, self.weights = 0.0, 1.0, dict[int, float]()

    def __call__(self, chunks: Iterable[Weighed], of: Any) -> Iterator[Weighed]:
        """Yield (index, chunk, own weight), in step with the other processes.

        Chunks of weight 0, jointly where they are visited together, are left out.

        Args:
            chunks: this process's.
            of: what they come from; its length is compared if it has one.
        """
        if not self._same and not self.is_joint:
            for chunk in chunks:
                if chunk[2]:
                    yield chunk
            return
        iterator, index = iter(chunks), 0
        while True:
            item, error = None, None
            try:
                item = next(iterator, None)
            except Exception as failure:
                error = failure
            self._meet(index, item, len(of) if isinstance(of, Sized) else 0, error)
            if item is None:
                return
            if self.weight:
                yield item
            index += 1

    def join(self, weight: float, error: Exception | None = None, here: bool = True) -> None:
        """Exchange the weights of the processes' chunks."""
        self.weight, self.scale, self.weights = weight, 1.0, {}
        if not self.is_joint:
            if error is not None:
                raise error
            return
        try:
            found = self._collectives.agree([], [here, weight], self._device, error=error)
        except RuntimeError as failure:
            raise (error or failure) from None
        if error is not None:
            raise error
        if any(row[0] != found.table[0][0] for row in found.table):
            raise ValueError(
                "the processes of process_group visit different numbers of chunks, but FSDP2 needs "
                "all of them in every pass: give all as many chunks, if need be a chunk of weight 0"
            )
        weights = [row[1] for row in found.table]
        self.weights = dict(zip(self._collectives.ranks(), weights, strict=True))
        self.weight = math.fsum(weights)
        self.scale = weight * len(weights) / self.weight if self.weight else 0.0

    def check_weights(self, history: int) -> None:
        """Raise on all processes that share shards if they have added chunks of other weights.

        FSDP2 averages gradients alike, and tensor parallelism needs the same chunks.

        Args:
            history: a checksum of this process's weights.
        """
        for group in self._same:
            if len({row[0] for row in group.agree([], [float(history)], self._device).table}) > 1:
                raise ValueError(
                    "the processes that share the shards of parameters have added chunks of "
                    "different weights, but those that are not in process_group (with None: all) "
                    "have to add the same: pass process_group=, the processes that have different "
                    "ones, and call accumulator.backward(loss, weight)"
                )

    def _meet(self, index: int, item: Weighed | None, count: int, error: Exception | None) -> None:
        weight = 0.0 if item is None else item[2]
        if self._is_watched or (index == 0 and not self._is_compared):
            number = 0.0
            if item is not None and not self._is_compared:
                number = digest(item[1])
            facts = [item is not None, weight, number, 0 if self._is_compared else count]
            for group in self._same:
                error = self._compare(group, facts, error)
        self.join(weight, error, item is not None)
        self._is_compared = True

    def _compare(
        self, group: Collectives, facts: list[float], error: Exception | None
    ) -> Exception | None:
        try:
            table = group.agree([], facts, self._device, error=error).table
        except RuntimeError as failure:
            return error or failure
        if error is None and any(row != table[0] for row in table):
            return ValueError(
                "the processes that share the shards of parameters visit different chunks, but "
                "those that are not in process_group (with None: all) have to visit the same, in "
                "the same order and of the same weight: give all the same chunks; or, for FSDP2, "
                "pass process_group=, the processes that have different ones"
            )
        return error


def _misfit(what: str) -> str:
    return (
        f"process_group {what}: pass the processes that have different chunks and nothing else, "
        "with fully_shard its data-parallel mesh (mesh.get_group()), with tensor parallelism the "
        "other dimension of the mesh; None where all processes have the same chunks"
    )


@torch.no_grad()
def digest(chunk: Any) -> float:
    """Return a checksum of the tensors in a chunk, below 2**32."""
    found = 0
    for t in tensors(chunk):
        if t.layout == torch.strided and not t.is_meta:
            facts = repr((t.dtype, tuple(t.shape), _sum(t)))
            found = zlib.crc32(facts.encode(), found)
    return float(found)


def _sum(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = 0
    for block in raw.split(BLOCK):
        places = torch.arange(1, len(block) + 1, device=raw.device)
        total = total * 31 + int((block * places).sum())
    return total % 2**61
