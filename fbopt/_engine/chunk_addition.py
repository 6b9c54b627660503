"""What takes the gradients of a chunk as autograd makes them: adds them to sums, or keeps them."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fbopt._engine.gradient_sums import GradientSums

# Small gradients wait for each other until they have this many bytes: a kernel call costs about as
# much as reading 20 kB, and what waits takes memory.
BATCH_BYTES = 4 * 2**20


class ChunkAddition:
    """Adds ``weight * g`` to sums gradient by gradient, in batches of some megabytes.

    Args:
        sums: where they are added.
        weight: of the chunk.
        are_local: gradients are plain tensors, the shards of this process.
        share: how many such objects wait at once.

    Attributes:
        repetitions: the most additions to one sum.
    """

    def __init__(
        self, sums: GradientSums, weight: float | Tensor, *, are_local: bool = False, share: int = 1
    ) -> None:
        self._sums, self._weight, self._share = sums, weight, share
        self._add_some = sums.add_shards if are_local else sums.add_some
        self._waiting: dict[torch.cuda.Stream | None, dict[int, Tensor]] = {}
        self._bytes, self._times = 0, collections.Counter[int]()
        self._streams: list[torch.cuda.Stream] = []
        self._lock = threading.Lock()
        for device in {p.device for p in sums.params}:
            sums.scalar(weight, device)  # made before other streams read it

    @property
    def repetitions(self) -> int:
        return max(self._times.values(), default=0)

    def take(self, index: int, grad: Tensor) -> None:
        """Add one parameter's gradient."""
        # Autograd calls hooks on the stream that the gradient was made on.
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        with self._lock:
            batch = self._waiting.setdefault(stream, {})
            batch[index] = batch[index] + grad if index in batch else grad
            self._bytes += grad.nbytes
            if self._bytes * self._share >= BATCH_BYTES:
                self._add()

    def finish(self) -> None:
        """Add what still waits; the current streams then wait for the others."""
        self._add()
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @torch.no_grad()
    def _add(self) -> None:
        for stream, batch in self._waiting.items():
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                for other in self._streams:
                    if stream is not None and other != stream:
                        stream.wait_stream(other)
                self._add_some(batch, self._weight)
            self._streams += [] if stream is None or stream in self._streams else [stream]
            self._times.update(batch.keys())
        self._waiting, self._bytes = {}, 0


class ApartAddition:
    """Adds ``sum_r w_r g_r`` where a gradient comes with the shares g_r of all processes.

    Args:
        sums: where they are added.
        weights: w_r by rank.
        shares: returns a gradient's shares by rank.
    """

    def __init__(
        self,
        sums: GradientSums,
        weights: Mapping[int, float],
        shares: Callable[[Tensor], Mapping[int, Tensor]],
    ) -> None:
        self._shares = shares
        self._additions = {
            rank: ChunkAddition(sums, weight, are_local=True, share=len(weights))
            for rank, weight in weights.items()
            if weight
        }

    def take(self, index: int, grad: Tensor) -> None:
        """Add one parameter's gradients."""
        shares = self._shares(grad)
        for rank, addition in self._additions.items():
            addition.take(index, shares[rank])

    def finish(self) -> None:
        """Add what still waits."""
        for addition in self._additions.values():
            addition.finish()


class ChunkCollection:
    """Keeps the gradients of one chunk; `grads` holds those of all parameters, None for none."""

    def __init__(self, count: int) -> None:
        self.grads: list[Tensor | None] = [None] * count
        self._lock = threading.Lock()

    def take(self, index: int, grad: Tensor) -> None:
        """Add one parameter's gradient."""
        with self._lock, torch.no_grad():
            known = self.grads[index]
            self.grads[index] = grad if known is None else known + grad
