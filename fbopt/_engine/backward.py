"""Gradients taken as ``loss.backward()`` makes them: a hook hands p.grad over and leaves None, so
that there is no second copy of all gradients. ``torch.autograd.grad`` calls no hooks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._engine.autograd_graph import leaves
from fbopt._engine.fully_sharded import FullySharded
from fbopt._ops import dispatch
from fbopt._sharding import is_offloaded, locals_of

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
