"""The style, palette and axes that all figures share, and the curves of a run."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.run_dir import RunFolder, accuracies
from fbopt.train.config.options import Options
from fbopt.train.config.reading import reason
from fbopt.train.config.rules import has_threshold, is_preconditioned

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too light for a line.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
GREY, BROWN, OLIVE = "#555555", "#7F4F24", "#8A8A00"
PALETTE = (BLACK, ORANGE, AMBER, SKY, BLUE, GREEN, PURPLE, OLIVE, BROWN, GREY)
SPLITS = {"train": BLUE, "test": ORANGE, "validation": GREEN}
CONVERSIONS = {  # from a metric to what is drawn
    **dict.fromkeys((f"{split}_accuracy" for split in SPLITS), lambda share: 100 * share),
    "mean_squared_chunk_norm": math.sqrt,
}
Records = list[dict[str, Any]]
LARGEST = 1e300  # of what a figure can show
COLUMN, PAGE = 3.25, 6.75  # widths in inches: of one column of a two-column paper, and of both
STYLE = {  # nothing is set in less than 7 points, and fonts are embedded as journals ask for
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 9,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.title_fontsize": 7,
    "lines.linewidth": 1.2, "lines.markersize": 4, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False,
    "image.cmap": "viridis", "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip
SUFFIXES = (".png", ".pdf")


class NoFigures(RuntimeError):
    """Why this Python can draw no figure, and the cure."""


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw within it in the style of all figures; changes nothing where there is no matplotlib."""
    try:
        from matplotlib import rc_context
    except Exception:  # figure() tells it
        yield
        return
    with rc_context(STYLE):
        yield


def blank(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises NoFigures where matplotlib cannot be imported."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoFigures("pip install matplotlib") from error
    except Exception as error:  # of its own settings, such as MPLBACKEND
        raise NoFigures(f"matplotlib does not start: {reason(error)}") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches; None, after a message, where matplotlib cannot be imported."""
    try:
        return blank(width, height)
    except NoFigures as error:
        print(f"no pictures: {error}")
        return None


def save(page: Any, path: Path, **look: Any) -> None:
    """Write a figure to a file, as a whole: PDF for the suffix .pdf, else PNG.

    The same figure gives the same bytes: a PDF holds no date.
    """
    content = io.BytesIO()
    if path.suffix.lower() == ".pdf":
        look = {"format": "pdf", "metadata": {"CreationDate": None}} | look
    page.savefig(content, **({"format": "png"} | look))
    atomic.replace(path, content.getvalue())


def shades(count: int) -> list[str]:
    """Colours of viridis for so many ordered values, from dark to light, up to its light yellow."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(matplotlib.colormaps["viridis"](0.85 * i / max(count - 1, 1)))
            for i in range(count)]  # fmt: skip


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
        label_ticks(axes.yaxis, "{x:g}", ratio)


def log_steps(axes: Any, label: str) -> None:
    """Use a logarithmic x axis of counts."""
    places = [place for line in axes.lines for place in line.get_xdata()]
    axes.set_xscale("log")
    label_ticks(axes.xaxis, "{x:,.0f}", max(places, default=1) / min(places, default=1))
    axes.set_xlabel(label)


