"""Gradients taken as ``loss.backward()`` makes them: a hook hands p.grad over and leaves None, so
that there is no second copy of all gradients. ``torch.autograd.grad`` calls no hooks.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fbopt._engine.autograd_graph import leaves
from fbopt._engine.fully_sharded import FullySharded, instances
from fbopt._engine.gradient_sums import GradientSums
from fbopt._ops import dispatch
from fbopt._sharding import any_sharded, is_offloaded, locals_of

# Small gradients wait for each other until they have this many bytes: a kernel call costs about as
# much as reading 20 kB, and what waits takes memory.
BATCH_BYTES = 4 * 2**20

Take = Callable[[int, Tensor], None]
_taken: set[int] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def taking(params: Sequence[Tensor], take: Take) -> Iterator[None]:
    """Hand every gradient that backward passes make in this context to ``take(index, gradient)``.

    A parameter may come several times (reentrant checkpointing, several backward passes): its
    gradient is the sum. ``p.grad`` is None afterwards. The calls come from autograd's threads.

    Raises:
        ValueError: a parameter has a gradient already.
        RuntimeError: another such context takes the gradients; or something else than autograd
            left a gradient.
    """
    live = [(i, p) for i, p in enumerate(params) if p.requires_grad]
    for i, p in live:
        if p.grad is not None:
            raise ValueError(
                f"params[{i}] has a gradient already, which backward() would add to: call "
                "optimizer.zero_grad() (set_to_none=True, the default) before the first chunk"
            )
    with _claimed({id(p) for _, p in live}), contextlib.ExitStack() as stack:
        stack.callback(_clear, [p for _, p in live])
        for i, p in live:
            stack.callback(p.register_post_accumulate_grad_hook(_hook(i, p, take)).remove)
        yield
        _check_left(params)


def wrappers_of(params: Sequence[Tensor]) -> list[nn.parallel.DistributedDataParallel]:
    """The DistributedDataParallels that synchronise some of the parameters.

    Looks at all objects: call it once.

    Raises:
        ValueError: one of them has static_graph=True and has not run yet. It learns in its first
            backward pass which parameters have a gradient, and would miss those that the hooks
            take: it would never synchronise them again.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    if any_sharded(params):  # which it does not take
        return []
    ids = {id(p) for p in params}
    models = instances(nn.parallel.DistributedDataParallel)
    found = [m for m in models if not ids.isdisjoint(map(id, m.parameters()))]
    for model in found:
        if model.static_graph and not model._static_graph_delay_allreduce_enqueued:
            raise ValueError(
                "the parameters are those of a DistributedDataParallel with static_graph=True, "
                "which would never synchronise gradients again that were taken in its first "
                "backward pass: leave static_graph out, or do not wrap the model"
            )
    return found


@contextlib.contextmanager
def unsynchronised(models: Sequence[nn.parallel.DistributedDataParallel]) -> Iterator[None]:
    """Let forward passes in this context send no gradients later, as in ``model.no_sync()``.

    Buffers are sent as ever, of which no_sync() would send those of the first pass alone.
    """
    kept = [(m.require_backward_grad_sync, m.require_forward_param_sync) for m in models]
    try:
        for model in models:
            model.require_backward_grad_sync = False
        yield
    finally:
        for model, flags in zip(models, kept, strict=True):
            model.require_backward_grad_sync, model.require_forward_param_sync = flags


def is_taken(param: Tensor) -> bool:
    """Whether the gradients of a parameter are being taken, in a context of :func:`taking`."""
    return id(param) in _taken


@contextlib.contextmanager
def _claimed(ids: set[int]) -> Iterator[None]:
    """Refuse parameters whose gradients are being taken: only one of two would get them."""
    with _lock:
        if not _taken.isdisjoint(ids):
            raise RuntimeError(
                "the gradients of these parameters are being taken already, by an open "
                "GradientAccumulator.chunk() or a FullBatchClosure with backward=True: leave that "
                "first, and do not nest them or enter from two threads"
            )
        _taken.update(ids)
    try:
        yield
    finally:
        with _lock:
            _taken.difference_update(ids)


def _clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None


