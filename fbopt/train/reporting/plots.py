"""The palette and axes that all figures share, and the curves of a run."""

from __future__ import annotations

from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too light for a line.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
GREY = "#555555"
Records = list[dict[str, Any]]


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches; None, after a message, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def tidy(axes: Any) -> None:
    """Draw a light grid, and no frame where there is no scale."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Any) -> None:
    """Use a logarithmic y axis with plain numbers, for values over more than a decade."""
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    ratio = max(values, default=1) / min(values, default=1)
    if ratio > 10:
        axes.set_yscale("log")
        _label_ticks(axes.yaxis, "{x:g}", ratio)


def log_steps(axes: Any, label: str) -> None:
    """Use a logarithmic x axis of counts."""
    places = [place for line in axes.lines for place in line.get_xdata()]
    axes.set_xscale("log")
    _label_ticks(axes.xaxis, "{x:,.0f}", max(places, default=1) / min(places, default=1))
    axes.tick_params(axis="x", which="minor", labelsize="small")
    axes.set_xlabel(label)


def _label_ticks(axis: Any, words: str, ratio: float) -> None:
    """Label the powers of ten and, where they are few, twice and five times them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_formatter(words)
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter(words if ratio < 300 else NullFormatter())


def draw_curves(folder: RunFolder, options: Options) -> bool:
    """Draw metrics.jsonl to curves.png; return False where matplotlib is not installed."""
    rows = 3 if options.tracked else 2
    if (page := figure(9, 3 * rows)) is None:
        return False
    records = folder.read_metrics()
    (loss, accuracy), (norm, rate), *tracked = page.subplots(rows, 2, sharex=True)
    _line(loss, records, "loss", BLUE, "train")
    _line(loss, records, "test_loss", ORANGE, "test")
    loss.set(ylabel="mean cross-entropy (nats)", title="Loss")
    _line(accuracy, records, "train_accuracy", BLUE, "train", scale=100)
    _line(accuracy, records, "test_accuracy", ORANGE, "test", scale=100)
    accuracy.set(ylabel="samples classified right (%)", title="Accuracy")
    _line(norm, records, "gradient_norm", BLUE, "before clipping")
    if options.max_norm is not None:
        norm.axhline(options.max_norm, color=GREY, linestyle="--", label="clipped to")
        norm.legend(frameon=False)
    title = "Gradient norm" + (", last mini-batch" if options.stochastic else ", full batch")
    norm.set(ylabel="Euclidean norm", title=title)
    _line(rate, records, "lr", BLUE, "learning rate")
    rate.set(ylabel="learning rate", title="Learning rate")
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    _draw_tracked(tracked, records, options)
    for axes in page.axes:
        tidy(axes)
    for axes in tracked[0] if tracked else (norm, rate):
        axes.set_xlabel("epochs" if options.stochastic else "full-batch steps")
    for axes in (loss, norm):
        log_scale(axes)
    if "test_accuracy" in records[-1]:
        page.suptitle(
            f"{options.data_name}, {options.recipe}, seed {options.seed}: test accuracy "
            f"{records[-1]['test_accuracy']:.1%}"
        )
    page.savefig(folder.curves)
    return True


def _draw_tracked(rows: list[Any], records: Records, options: Options) -> None:
    """Draw the measures of --track: sharpness beside its threshold, noise scale."""
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
            log_scale(axes)
            axes.legend(frameon=False)
    for axes in panels[len(options.tracked) :]:
        axes.set_axis_off()


def _line(axes: Any, records: Records, key: str, color: str, label: str, scale: float = 1) -> None:
    """Draw a metric against passes, where the records have it; few points with markers."""
    points = [(r["pass"], r[key] * scale) for r in records if r.get(key) is not None]
    if points:
        style = {"color": color, "linewidth": 1.5, "markersize": 3}
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, **style)
