"""The curves of a run as a picture: loss, accuracy, gradient norm and learning rate."""

from __future__ import annotations

from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.reporting import plots
from fbopt.train.reporting.plots import BLUE, GREY, ORANGE


def draw_curves(folder: RunFolder, options: Options) -> bool:
    """Draw metrics.jsonl to curves.png; False where matplotlib is not installed."""
    rows = 3 if options.tracked else 2
    if (figure := plots.figure(9, 3 * rows)) is None:
        return False
    records = folder.read_metrics()
    (loss, accuracy), (norm, rate), *tracked = figure.subplots(rows, 2, sharex=True)
    _line(loss, records, "loss", BLUE, "train")
    _line(loss, records, "test_loss", ORANGE, "test")
    loss.set(ylabel="mean cross-entropy (nats)", title="Loss")
    _line(accuracy, records, "train_accuracy", BLUE, "train", percent=True)
    _line(accuracy, records, "test_accuracy", ORANGE, "test", percent=True)
    accuracy.set(ylabel="samples classified right (%)", title="Accuracy")
    _line(norm, records, "gradient_norm", BLUE, "before clipping")
    if options.max_norm is not None:
        norm.axhline(options.max_norm, color=GREY, linestyle="--", label="clipped to")
        norm.legend(frameon=False)
    title = "Gradient norm" + (", last mini-batch" if options.stochastic else ", full batch")
    norm.set(ylabel="Euclidean norm", title=title)
    _line(rate, records, "lr", BLUE, "learning rate")
    rate.set(ylabel="learning rate", title="Learning rate")
    _tracked(tracked, records, options)
    _finish(figure, (loss, accuracy), tracked[0] if tracked else (norm, rate), options)
    for axes in (loss, norm):
        plots.log_scale(axes)
    if "test_accuracy" in records[-1]:
        figure.suptitle(
            f"{options.data_name}, {options.recipe}, seed {options.seed}: test accuracy "
            f"{records[-1]['test_accuracy']:.1%}"
        )
    figure.savefig(folder.curves)
    return True


def _tracked(rows: list[Any], records: list[dict[str, Any]], options: Options) -> None:
    """What --track measured: sharpness beside its threshold, noise scale."""
    panels = list(rows[0]) if rows else []
    for name, axes in zip(options.tracked, panels, strict=False):
        if name == "sharpness":
            _line(axes, records, "sharpness", BLUE, "largest eigenvalue")
            _line(axes, records, "sharpness_threshold", ORANGE, "threshold of stability")
            axes.set(ylabel="curvature of the loss (nats)", title="Sharpness, full batch")
        else:
            _line(axes, records, "noise_scale", BLUE, "noise scale")
            axes.set(ylabel="samples", title="Gradient noise scale")
        if axes.lines:
            plots.log_scale(axes)
            axes.legend(frameon=False)
    for axes in panels[len(options.tracked) :]:
        axes.set_axis_off()


def _line(
    axes: Any,
    records: list[dict[str, Any]],
    key: str,
    color: str,
    label: str,
    percent: bool = False,
) -> None:
    points = [
        (r["pass"], r[key] * (100 if percent else 1)) for r in records if r.get(key) is not None
    ]
    if points:
        marker = "o" if len(points) < 30 else None
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            label=label,
            linewidth=1.5,
            marker=marker,
            markersize=3,
        )


def _finish(figure: Any, with_legend: tuple, bottom: tuple, options: Options) -> None:
    for axes in figure.axes:
        plots.tidy(axes)
    for axes in with_legend:
        axes.legend(frameon=False)
    for axes in bottom:
        axes.set_xlabel("epochs" if options.stochastic else "full-batch steps")