def label_ticks(axis: Any, words: str, ratio: float) -> None:
    """Label the powers of ten and, where they are few, twice and five times them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_formatter(words)
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter(words if ratio < 300 else NullFormatter())


@styled()
def draw_curves(folder: RunFolder, options: Options) -> bool:
    """Draw metrics.jsonl to curves.png; return False where matplotlib is not installed."""
    panels = _panels(options)
    rows = (len(panels) + 1) // 2
    if (page := figure(PAGE, 2.2 * rows)) is None:
        return False
    if not (records := folder.read_metrics()):
        print(f"no curves: {folder.metrics} has no line that can be read")
        return False
    grid = list(page.subplots(rows, 2, sharex=True).flat)
    for axes, (title, unit, lines) in zip(grid, panels, strict=False):
        for (key, label), color in zip(lines.items(), (BLUE, ORANGE, GREEN), strict=False):
            draw_line(axes, [records], key, color=SPLITS.get(label, color), label=label)
        if "gradient_norm" in lines and options.max_norm is not None:
            axes.axhline(options.max_norm, color=GREY, linestyle="--", label="clipped to")
        axes.set(ylabel=unit, title=title)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        if not {"train_accuracy", "lr"} & set(lines):
            log_scale(axes)
    for axes in page.axes:
        tidy(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[len(panels) - 2 : len(panels)]:  # the lowest of each column
        axes.set_xlabel("epochs" if options.stochastic else "full-batch steps")
        axes.tick_params(labelbottom=True)
    if reached := accuracies(records[-1]):
        page.suptitle(f"{options.data_name}, {options.recipe}, seed {options.seed}: {reached}")
    with folder.writing(folder.curves):
        save(page, folder.curves)
    return True


def _panels(options: Options) -> list[tuple[str, str, dict[str, str]]]:
    """The panels of a run's curves: title, unit, and metrics with their labels."""
    batch = "last mini-batch" if options.stochastic else "full batch"
    splits = ("train", *options.evaluated(last=True))
    losses = {"loss" if split == "train" else f"{split}_loss": split for split in splits}
    shares = {f"{split}_accuracy": split for split in splits}
    seen = "preconditioned_sharpness" if is_preconditioned(options) else "sharpness"
    title = seen.replace("_", " ").capitalize()
    error = "half the squared error" if options.loss == "squared" else "mean cross-entropy (nats)"
    norm = "Euclidean norm" if options.norm_type == 2 else f"{options.norm_type}-norm"
    sharpness = {seen: "largest eigenvalue"}
    for number in range(2, options.eigenvalues + 1):
        sharpness[f"{seen}_{number}"] = f"eigenvalue {number}"
    if has_threshold(options):
        sharpness["sharpness_threshold"] = "threshold of stability"
    batches = {"batch_sharpness": "mean of 32 batches"}
    if has_threshold(options) and not is_preconditioned(options):
        batches["sharpness_threshold"] = "threshold of stability"
    tracked = {
        "batches": ("Batch sharpness", "curvature of their losses", batches),
        "sharpness": (f"{title}, full batch", "curvature of the loss", sharpness),
        "noise": ("Gradient noise scale", "samples", {"noise_scale": "noise scale"}),
    }
    return [
        ("Loss", error, losses),
        ("Accuracy", "correctly classified samples (%)", shares),
        (f"Gradient norm, {batch}", norm, {"gradient_norm": "before clipping"}),
        ("Learning rate", "learning rate", {"lr": "learning rate"}),
        *(tracked[name] for name in options.tracked),
    ]


def draw_line(axes: Any, runs: Sequence[Records], key: str, x: str = "pass", **look: Any) -> None:
    """Draw a metric against passes or steps, its mean over the runs; few points with markers.

    Of the test accuracy of several runs, shade the range too.
    """
    if points := shared_points(runs, key, x):
        marker = "o" if len(points) < 30 else None
        means = [statistics.mean(values) for values in points.values()]
        axes.plot(list(points), means, marker=marker, markersize=2.5, **look)
        if key == "test_accuracy" and len(runs) > 1:
            low, high = list(map(min, points.values())), list(map(max, points.values()))
            axes.fill_between(list(points), low, high, color=look["color"], alpha=0.15, linewidth=0)


def shared_points(runs: Sequence[Records], key: str, x: str) -> dict[float, list[float]]:
    """The values of a metric, as it is drawn, by pass or step, where every run has one."""
    found: dict[float, list[float]] = {}
    for record in itertools.chain(*runs):
        if (value := drawn(record, key)) is not None:
            found.setdefault(record[x], []).append(value)
    return {place: found[place] for place in sorted(found) if len(found[place]) == len(runs)}


def drawn(record: Mapping[str, Any], key: str) -> float | None:
    """A metric as it is drawn, such as a share in percent; None where no figure can show it."""
    if (value := record.get(key)) is None or not abs(value) < LARGEST:
        return None
    return CONVERSIONS.get(key, float)(value)
