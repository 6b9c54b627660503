"""Functions to minimise from a start that a seed gives: Rosenbrock's, logistic regression on
digits, and Burgers' equation by a physics-informed network. All in float64, over all data at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbopt.train.data.load import load


@dataclass(frozen=True)
class Problem:
    """A function of parameters, and the value to reach."""

    title: str
    make: Callable[[int], tuple[list[nn.Parameter], Callable[[], Tensor]]]
    target: float


def rosenbrock(seed: int) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """sum_i 100 (x_(i+1) - x_i^2)^2 + (1 - x_i)^2 in 100 dimensions, near the usual start."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(50)
    noise = torch.randn(100, generator=generator, dtype=torch.float64)
    x = nn.Parameter(start + 0.01 * noise)
    return [x], lambda: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def logistic(seed: int) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Mean cross-entropy of a linear model on scikit-learn's digits, with 0.01/2 ||W||^2."""
    torch.manual_seed(seed)
    train = load("digits").train
    x, labels = train.x.flatten(1).double(), train.y
    model = nn.Linear(x.shape[1], 10).double()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), labels) + 5e-3 * model.weight.square().sum()

    return list(model.parameters()), loss


def burgers(seed: int) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """u_t + u u_x = (0.01 / pi) u_xx, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0.

    Raissi, Perdikaris and Karniadakis (2019), with 1,000 collocation points, 100 on the initial
    line and the boundaries, and a network of four layers of 20.
    """
    torch.manual_seed(seed)
    widths = [2, 20, 20, 20, 20, 1]
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*itertools.chain(*layers))[:-1].double()
    scale = torch.tensor([[2.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    inside = (torch.rand(1000, 2, dtype=torch.float64) * scale[0] + scale[1]).requires_grad_()
    line, time = 2 * torch.rand(50, dtype=torch.float64) - 1, torch.rand(50, dtype=torch.float64)
    initial = torch.stack([line, torch.zeros_like(line)], 1)
    sides = torch.stack([line.sign(), time], 1)
    known = torch.cat([initial, sides])
    values = torch.cat([-torch.sin(math.pi * line), torch.zeros_like(time)])

    def loss() -> Tensor:
        u = model(inside)
        (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)
        residual = first[:, 1] + u[:, 0] * first[:, 0] - 0.01 / math.pi * second[:, 0]
        return residual.square().mean() + (model(known)[:, 0] - values).square().mean()

    return list(model.parameters()), loss


PROBLEMS = {
    "rosenbrock": Problem("Rosenbrock in 100 dimensions, to 1e-10", rosenbrock, 1e-10),
    "logistic": Problem("Logistic regression on digits, to the least loss + 1e-5", logistic, 0.0),
    "burgers": Problem("Burgers' equation, 1,341 parameters, to 0.02", burgers, 0.02),
}
