"""The figures of a ladder: every row's metrics against steps or passes, mean over the seeds.

The colour is the row's step of the ladder, the line style its table (kind of augmentation).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.recipes import SUMMARIES, TABLES, split
from fbopt.train.ladder.plan import Plan
from fbopt.train.reporting import plots
from fbopt.train.reporting.plots import AMBER, BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY

COLOURS = dict(zip(SUMMARIES, (BLACK, ORANGE, AMBER, SKY, BLUE, GREEN, PURPLE), strict=True))
LINES = dict(zip(TABLES, ("-", "--", "-.", ":"), strict=True))
FIGURES = {  # panels: metric, title, axis label
    "accuracy": [
        ("test_accuracy", "Test accuracy (bands: all seeds)", "correctly classified samples (%)")
    ],
    "gradients": [
        ("gradient_norm", "Gradient norm before clipping (sgd: last mini-batch)", "Euclidean norm"),
        ("clip", "Clip coefficient", "factor (1: not clipped)"),
    ],
    "chunks": [
        ("mean_squared_chunk_norm", "Gradient norms of chunks (sgd: mini-batches)",
         "root mean square of the norms"),
    ],
    "loss": [("loss", "Training loss", "mean cross-entropy (nats)")],
}  # fmt: skip
CONVERSIONS = {"test_accuracy": lambda share: 100 * share, "mean_squared_chunk_norm": math.sqrt}
X_LABELS = {
    "step": "optimizer steps (of mini-batches for sgd, of all samples for the rest)",
    "pass": "passes over the training set (steps, or epochs of sgd)",
}
Metrics = list[dict[str, Any]]  # the records of one run


def draw_all(plan: Plan) -> list[str]:
    """Draw the figures of the finished runs into the ladder's folder; returns their names."""
    folders = {row: [RunFolder(o.out) for o in runs] for row, runs in plan.runs.items()}
    rows = {row: [f.read_metrics() for f in fs if f.result.exists()] for row, fs in folders.items()}
    data, seeds = plan.runs[plan.wanted.rows[0]][0].data_name, plan.wanted.seeds
    drawn: list[str] = []
    for name, panels in FIGURES.items():
        if not any(rows.values()) or (page := plots.figure(7.5, 2 + 2.5 * len(panels))) is None:
            break
        all_axes = page.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        x = "step" if name == "accuracy" else "pass"
        for axes, (key, title, label) in zip(all_axes, panels, strict=True):
            _draw(axes, key, x, rows)
            axes.set(title=title, ylabel=label)
        plots.log_steps(all_axes[-1], X_LABELS[x])
        all_axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        page.suptitle(f"{data}, one seed" if seeds == 1 else f"{data}, mean of {seeds} seeds")
        page.savefig(plan.folder / f"{name}.png")
        drawn.append(f"{name}.png")
    return drawn


def _draw(axes: Any, key: str, x: str, rows: dict[str, list[Metrics]]) -> None:
    """Draw a metric of each row, the mean over its seeds; of the accuracy their range too."""
    for row, points in ((row, curve(key, x, runs)) for row, runs in rows.items()):
        means, look = list(map(statistics.mean, points.values())), style(row)
        if not points:
            continue
        axes.plot(list(points), means, label=row, linewidth=1.5, **look)
        if key == "test_accuracy" and len(rows[row]) > 1:
            low, high = list(map(min, points.values())), list(map(max, points.values()))
            axes.fill_between(list(points), low, high, color=look["color"], alpha=0.15, linewidth=0)
    if key == "clip":
        axes.set_ylim(0, 1.05)
    elif key != "test_accuracy":
        plots.log_scale(axes)
    plots.tidy(axes)


def curve(key: str, x: str, runs: list[Metrics]) -> dict[float, list[float]]:
    """A metric of all runs by its place, where every run has a value."""
    found: dict[float, list[float]] = {}
    for record in (record for records in runs for record in records):
        if (value := record.get(key)) is not None:
            found.setdefault(record[x], []).append(CONVERSIONS.get(key, float)(value))
    return {place: found[place] for place in sorted(found) if len(found[place]) == len(runs)}


def style(row: str) -> dict[str, str]:
    """A row's colour and line style."""
    step, suffix = split(row)
    return {"color": COLOURS[step], "linestyle": LINES[suffix]}
