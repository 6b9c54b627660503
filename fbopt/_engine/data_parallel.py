"""DistributedDataParallel around parameters whose gradients are taken before it averages them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from fbopt._engine.fully_sharded import instances
from fbopt._sharding import any_sharded


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
