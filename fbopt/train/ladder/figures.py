"""The figures of a ladder: the difference of every row to sgd, and metrics over the runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.recipes import STEPS, TABLES
from fbopt.train.ladder.plan import Plan
from fbopt.train.reporting import plots

DIFFERENCES = "differences"
ACCURACY = "accuracy"
FIGURES = {  # panels: metric, title, axis label
    ACCURACY: [("test_accuracy", "Test accuracy (bands: all seeds)",
                "correctly classified samples (%)")],
    "gradients": [("gradient_norm", "Gradient norm before clipping (sgd: last mini-batch)",
                   "Euclidean norm"),
                  ("clip", "Clip coefficient", "factor (1: not clipped)")],
    "chunks": [("mean_squared_chunk_norm", "Gradient norms of chunks (sgd: mini-batches)",
                "root mean square of the norms")],
    "loss": [("loss", "Training loss", "mean over the samples")],
}  # fmt: skip
X_LABELS = {
    "step": "optimizer steps (of mini-batches for sgd, of all samples for the rest)",
    "pass": "passes over the training set (steps, or epochs of sgd)",
}
LOOKS = {  # the colour is the row's step of the ladder, the line style its kind of augmentation
    step + suffix: {"color": color, "linestyle": line}
    for step, color in zip(STEPS, plots.PALETTE, strict=False)
    for suffix, line in zip(TABLES, ("-", "--", "-.", ":"), strict=True)
}


@plots.styled()
def draw_all(
    plan: Plan, finished: Mapping[str, list[RunFolder]], differences: Mapping[str, Any]
) -> list[str]:
    """Draw the figures of the finished runs into the ladder's folder; returns their names.

    `differences` are the rows' to sgd, as :func:`fbopt.train.ladder.paired.difference` has them.
    """
    rows = {row: [f.read_metrics() for f in folders] for row, folders in finished.items()}
    first, *more = next(iter(plan.runs.values()))
    heading = f"{first.data_name}, {f'mean of {1 + len(more)} seeds' if more else 'one seed'}"
    names = []
    if differences and (page := _draw_differences(differences)) is not None:
        names.append(DIFFERENCES)
        page.suptitle(first.data_name)
        plots.save(page, plan.folder / f"{DIFFERENCES}.png")
    for name, panels in FIGURES.items():
        if (
            not any(rows.values())
            or (page := plots.figure(plots.PAGE, 1.4 + 2.1 * len(panels))) is None
        ):
            return []
        if name == ACCURACY and first.validation:  # the test set was looked at once
            panels = [("validation_accuracy", panels[0][1].replace("Test", "Validation"),
                       panels[0][2])]  # fmt: skip
        all_axes = page.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        x = "step" if name == ACCURACY else "pass"
        for axes, (key, title, label) in zip(all_axes, panels, strict=True):
            _draw(axes, key, x, rows)
            axes.set(title=title, ylabel=label)
        plots.log_steps(all_axes[-1], X_LABELS[x])
        all_axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        page.suptitle(heading)
        plots.save(page, plan.folder / f"{name}.png")
        names.append(name)
    return [f"{name}.png" for name in names]


def _draw(axes: Any, key: str, x: str, rows: Mapping[str, list[plots.Records]]) -> None:
    """Draw a metric of each row."""
    for row, runs in rows.items():
        plots.draw_line(axes, runs, key, x, label=row, **LOOKS[row])
    if key == "clip":
        axes.set_ylim(0, 1.05)
    elif not key.endswith("accuracy"):
        plots.log_scale(axes)
    plots.tidy(axes)


def _draw_differences(differences: Mapping[str, Any]) -> Any:
    """A line per row: its mean difference to sgd, the interval, every seed, and zero."""
    page = plots.figure(plots.PAGE, 1.2 + 0.36 * len(differences))
    if page is None:
        return None
    axes = page.subplots()
    for place, (row, found) in enumerate(differences.items()):
        color, mean = LOOKS[row]["color"], 100 * found["mean"]
        seeds = [100 * d for d in found["pairs"].values()]
        axes.plot(seeds, [place + 0.22] * len(seeds), "|", color=color, markersize=6, alpha=0.7)
        if found["low"] is not None:
            ends = [100 * found["low"], 100 * found["high"]]
            axes.plot(ends, [place] * 2, color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([mean], [place], "o", color=color, markersize=7)
    axes.axvline(0, color=plots.GREY, linewidth=1.2)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.4, -0.6)  # the first row above
    axes.set(
        title="Test accuracy minus sgd's of the same seed",
        xlabel="percentage points (dots: means; bars: 95 % intervals; strokes: seeds)",
    )
    plots.tidy(axes)
    return page
