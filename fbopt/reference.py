"""Every op again in plain torch: the oracle of the tests, the documentation of the kernels, and the
back end where there is no compiler. Same names, arguments and mutations as csrc/schema.cpp; any
device.

Half-precision tensors are computed in float32 and rounded once, as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbopt._tensors import flat_views


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the type of the arithmetic: float64 for float64, float32 for the rest."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pack_(out: Tensor, tensors: list[Tensor]) -> None:
    """Set the 1-D `out` to the tensors one after the other, each in row-major order."""
    if tensors:
        out.copy_(torch.cat([t.reshape(-1) for t in tensors]))


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Return sum_i ||x_i||^2 as a 0-dim float64 tensor."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def perturb_(
    out: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    radius: float,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Set out <- p + s g with s = radius / ||g|| (0 where g = 0) and return ||g||^2 (0-dim,
    float64).

    `out` is one flat buffer: params one after the other, each in its own memory order and from a
    multiple of 16 elements on; what lies between them is left alone.
    `squared_norm` replaces that of `grads` where these are a part of the gradient.
    """
    squared = _squared_norm(grads) if squared_norm is None else squared_norm.double().clone()
    norm = squared.sqrt()
    step = torch.where(norm == 0, 0.0, radius / norm)
    for view, p, g in zip(flat_views(out, params), params, grads, strict=True):
        view.copy_(_wide(p) + step.to(_wide(p).dtype) * _wide(g))
    return squared


_squared_norm = squared_norm


def accumulate_(sums: list[Tensor], grads: list[Tensor], weight: Tensor) -> None:
    """Add a <- a + w g, with a in float32 (float64 for float64 grads)."""
    for a, g in zip(sums, grads, strict=True):
        a.add_(weight.to(a.dtype) * g.to(a.dtype))


def accumulate_penalty_(
    sums: list[Tensor],
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    weight: Tensor,
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> None:
    """Add a <- a + w (g + k (g+ - g-)): the chunk's gradient with lambda H g by finite differences.

    Forward differences (`minus` empty): g- = g and k = lambda ||g|| / radius; central ones: half of
    that.
    """
    span = 2 * radius if minus else radius
    norm = squared_norm.sqrt()
    factor = torch.where(norm == 0, 0.0, coefficient * norm / span)
    for a, g, up, down in zip(sums, grads, plus, minus or grads, strict=True):
        difference = factor.to(a.dtype) * (up.to(a.dtype) - down.to(a.dtype))
        a.add_(weight.to(a.dtype) * (g.to(a.dtype) + difference))


def _clip_coefficient(max_norm: float, total_norm: Tensor) -> Tensor:
    return (max_norm / (total_norm.double() + 1e-6)).clamp(max=1.0)


def clip_(grads: list[Tensor], total_norm: Tensor, max_norm: float) -> None:
    """Scale g <- min(1, max_norm / (total_norm + 1e-6)) g."""
    coefficient = _clip_coefficient(max_norm, total_norm)
    for g in grads:
        g.copy_(_wide(g) * coefficient.to(_wide(g).dtype))


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    divisor: Tensor | None,
    total_norm: Tensor | None,
    max_norm: float | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Take one step of clipped SGD, in torch.optim.SGD's own order.

    With `divisor`, grads are sums: their mean is used, and left in them. `total_norm` is the norm
    of the mean; with `max_norm` the gradient is scaled as by :func:`clip_`. `first`: the buffers
    are not read.
    """
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if divisor is not None:
            g.div_(divisor.to(_wide(g).dtype))
        wide = _wide(p)
        d = -g.to(wide.dtype) if maximize else g.to(wide.dtype)
        if max_norm is not None:
            d = d * _clip_coefficient(max_norm, total_norm).to(wide.dtype)
        if weight_decay != 0:
            d = d + weight_decay * wide
        if momentum != 0:
            old = momentum_buffers[i]
            v = d if first else momentum * _wide(old) + (1 - dampening) * d
            old.copy_(v)
            d = d + momentum * v if nesterov else v
        p.copy_(wide - lr.to(wide.dtype) * d)
