"""The edge of stability: plain full-batch gradient descent sharpens until lambda_max is about 2/lr.

    python examples/edge_of_stability.py --out edge-of-stability.png

A tanh network of 64-32-32-32-10 units learns 1,437 digits by the mean squared error, at three
learning rates; lambda_max is the largest eigenvalue of the full-batch Hessian (Cohen et al., ICLR
2021, arXiv 2103.00065).

Claim: in the second half of 3,000 steps the mean of lambda_max is 13.31, 10.01 and 6.70, for 2/lr =
13.33, 10 and 6.67 (one seed, float32, one thread; docs/analysis has the figure and its numbers).
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD
from fbopt.analysis import Hessian, Objective, eigenpairs, stability_threshold

RATES = (0.15, 0.2, 0.3)
WIDTHS = (64, 32, 32, 32, 10)
CHUNK = 480  # the last one has 477
COLORS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's: told apart with any colour vision


def network():
    """A network that begins at half of torch's initial weights, and so in a flatter place."""
    torch.manual_seed(0)
    layers = []
    for inner, outer in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return model


def chunks():
    """scikit-learn's digits, standardised, and their labels as unit vectors."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))[:1437]
    x = torch.from_numpy(x[order])
    x = (x.float() - x.mean().float()) / x.std(correction=0).float()
    targets = nn.functional.one_hot(torch.from_numpy(y[order]), 10).float()
    return list(zip(x.split(CHUNK), targets.split(CHUNK), strict=True))


def loss_fn(output, target):
    """Half the squared distance, averaged over the samples."""
    return (output - target).square().sum(1).mean() / 2


def descend(lr, steps, every):
    """Train; return the steps at which loss and largest eigenvalue were measured, and both."""
    model, data = network(), chunks()
    optimizer = FullBatchGD(model.parameters(), lr=lr)
    closure = FullBatchClosure(model, loss_fn, data)
    objective = Objective(model, loss_fn, data)
    hessian, pairs = Hessian(objective), None
    found = {"step": [], "loss": [], "sharpness": []}
    for step in range(steps + 1):
        if step % every == 0:
            hessian.refresh()
            pairs = eigenpairs(hessian, 1, start=pairs, verify=False)  # from those of before
            found["step"].append(step)
            found["loss"].append(objective.loss())
            found["sharpness"].append(float(pairs.values[0]))
        optimizer.step(closure)
    return found


def draw(curves, path):
    """Write the figure: loss, and the largest eigenvalue beside 2/lr."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained", dpi=150)
    loss, sharpness = figure.subplots(1, 2)
    for color, (lr, found) in zip(COLORS, curves.items(), strict=False):
        loss.plot(found["step"], found["loss"], color=color, linewidth=1, label=f"lr {lr:g}")
        sharpness.plot(found["step"], found["sharpness"], color=color, linewidth=1)
        threshold = stability_threshold(lr).value
        sharpness.axhline(threshold, color=color, linestyle="--", linewidth=1)
        text = {"va": "bottom", "ha": "right", "color": color}
        sharpness.text(found["step"][-1], threshold, f"2/lr = {threshold:.3g}", **text)
    loss.set(xlabel="full-batch step", ylabel="training loss (half squared error)", yscale="log")
    loss.legend(frameon=False)
    sharpness.set(xlabel="full-batch step", ylabel="largest eigenvalue of the Hessian")
    sharpness.set_ylim(0, None)
    for axes in (loss, sharpness):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(argv=None):
    """Descend at every rate, write the figure and its numbers, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="at most three")
    parser.add_argument("--out", type=Path, default=Path("edge-of-stability.png"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    curves = {}
    for lr in args.rates[: len(COLORS)]:
        curves[lr] = found = descend(lr, args.steps, args.every)
        tail = found["sharpness"][len(found["step"]) // 2 :]
        print(
            f"lr {lr:g}: 2/lr = {2 / lr:.4g}; largest eigenvalue in the second half of the steps: "
            f"mean {np.mean(tail):.3f}, from {min(tail):.3f} to {max(tail):.3f}, n = {len(tail)}",
            flush=True,
        )
    args.out.with_suffix(".json").write_text(json.dumps(curves))
    draw(curves, args.out)
    return curves


if __name__ == "__main__":
    main()
