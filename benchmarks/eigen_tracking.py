"""Tracked eigenvalues beside dense float64 Hessians along full-batch gradient descent.

    python -m benchmarks.eigen_tracking

A tanh network of 64-20-20-10 units, 1,930 parameters, learns 200 digits by half the squared error
at lr 0.25, in float32, for 200 steps: its largest Hessian eigenvalues grow until the first passes
2/lr = 8, and stay about there. At each step the three largest are found by EigenTracker and by
`eigenpairs` from a random start and from the pairs of the step before, each timed, in turns. All
are compared with the dense Hessian's in float64. The program stops with an error if the tracker is
wrong by more than 1 % at a step, or takes more than three products for each eigenvalue and step in
the mean; then it prints a table.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import edge_of_stability as example

from benchmarks.report import cpu_name
from fbopt import FullBatchClosure, FullBatchGD
from fbopt.analysis import EigenTracker, Hessian, Objective, eigenpairs

SAMPLES, LR, COUNT = 200, 0.25, 3
PIECE = 200  # rows of the dense Hessian at once


def network():
    """A network that begins at 0.7 of torch's initial weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    return model


def dense_hessian(model, x, y, whole=False):
    """The Hessian in float64: its rows of all but the first layer by derivatives along each unit
    vector, and the block of the first layer, whose inputs are z = W x + b, by the chain rule,
    ``mean_n (d^2 L_n/dz^2) (x) (x, 1)(x, 1)^T``; with `whole`, all rows in the first way.
    """
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    theta = torch.cat([p.reshape(-1) for p in params.values()])

    def loss(theta):
        pieces = torch.split(theta, [p.numel() for p in params.values()])
        moved = {n: t.view_as(p) for (n, p), t in zip(params.items(), pieces, strict=True)}
        return example.loss_fn(torch.func.functional_call(model, moved, (x,)), y)

    first = 0 if whole else model[0].weight.numel() + model[0].bias.numel()
    gradient = torch.func.grad(loss)
    rows = torch.vmap(lambda v: torch.func.jvp(gradient, (theta,), (v,))[1])
    identity = torch.eye(len(theta), dtype=torch.float64)
    matrix = torch.cat([torch.zeros(first, len(theta)), *map(rows, identity[first:].split(PIECE))])
    if not whole:
        matrix[:first, first:] = matrix[first:, :first].T
        matrix[:first, :first] = first_block(copy.deepcopy(model).double(), x, y)
    return matrix


def first_block(model, x, y):
    """The rows and columns of the first layer's weights and biases."""

    def loss(z, y):
        return example.loss_fn(model[1:](z[None]), y[None])

    with torch.no_grad():
        second = torch.vmap(torch.func.hessian(loss))(model[0](x), y)
        inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        squares = (inputs[:, :, None] * inputs[:, None, :]).flatten(1)
        block = (second.flatten(1).T @ squares / len(x)).view(
            *second.shape[1:], *[x.shape[1] + 1] * 2
        )
    block = block.permute(0, 2, 1, 3)  # unit, input, unit, input
    units, size = block.shape[:2]
    order = torch.arange(units * size).view(units, size)
    order = torch.cat([order[:, :-1].flatten(), order[:, -1]])  # biases last
    return block.reshape(units * size, -1)[order][:, order]


def dense_eigenvalues(matrix):
    """The largest eigenvalues; more are asked for than needed, to full precision."""
    start = np.random.RandomState(0).randn(len(matrix))
    return eigsh(matrix.numpy(), 2 * COUNT, which="LA", v0=start)[0][::-1][:COUNT]


def ways(objective):
    """By name, functions that return the largest eigenpairs at the model's parameters."""
    tracker, hessian = EigenTracker(objective, COUNT), Hessian(objective)
    known = {}

    def found(name, warm, tolerance):
        hessian.refresh()
        start = known.get(name) if warm else None
        known[name] = eigenpairs(hessian, COUNT, start=start, tolerance=tolerance, verify=False)
        return known[name]

    return {
        "EigenTracker": tracker.update,
        "eigenpairs, start=pairs, tolerance 1e-2": lambda: found("loose", True, 1e-2),
        "eigenpairs, start=pairs, tolerance 1e-3": lambda: found("fine", True, 1e-3),
        "eigenpairs, random start, tolerance 1e-2": lambda: found("cold", False, 1e-2),
    }


def measure(steps):
    """Return the dense eigenvalues of every step, and of each way products, errors and times."""
    model = network()
    x, y = (torch.cat(part)[:SAMPLES] for part in zip(*example.chunks(), strict=True))
    chunks = [(x, y)]
    optimizer = FullBatchGD(model.parameters(), lr=LR)
    closure = FullBatchClosure(model, example.loss_fn, chunks)
    all_ways = ways(Objective(model, example.loss_fn, chunks))
    wide = x.double(), y.double()
    torch.testing.assert_close(dense_hessian(model, *wide), dense_hessian(model, *wide, whole=True))
    true, rows = [], {name: [] for name in all_ways}
    for step in range(steps + 1):
        true.append(dense_eigenvalues(dense_hessian(model, *wide)))
        order = list(all_ways)
        for name in order[step % len(order) :] + order[: step % len(order)]:
            begin = time.perf_counter()
            pairs = all_ways[name]()
            seconds = time.perf_counter() - begin
            error = np.abs(pairs.values / true[-1] - 1).max()
            rows[name].append((pairs.products, error, seconds))
        if step % 20 == 0:
            print(f"step {step}: {true[-1]}", file=sys.stderr, flush=True)
        optimizer.step(closure)
    return np.array(true), {name: np.array(found) for name, found in rows.items()}


def check(rows):
    """Stop with an error unless the tracker keeps what it promises; the first update is cold."""
    products, errors = rows["EigenTracker"][:, 0], rows["EigenTracker"][:, 1]
    mean = products[1:].mean() / COUNT
    if errors.max() > 1e-2 or mean > 3:
        raise SystemExit(f"largest error {errors.max():.1e}, {mean:.2f} products each: too much")


def main(argv=None):
    """Measure, check, print the table, and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    true, rows = measure(args.steps)
    check(rows)
    every = max(1, args.steps // 8)
    print(f"2/lr = {2 / LR:g}; dense, from step 0, each {every} steps:")
    print(*(" ".join(f"{v:.2f}" for v in values) for values in true[::every]), sep=" | ")
    print("| | products, steps 1 on | most | largest error | steps above 1 % | median ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in rows.items():
        products, errors, seconds = found[1:].T
        print(
            f"| {name} | {products.mean():.1f} ({products.mean() / COUNT:.2f} each) | "
            f"{products.max():.0f} | {errors.max():.1e} | {(errors > 1e-2).sum()} | "
            f"{1e3 * statistics.median(seconds):.1f} |"
        )
    first = ", ".join(f"{found[0, 0]:.0f}" for found in rows.values())
    print(
        f"products of the first step: {first}. n = {args.steps} steps, one seed, float32, torch "
        f"{torch.__version__}, one thread, {cpu_name()}"
    )
    return rows


if __name__ == "__main__":
    main()
