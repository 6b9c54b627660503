"""Parameters moved into one flat buffer for each device and dtype, one after the other: many small
ones can then be written by one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fbopt._checks import check_disjoint
from fbopt._ops.buckets import FlatBuckets
from fbopt._sharding import any_sharded


class FlatParameters:
    """Keeps parameters in flat buffers, wherever something else (``model.to``) moves them to.

    Values, strides, and parameters used in several places stay as they are.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle nothing: a copy's parameters are others, and lie elsewhere."""
        return FlatParameters, ()

    @torch.no_grad()
    def follow(self, params: Sequence[Tensor], model: nn.Module) -> None:
        """Move the parameters, unless they lie where they were moved to last.

        Raises:
            ValueError: parameters are DTensors, or share memory with each other, or with another
                parameter or a buffer of the model.
        """
        if self._look(params) == self._places:
            return
        _refuse(params, model)
        buckets = FlatBuckets(params)
        views = buckets.views(buckets.buffers())
        for p, view in zip(params, views, strict=True):
            view.copy_(p)
        for p, view in zip(params, views, strict=True):
            p.data = view
        self._places = self._look(params)

    @staticmethod
    def _look(params: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(id(p), p.data_ptr()) for p in params]


def _refuse(params: Sequence[Tensor], model: nn.Module) -> None:
    if any_sharded(params):
        raise ValueError(
            "flatten_parameters=True moves plain parameters, and these are sharded (DTensor): "
            "leave it out"
        )
    own = {id(p): p for p in (*params, *model.parameters()) if not is_lazy(p)}
    check_disjoint([p for p in own.values() if p.layout == torch.strided], "parameters")
    memory = {p.untyped_storage().data_ptr() for p in params if p.numel()}
    for name, buffer in model.named_buffers():
        plain = buffer.layout == torch.strided and buffer.numel()
        if plain and buffer.untyped_storage().data_ptr() in memory:
            raise ValueError(
                f"flatten_parameters=True moves parameters, and buffer {name} shares the memory of "
                "one: clone the buffer, or leave flatten_parameters out"
            )
