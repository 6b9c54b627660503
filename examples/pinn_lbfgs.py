"""A physics-informed network for the heat equation, trained by L-BFGS on all points at once.

    python examples/pinn_lbfgs.py

u_t = u_xx on 0 < x < 1, 0 < t < 0.25, with u(x, 0) = sin(pi x) and u(0, t) = u(1, t) = 0, whose
solution is u = exp(-pi^2 t) sin(pi x). The loss is the mean squared residual at collocation points
plus ten times that of the initial and boundary values; L-BFGS needs both over all points.

Claim: relative L2 error 0.18 % after 30 steps, 700 passes over 2,000 points (n = 1, float64, 15 CPU
seconds on one core of an AMD EPYC, torch 2.14.1).
"""

import argparse
import math

import torch
from torch import nn

from fbopt import FullBatchClosure


def solution(x, t):
    """The exact solution."""
    return torch.exp(-(math.pi**2) * t) * torch.sin(math.pi * x)


def residual(model, points):
    """u_t - u_xx at points (n, 2) of x and t: (n,)."""
    points = points.detach().requires_grad_()
    (first,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return first[:, 1] - second[:, 0]


def mean_loss(model, chunk):
    """The mean loss of a chunk: collocation points, and points with known values."""
    points, known, values = chunk
    data = (model(known)[:, 0] - values).square().mean()
    return residual(model, points).square().mean() + 10 * data


def sample(count):
    """Points inside, and points on the initial line and the two boundaries with their values."""
    scale = torch.tensor([1.0, 0.25], dtype=torch.float64)
    points, known = (torch.rand(count, 2, dtype=torch.float64) * scale for _ in range(2))
    known[: count // 2, 1] = 0
    known[count // 2 :, 0] = (known[count // 2 :, 0] < 0.5).to(known)
    return points, known, solution(known[:, 0], known[:, 1])


def main(argv=None):
    """Train; return the loss before every L-BFGS step and the relative error in L2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="of 20 L-BFGS iterations each")
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--chunk", type=int, default=600, help="points at a time; not the result's")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()),
        *(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
    ).double()
    order = torch.randperm(args.points)  # so that every chunk has known points of all kinds
    parts = (tensor[order].split(args.chunk) for tensor in sample(args.points))
    chunks = list(zip(*parts, strict=True))
    closure = FullBatchClosure(model, chunks=chunks, evaluate=mean_loss)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    losses = []
    for step in range(1, args.steps + 1):
        losses.append(float(optimizer.step(closure)))
        if step % 5 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3e}  passes {closure.step}")
    side = torch.linspace(0, 1, 51, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side / 4)
    exact = solution(grid[:, 0], grid[:, 1])
    with torch.no_grad():
        found = model(grid)[:, 0]
    error = float((found - exact).norm() / exact.norm())
    print(f"relative L2 error {error:.2e} after {closure.step} passes over {args.points} points")
    return losses, error


if __name__ == "__main__":
    main()
