"""Gradients of a chunk's loss, and products with its Hessian: H v = d(g.v)/d(theta)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fbopt._checks import check_grads
from fbopt._engine.autograd_graph import hint_at_checkpoints, naming_methods, refuse_unreached


def gradients(
    loss: Tensor, params: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """The gradients of a loss, None for parameters that it does not use."""
    with hint_at_checkpoints():
        grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    refuse_unreached(loss, grads)
    check_grads(grads, params)
    return list(grads)


def products(loss: Tensor, params: Sequence[Tensor], vector: list[Tensor]) -> list[Tensor | None]:
    """H v by a second backward pass; `vector` has a tensor for each parameter."""
    pairs = zip(gradients(loss, params, create_graph=True), vector, strict=True)
    # The loss is linear in the other parameters.
    curved = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
    if not curved:
        return [None for _ in params]
    grads, along = zip(*curved, strict=True)
    with naming_methods():
        return list(torch.autograd.grad(grads, params, along, allow_unused=True))
