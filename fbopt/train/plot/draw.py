"""The figure of `fbopt plot`: a panel for each metric, a colour for each value of an option."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fbopt.train.config.options import OptionsError
from fbopt.train.plot.options import Plot, names_in
from fbopt.train.plot.read import Run, note
from fbopt.train.reporting import plots

X_LABELS = {
    "pass": "passes over the training set", "step": "optimizer steps",
    "seconds": "seconds of training", "gradients": "gradient evaluations",
}  # fmt: skip
Y_LABELS = {
    "loss": "training loss", "lr": "learning rate", "clip": "clip coefficient",
    "noise_scale": "noise scale (samples)",
    "mean_squared_chunk_norm": "RMS norm of chunks",
}  # fmt: skip
SHARPNESS = (
    "sharpness", "preconditioned_sharpness", "batch_sharpness", "batch_sharpness_ratio",
)  # fmt: skip
THRESHOLD = "sharpness_threshold"
MOST_LEGEND, LONGEST, LINE = 6, 48, 60  # values in a legend; characters of one, and of its line


def draw(options: Plot, runs: Sequence[Run]) -> Any:
    """Draw the runs; returns the figure.

    Raises:
        OptionsError: there are more values than colours that can be told apart.
        NoFigures: matplotlib cannot be imported.
    """
    with plots.styled():
        page = plots.blank(plots.COLUMN, 0.7 + 1.45 * len(options.metrics))
        colors = colors_of([run.value for run in runs])
        panels = page.subplots(len(options.metrics), 1, squeeze=False, sharex=True)[:, 0]
        logs = names_in(options.log)
        for axes, key in zip(panels, options.metrics, strict=True):
            _draw_panel(axes, options.x, key, runs, colors, key in logs)
        panels[-1].set_xlabel(X_LABELS.get(options.x, options.over))
        if options.x in logs:
            _set_log(panels[-1], [run.place for run in runs if run.place is not None])
        page.align_ylabels(panels)
        if len(colors) > MOST_LEGEND and _are_numbers(colors):
            _add_bar(page, panels, colors, options.option)
        elif options.option is not None or len(colors) > 1:
            _add_legend(page, colors, options.option)
        return page


def colors_of(values: Sequence[Any]) -> dict[Any, str]:
    """A colour for each value, in order: viridis for numbers, Okabe and Ito's for others.

    Grey is for None beside numbers. Raises OptionsError where others are more than the colours.
    """
    found = list(dict.fromkeys(values))
    if _are_numbers(found):
        numbers = sorted(value for value in found if value is not None)
        colors = dict(zip(numbers, plots.shades(len(numbers)), strict=True))
        return colors | ({None: plots.GREY} if None in found else {})
    if len(found) > len(plots.PALETTE):
        raise OptionsError(
            f"{len(found)} values, and {len(plots.PALETTE)} colours that can be told apart; draw "
            "fewer runs, or colour them --by an option with numbers, such as --by lr"
        )
    return dict(zip(found, plots.PALETTE, strict=False))


def _are_numbers(values: Any) -> bool:
    kinds = {type(value) for value in values} - {type(None)}
    return bool(kinds) and kinds <= {int, float}


def _draw_panel(
    axes: Any, x: str, key: str, runs: Sequence[Run], colors: dict[Any, str], is_log: bool
) -> None:
    """Draw a metric of all runs, and beside a sharpness the thresholds."""
    if runs[0].place is not None:
        _draw_ends(axes, key, runs, colors)
    tops = []
    for run in runs:
        places, values = run.points(x, key)
        if is_log and (hidden := sum(value <= 0 for value in values)):
            note(f"{run.path}: {hidden} values of {key} are not above 0: --log does not show them")
        marker = "o" if len(places) < 30 else None
        axes.plot(places, values, color=colors[run.value], marker=marker, markersize=2.5)
        tops += values
        if key in SHARPNESS and values and run.place is None:
            places, limits = run.points(x, THRESHOLD)
            if limits:
                axes.plot(places, limits, "--", color=colors[run.value], linewidth=0.9)
                tops.append(min(limits))
    low, high = axes.get_ylim()
    if is_log:
        axes.set_yscale("log", nonpositive="mask")
        positive = [v for line in axes.lines for v in line.get_ydata() if v > 0]
        low, high = min(positive, default=1) / 1.2, max(positive, default=1) * 1.2
        _label_log(axes.yaxis, max(tops) / low)
    if key in SHARPNESS:  # a threshold of a rate that decays rises without end
        high = min(high, max(tops) * 1.2 if max(tops) > 0 else high)
        if any(line.get_linestyle() == "--" for line in axes.lines):
            _add_key(axes)
    axes.set_ylim(low, high)
    axes.set_ylabel(_label(key))
    plots.tidy(axes)


def _draw_ends(axes: Any, key: str, runs: Sequence[Run], colors: dict[Any, str]) -> None:
    """A line through the means of the runs of one colour and number."""
    for value, color in colors.items():
        ends: dict[float, list[float]] = {}
        for run in runs:
            if run.value == value and run.place is not None:
                ends.setdefault(run.place, []).extend(run.points("", key)[1])
        means = {place: statistics.mean(found) for place, found in ends.items() if found}
        places = sorted(means)
        axes.plot(places, [means[place] for place in places], color=color, alpha=0.6)


def _set_log(axes: Any, places: Sequence[float]) -> None:
    """Make the axis below logarithmic; where it has a zero, linear from there to the next one."""
    above = [place for place in places if place > 0]
    if len(above) == len(places):
        axes.set_xscale("log")
        return
    if not above or min(places) < 0:
        raise OptionsError("--log: the axis below has numbers that are negative, or none above 0")
    axes.set_xscale("symlog", linthresh=min(above), linscale=0.5)
    axes.set_xlim(-min(above) / 4, max(above) * 1.3)
    axes.xaxis.set_major_formatter("{x:g}")


def _label_log(axis: Any, ratio: float) -> None:
    """Label a logarithmic axis with plain numbers, also where it has no power of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if ratio > 10:
        return plots.label_ticks(axis, "{x:g}", ratio)
    axis.set_major_locator(MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    return axis.set_major_formatter("{x:g}")


def _add_key(axes: Any) -> None:
    from matplotlib.lines import Line2D

    dashed = Line2D([], [], color=plots.GREY, linestyle="--", linewidth=0.9)
    axes.legend([dashed], ["threshold of stability"], frameon=False)


def _add_legend(page: Any, colors: dict[Any, str], option: str | None) -> None:
    """A legend above the panels, in as many columns as are legible."""
    from matplotlib.lines import Line2D

    words = [_word(value) for value in colors]
    lines = [Line2D([], [], color=color) for color in colors.values()]
    columns = max(1, LINE // (max(map(len, words)) + 8))
    page.legend(lines, words, title=option, loc="outside upper center", ncols=columns,
                frameon=False, handlelength=1.5)  # fmt: skip


def _add_bar(page: Any, panels: Any, colors: dict[Any, str], option: str | None) -> None:
    """A colour bar with a field for each number, in equal steps whatever their distances."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm([i - 0.5 for i in range(len(colors) + 1)], len(colors))
    shown = ScalarMappable(norm, ListedColormap(list(colors.values())))
    ticks = list(range(0, len(colors), math.ceil(len(colors) / 10)))
    bar = page.colorbar(shown, ax=list(panels), label=option, ticks=ticks)
    bar.ax.set_yticklabels([_word(value) for value in itertools.compress(
        colors, (i in ticks for i in range(len(colors))))])  # fmt: skip
    bar.minorticks_off()


def _word(value: Any) -> str:
    """A value in a legend; of a folder its name."""
    if isinstance(value, Path):
        value = value.name or value.resolve().name
    word = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return word if len(word) <= LONGEST else f"…{word[-LONGEST:]}"


def _label(key: str) -> str:
    """The words at the axis of a metric, with its unit where it has one."""
    words = key.replace("_", " ")
    return Y_LABELS.get(key, words + " (%)" * key.endswith("_accuracy"))
