"""Central, stable and gradient flow against full-batch gradient descent of a tanh network.

    python -m benchmarks.central_flow --out central_flow.png --json central_flow.json

A tanh network of 64-16-16-10 units in float64 learns digits by squared error, from the same
weights by gradient descent and along each flow. Distances are of the network's outputs on the
training data (root mean square over samples and outputs) and of the parameters; to the iterates,
and to the mean of the outputs or parameters of WINDOW iterates around each, as the central flow is
one of the averaged path and leaves out the oscillation itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import nn

from fbopt.analysis import Flow, Hessian, Objective, eigenpairs

EVERY = 10  # steps of gradient descent between two measurements of its curvature
WINDOW = 21  # iterates
QUANTITIES = {"function": "output", "parameter": "theta"}


def problem(samples, width, seed, scale):
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.from_numpy(x[:samples]), torch.from_numpy(labels[:samples])
    x = (x - x.mean()) / x.std(correction=0)
    torch.manual_seed(seed)
    layers = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model, x, nn.functional.one_hot(labels, 10).double()


def loss_fn(output, target):
    return (output - target).square().sum(1).mean() / 2


def sharpness(objective, start, count):
    return eigenpairs(Hessian(objective), count, start=start, tolerance=1e-3, verify=False)


def descent(model, x, y, steps, lr):
    """The outputs, parameters and curves of gradient descent after each step."""
    objective = Objective(model, loss_fn, [(x, y)])
    found, pairs = [], None
    for step in range(steps + 1):
        if step % EVERY == 0:
            pairs = sharpness(objective, pairs, 3)
        found.append(record(objective, x, step, pairs.values if step % EVERY == 0 else ()))
        with torch.no_grad():
            moves = objective.unflatten(objective.gradient() * -lr)
            for p, move in zip(model.parameters(), moves, strict=True):
                p += move
    return found


def record(objective, x, step, values, **more):
    with torch.no_grad():
        output = objective.model(x)
    loss = objective.loss()
    return {"step": step, "loss": loss, "eigenvalues": list(map(float, values)), "output": output,
            "theta": objective.theta(), **more}  # fmt: skip


def follow(model, x, y, o, kind):
    """Yield the records of a flow, one after each unit of time."""
    objective = Objective(model, loss_fn, [(x, y)])
    flow = Flow(objective, o.lr, kind, substeps=o.substeps, margin=o.margin)
    for step in range(o.steps + 1):
        if step:
            flow.advance()
        more = {
            "mean_loss": objective.loss() + flow.edge.excess_loss,
            "oscillating": int((flow.edge.covariance.diagonal() > 1e-9).sum()),
        }
        yield record(objective, x, step, flow.pairs.values, **more)


def compare(descended, followed):
    """The curves of a flow with its distances to gradient descent, as plain numbers."""
    rows = [{k: v for k, v in one.items() if not isinstance(v, torch.Tensor)} for one in followed]
    for name, key in QUANTITIES.items():
        path = torch.stack([one[key] for one in descended])
        for t, (row, one) in enumerate(zip(rows, followed, strict=True)):
            row[f"{name}_distance"] = distance(name, one[key], path[t])
            if WINDOW // 2 <= t < len(path) - WINDOW // 2:
                mean = path[t - WINDOW // 2 : t + WINDOW // 2 + 1].mean(0)
                row[f"{name}_distance_to_mean"] = distance(name, one[key], mean)
    return rows


def distance(name, one, other):
    apart = one - other
    return float(apart.square().mean().sqrt() if name == "function" else apart.norm())


def draw(curves, limit, path):
    """Loss, curvature and distances against steps."""
    from fbopt.train.reporting import plots

    page = plots.figure(6.5, 4.6)
    axes = page.subplots(2, 2, sharex=True)
    looks = {
        "descent": (plots.BLACK, "gradient descent"), "gradient": (plots.BLUE, "gradient flow"),
        "stable": (plots.GREEN, "stable flow"), "central": (plots.ORANGE, "central flow"),
    }  # fmt: skip
    for name, rows in curves.items():
        color, label = looks[name]
        steps = [row["step"] for row in rows]
        axes[0, 0].plot(steps, [row["loss"] for row in rows], color=color, label=label, lw=1)
        known = [row for row in rows if row["eigenvalues"]]
        for i in range(2 if name in ("descent", "central") else 1):
            points = [(r["step"], r["eigenvalues"][i]) for r in known if len(r["eigenvalues"]) > i]
            axes[0, 1].plot(*zip(*points, strict=True), color=color, lw=1, ls=("-", ":")[i])
        if name != "descent":
            for place, what in zip(axes[1], ("function", "parameter"), strict=True):
                place.plot(
                    steps, [r[f"{what}_distance"] for r in rows], color=color, lw=0.7, ls=":"
                )
                key = f"{what}_distance_to_mean"
                points = [(r["step"], r[key]) for r in rows if key in r]
                place.plot(*zip(*points, strict=True), color=color, lw=1)
    central = curves.get("central", [])
    axes[0, 0].plot(
        [row["step"] for row in central], [row["mean_loss"] for row in central],
        color=plots.ORANGE, ls=":", lw=1, label="central flow, with oscillation",
    )  # fmt: skip
    axes[0, 0].set(yscale="log", ylabel="training loss")
    axes[0, 1].set(ylabel="largest eigenvalues")
    axes[0, 1].axhline(limit, color=plots.GREY, ls="--", lw=0.8)
    axes[1, 0].set(ylabel="outputs apart (RMS)", xlabel="steps")
    axes[1, 1].set(ylabel="parameters apart", xlabel="steps")
    axes[1, 0].plot([], [], color=plots.GREY, lw=1, label=f"to the mean of {WINDOW} iterates")
    axes[1, 0].plot([], [], color=plots.GREY, lw=0.7, ls=":", label="to the iterate")
    axes[1, 0].legend(fontsize=7, frameon=False)
    for place in axes.flat:
        plots.tidy(place)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=7)
    plots.save(page, path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--substeps", type=int, default=2)
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--kinds", nargs="*", default=("gradient", "central"))
    parser.add_argument("--json", type=Path, default=Path("central_flow.json"))
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    options = {name: str(value) for name, value in vars(o).items()}
    model, x, y = problem(o.samples, o.width, o.seed, o.scale)
    start = time.perf_counter()
    descended = descent(copy.deepcopy(model), x, y, o.steps, o.lr)
    curves = {"descent": compare(descended, descended)}
    seconds = {"descent": time.perf_counter() - start}
    for kind in o.kinds:
        start, found = time.perf_counter(), []
        for one in follow(copy.deepcopy(model), x, y, o, kind):
            found.append(one)
            if one["step"] % 25 == 0:
                seconds[kind] = time.perf_counter() - start
                curves[kind] = compare(descended, found)
                print(kind, f"{seconds[kind]:.0f} s", curves[kind][-1], flush=True)
                text = json.dumps({"options": options, "seconds": seconds, "curves": curves})
                o.json.write_text(text)
    if o.out:
        draw(curves, 2 / o.lr, o.out)


if __name__ == "__main__":
    main()
