"""Products per step to track the largest Hessian eigenvalues of a network at the edge of stability.

    python benchmarks/warm_starts.py

The network of examples/edge_of_stability.py, lr 0.2, after 1,200 steps: at each of 50 further steps
the eigenvalues are found from a random start and from those of the step before. Printed are the
mean and largest number of products, and the largest relative error of an eigenvalue, against a cold
start with tolerance 1e-5.

Then an eigenvalue of a quadratic rises from 0.3, deep inside, to 12, past the largest of about 10,
while the leading eigenvectors turn; its eigenvector is orthogonal to all start vectors. Printed is
the number of calls until it is found, of which each reports another pair as the largest.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import edge_of_stability as example

from fbopt import FullBatchClosure, FullBatchGD
from fbopt.analysis import Hessian, Objective, eigenpairs

CASES = [(count, tolerance) for count in (1, 3) for tolerance in (1e-2, 1e-3)]


def track(before, steps):
    """Return for each case and start a list of (products, relative error), one for each step."""
    model, data = example.network(), example.chunks()
    optimizer = FullBatchGD(model.parameters(), lr=0.2)
    closure = FullBatchClosure(model, example.loss_fn, data)
    for _ in range(before):
        optimizer.step(closure)
    hessian = Hessian(Objective(model, example.loss_fn, data))
    known, found = {}, {}
    for step in range(steps + 1):
        hessian.refresh()
        true = eigenpairs(hessian, 4, tolerance=1e-5, verify=False).values
        for count, tolerance in CASES:
            for name, start in (("cold", None), ("warm", known.get((count, tolerance)))):
                pairs = eigenpairs(hessian, count, start=start, tolerance=tolerance, verify=False)
                error = np.abs(pairs.values / true[:count] - 1).max()
                if step:  # the first has no step before
                    found.setdefault((count, tolerance, name), []).append((pairs.products, error))
            known[count, tolerance] = pairs
        optimizer.step(closure)
    return found


def overtake(size, rise, tolerance):
    """Return how many of 40 calls missed the largest eigenvalue; it rises in `rise` calls."""
    torch.manual_seed(0)
    top = torch.tensor([10.0, 8, 6, 5, 4, 3, 2])
    diagonal = torch.cat([top, 0.3 * torch.randn(size - len(top)).abs()])
    model, start, missed = torch.nn.Linear(size, 1, bias=False), torch.eye(2, size), 0
    for call in range(40):
        diagonal[500] = 0.3 + 11.7 * min(1, (call + 1) / rise)
        turn = 0.3 * torch.randn(len(top), len(top))
        turn = (turn + turn.T) / 2

        def evaluate(model, chunk, turn=turn):
            theta = model.weight[0]
            leading = theta[: len(turn)]
            return ((chunk * theta**2).sum() + leading @ turn @ leading) / 2

        objective = Objective(model, chunks=[diagonal], evaluate=evaluate, weight=lambda chunk: 1)
        start = eigenpairs(Hessian(objective), 1, start=start, tolerance=tolerance)
        leading = torch.linalg.eigvalsh(torch.diag(diagonal[: len(top)]) + turn)
        true = max(float(leading[-1]), float(diagonal[500]))
        missed += abs(start.values[0] / true - 1) > 3e-3
    return missed


def main(argv=None):
    """Track, print a line for each case, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=int, default=1200, help="steps before the first")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = track(args.before, args.steps)
    for (count, tolerance, name), rows in found.items():
        products, errors = np.array(rows).T
        print(
            f"largest {count}, tolerance {tolerance:g}, {name}: {products.mean():.1f} products a "
            f"step (at most {products.max():.0f}), largest error {errors.max():.1e}",
            flush=True,
        )
    for size, rise in ((5_000, 1), (5_000, 20), (200_000, 1), (200_000, 20)):
        calls = {tolerance: overtake(size, rise, tolerance) for tolerance in (1e-3, 1e-2)}
        text = ", ".join(f"{n} (tolerance {tolerance:g})" for tolerance, n in calls.items())
        print(f"an eigenvalue rises in {rise} calls among {size:,}: missed in {text}", flush=True)
    return found


if __name__ == "__main__":
    main()