def _hook(index: int, param: Any, take: Take) -> Callable[[Tensor], None]:
    # Earlier versions of torch call hooks while FSDP2 still copies gradients to the CPU.
    kind = param.device_mesh.device_type if is_offloaded(param) else None
    waits = None if kind is None else torch.get_device_module(kind)

    def hook(p: Tensor) -> None:
        if waits is not None:
            waits.synchronize()
        grad, p.grad = p.grad, None
        if grad is None:
            raise RuntimeError(
                f"the gradient of params[{index}] was gone before it could be added: another "
                "post-accumulate-grad hook sets p.grad to None (an optimizer in backward?); "
                "remove that hook"
            )
        if grad.layout != torch.strided:
            raise TypeError(
                f"the gradient of params[{index}] is sparse: fbopt needs dense gradients, for an "
                "embedding pass sparse=False"
            )
        if grad.dtype != p.dtype:
            raise TypeError(
                f"the gradient of params[{index}] is {grad.dtype}, its parameter {p.dtype}: leave "
                "p.grad_dtype as it is, sums are kept in float32 anyway"
            )
        take(index, grad.detach() if grad.requires_grad else grad)

    return hook


def _check_left(params: Sequence[Tensor]) -> None:
    """Refuse gradients that were written without autograd; zeros are DistributedDataParallel's.

    It averages gradients that the hooks have taken already: zeros.
    """
    left = [(i, p.grad) for i, p in enumerate(params) if p.requires_grad and p.grad is not None]
    if left and float(dispatch.squared_norm(locals_of([g for _, g in left]))) != 0:
        raise RuntimeError(
            f"params[{left[0][0]}] has a gradient that autograd's hooks did not see: something "
            "else writes p.grad (a wrapper that reduces gradients by itself, or requires_grad "
            "turned on inside the chunk), and what belongs to the chunk cannot be known"
        )


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


@contextlib.contextmanager
def hint_at_checkpoints() -> Iterator[None]:
    """Say what to do where reentrant checkpointing refuses ``torch.autograd.grad``."""
    try:
        yield
    except RuntimeError as error:
        if "heckpoint" not in str(error) or ".grad()" not in str(error):
            raise
        raise RuntimeError(
            "the model uses reentrant checkpointing, which works with loss.backward() alone: pass "
            "use_reentrant=False to torch.utils.checkpoint (in transformers "
            "gradient_checkpointing_enable({'use_reentrant': False})), or backward=True to "
            "FullBatchClosure"
        ) from error


def drop(index: int, grad: Tensor) -> None:
    """Take a gradient that nobody needs."""


@contextlib.contextmanager
def set_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leave the gradients of other tensors as they are, whatever backward passes add to them."""
    live = [t for t in tensors if t.requires_grad]
    kept = [t.grad for t in live]
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, live, kept)
        for t in live:
            t.grad = None
            stack.callback(t.register_post_accumulate_grad_hook(_discard).remove)
        yield


def _discard(tensor: Tensor) -> None:
    tensor.grad = None


def _restore(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for t, g in zip(tensors, grads, strict=True):
        t.grad = g


def run_backward(
    loss: Tensor,
    params: Sequence[Tensor],
    model: nn.Module,
    take: Take,
    *,
    sharded: FullySharded | None = None,
    scale: float = 1.0,
) -> None:
    """Run ``(scale * loss).backward()``, which leaves no gradient anywhere.

    `take` gets those of `params`; `sharded` may give the model's FSDP2 modules, to save a search.
    """
    sharded = FullySharded(model.modules()) if sharded is None else sharded
    # The leaves of FSDP2 are gathered parameters, whose gradients it needs itself.
    found = sharded.shards() if sharded else (*model.parameters(), *leaves(loss))
    with set_aside(list(set(found) - set(params))), taking(params, take):
        scaled_backward(loss, scale)


def scaled_backward(loss: Tensor, scale: float) -> None:
    """Run ``(scale * loss).backward()``; with scale 0 gradients are zeros, also of a NaN loss."""
    with contextlib.ExitStack() as stack:
        for leaf in leaves(loss) if scale == 0 else ():
            stack.callback(leaf.register_hook(torch.zeros_like).remove)
        torch.autograd.backward(loss, None if scale == 1 else torch.full_like(loss, scale))
