"""The edge of stability, seen: sharpness under plain full-batch gradient descent at three learning
rates rises to about 2/lr and stays there (Cohen et al., ICLR 2021, arXiv 2103.00065).

`python -m benchmarks.edge_of_stability` trains a tanh network of four layers on 1,437 digits by
the mean squared error, and writes docs/analysis/edge-of-stability.{png,svg,json}.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fbopt import FullBatchClosure, FullBatchGD
from fbopt.analysis import Hessian, Objective, eigenpairs, stability_threshold
from fbopt.train.analyze import figures
from fbopt.train.checkpoint.atomic import replace_json
from fbopt.train.data.load import load

RATES = (0.15, 0.2, 0.3)
WIDTHS = (64, 32, 32, 32, 10)
CHUNK = 480  # the last one has 477


def network() -> nn.Module:
    """A network that begins at half of torch's initial weights, and so in a flatter place."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return model


def chunks() -> list[tuple[Tensor, Tensor]]:
    x, y = load("digits").train.batch(slice(None))
    targets = nn.functional.one_hot(y, 10).float()
    return list(zip(x.flatten(1).split(CHUNK), targets.split(CHUNK), strict=True))


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance, averaged over the samples."""
    return (output - target).square().sum(1).mean() / 2


def descend(lr: float, steps: int, every: int) -> dict[str, list[float]]:
    """Train, and measure the largest eigenvalue of the Hessian now and then."""
    model, data = network(), chunks()
    optimizer = FullBatchGD(model.parameters(), lr=lr)
    closure = FullBatchClosure(model, loss_fn, data)
    objective = Objective(model, loss_fn, data)
    found: dict[str, list[float]] = {"step": [], "loss": [], "sharpness": []}
    for step in tqdm(range(steps + 1), desc=f"lr {lr:g}", disable=None):
        if step % every == 0:
            sharpness = eigenpairs(Hessian(objective), 1, verify=False).values[0]
            found["step"].append(step)
            found["loss"].append(objective.loss())
            found["sharpness"].append(float(sharpness))
        optimizer.step(closure)
    return found


@figures.styled
def draw(curves: dict[float, dict[str, list[float]]], path: Path) -> None:
    figure, (loss, sharpness) = figures.new(7.2, 3.1, 2)
    for (lr, found), color, style in zip(
        curves.items(), figures.COLORS, figures.STYLES, strict=False
    ):
        loss.plot(found["step"], found["loss"], style, color=color, linewidth=1, label=f"lr {lr:g}")
        sharpness.plot(found["step"], found["sharpness"], color=color, linewidth=1)
        threshold = stability_threshold(lr).value
        sharpness.axhline(threshold, color=color, linestyle="--", linewidth=1)
        last = found["step"][-1]
        sharpness.text(
            last, threshold, f"2/lr = {threshold:.3g}", va="bottom", ha="right", color=color
        )
    loss.set(xlabel="full-batch step", ylabel="training loss (half squared error)", yscale="log")
    loss.legend(frameon=False)
    sharpness.set(xlabel="full-batch step", ylabel="largest eigenvalue of the Hessian")
    sharpness.set_ylim(0, None)
    for axes in (loss, sharpness):
        axes.grid(alpha=0.25)
    figures.save(
        figure,
        path,
        "Plain full-batch gradient descent, no momentum, clipping or weight decay; tanh network of "
        "64-32-32-32-10 units, 1,437 digits. Dashed: the threshold of stability, 2/lr.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--out", type=Path, default=Path("docs/analysis"))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    wanted.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    curves = {lr: descend(lr, wanted.steps, wanted.every) for lr in RATES}
    path = wanted.out / "edge-of-stability"
    for lr, found in curves.items():
        tail = found["sharpness"][len(found["step"]) // 2 :]
        print(
            f"lr {lr:g}: 2/lr = {2 / lr:.4g}; sharpness in the second half of the steps: mean "
            f"{sum(tail) / len(tail):.3f}, from {min(tail):.3f} to {max(tail):.3f}, n = {len(tail)}"
        )
    seconds = round(time.perf_counter() - start, 1)
    print(f"{seconds} s, torch {torch.__version__}, one thread; written: {path}.png, .svg, .json")
    facts = {"torch": str(torch.__version__), "machine": platform.machine(), "seconds": seconds}
    replace_json(path.with_suffix(".json"), facts | {str(lr): c for lr, c in curves.items()})
    draw(curves, path)


if __name__ == "__main__":
    main()
