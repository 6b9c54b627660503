"""A physics-informed loss in torch: Burgers' equation, and what is known on the boundary.

u_t + u u_x = nu u_xx on |x| < 1, 0 < t < 1, nu = 0.01/pi (Raissi et al., arXiv 1711.10561).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import grad

NU, KNOWN_WEIGHT = 0.01 / math.pi, 10.0
Chunk = tuple[Tensor, Tensor, Tensor]


def autograd_loss(model: nn.Module, chunk: Chunk) -> Tensor:
    """The loss by torch.autograd.grad twice: the fastest of a chunk at a time."""
    points = chunk[0].detach().requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return _loss(model, chunk, u, first, second)


def functional_loss(model: nn.Module, chunk: Chunk) -> Tensor:
    """The same by torch.func.grad twice, which vmap and torch.compile understand."""

    def total(points: Tensor) -> tuple[Tensor, Tensor]:
        u = model(points)
        return u.sum(), u

    def slope(points: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first, u = grad(total, has_aux=True)(points)
        return first[:, 0].sum(), (first, u)

    second, (first, u) = grad(slope, has_aux=True)(chunk[0])
    return _loss(model, chunk, u, first, second)


def _loss(model: nn.Module, chunk: Chunk, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The mean squares of the residual at points (n, 2) of x and t, and of the known values."""
    _, known, values = chunk
    residual = first[:, 1] + u[:, 0] * first[:, 0] - NU * second[:, 0]
    data = model(known)[:, 0] - values
    return residual.square().mean() + KNOWN_WEIGHT * data.square().mean()
