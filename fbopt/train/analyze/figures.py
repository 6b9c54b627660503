"""Figures of what was measured, from the numbers in results.json: PNG and SVG, for print.

Colours are Okabe and Ito's, and cividis: told apart with any colour vision, and in grey.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
MARKERS, STYLES = ("o", "s", "^"), ("-", "--", ":")
BATCHNORM = {
    "none": "The model has no BatchNorm.",
    "chunk": "BatchNorm re-estimated: each chunk's own statistics at every point.",
    "frozen": "BatchNorm frozen: running statistics of the checkpoint (the first, if several).",
}
VECTORS = {
    "zero": "biases and BatchNorm parameters stay",
    "scaled": "biases and BatchNorm parameters change too",
}
Values = Mapping[str, Any]
PAGE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8,
    "svg.hashsalt": "fbopt", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function draw in the page's fonts; it raises ImportError without matplotlib."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(PAGE):
            return draw(*arguments, **options)

    return drawn


def new(width: float, height: float, columns: int = 1, **grid: Any) -> tuple[Any, Any]:
    """A figure of so many inches and its row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **grid)[0]


@styled
def save(figure: Any, path: Path, note: str = "") -> None:
    """Write `path` with .png (300 dots per inch) and .svg, with a note below; the same bytes each
    time.
    """
    if note:
        lines = textwrap.fill(note, int(figure.get_size_inches()[0] * 17))
        figure.supxlabel(lines, fontsize=7, color=GREY)
    figure.savefig(path.with_suffix(".png"), dpi=300)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


@styled
def line(runs: Mapping[str, Values]) -> tuple[Any, str]:
    """The loss along one random direction, of all runs in one frame."""
    figure, (axes,) = new(4.6, 3.2)
    for name, values, color, style in zip(short(runs), runs.values(), COLORS, STYLES, strict=False):
        axes.plot(values["axes"][0], _floats(values["losses"]), style, color=color, label=name)
    axes.set(xlabel="distance along the direction (filter norms)", ylabel="training loss (nats)")
    logarithmic(axes)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False)
    return figure, _note(next(iter(runs.values())), "One random direction")


@styled
def plane(runs: Mapping[str, Values], flat: Mapping[str, Values]) -> tuple[Any, str]:
    """The loss in the plane of two random directions, one panel a run, at one scale, and, where
    it was measured, the flatness beside them.
    """
    panels = len(runs) + bool(flat)
    widths = [1.0] * len(runs) + [0.8] * bool(flat)
    figure, axes = new(2.6 * panels + 0.9, 2.9, panels, width_ratios=widths)
    levels = _levels([_floats(v["losses"]) for v in runs.values()])
    for one, name, values in zip(axes, short(runs), runs.values(), strict=False):
        shades = contours(one, values, levels)
        one.plot(0, 0, "+", color="white", markersize=7)
        one.set(title=name, xlabel="direction 1 (filter norms)")
    axes[0].set_ylabel("direction 2 (filter norms)")
    _colorbar(figure, shades, list(axes[: len(runs)]))
    if flat:
        _distances(axes[-1], flat)
    note = _note(next(iter(runs.values())), "Two random directions, the same for all runs")
    return figure, note + ("" if not flat else " " + _flat_note(flat))


@styled
def flatness(runs: Mapping[str, Values]) -> tuple[Any, str]:
    """The distances to a rise of the loss, one point a direction, with mean and standard error."""
    figure, (axes,) = new(1.6 + 1.2 * len(runs), 3.1)
    _distances(axes, runs)
    return figure, _flat_note(runs)


@styled
def sharpness(runs: Mapping[str, Values]) -> tuple[Any, str]:
    """Eigenvalues in order, and the threshold of stability of each run."""
    figure, (axes,) = new(4.6, 3.2)
    largest = 0.0
    for i, (name, values) in enumerate(zip(short(runs), runs.values(), strict=True)):
        found = values["eigenvalues"]
        largest = max(largest, *found)
        places = np.arange(1, len(found) + 1)
        axes.plot(places, found, MARKERS[i], color=COLORS[i], label=name)
        if values["threshold"] is not None:
            axes.axhline(
                values["threshold"], color=COLORS[i], linestyle=STYLES[i], linewidth=1,
                label=f"stable below {values['threshold']:.3g}",
            )  # fmt: skip
    axes.set(
        xlabel="index (largest first" + (", then smallest)" if len(found) > 5 else ")"),
        ylabel="eigenvalue of the Hessian (nats)",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=len(runs), frameon=False)
    formulas = [values["threshold_formula"] for values in runs.values()]
    if len(set(formulas)) > 1:
        formulas = [f"{n}: {words}" for n, words in zip(short(runs), formulas, strict=True)]
    words = "; ".join(dict.fromkeys(formulas))
    return figure, f"Lines: full-batch steps are stable below {words}."


@styled
def between(values: Values) -> tuple[Any, str]:
    """The loss on the line between two runs, or in the plane of three."""
    names = short(values["names"])
    if len(values["axes"]) == 1:
        figure, (axes,) = new(4.6, 3.2)
        axes.plot(values["axes"][0], _floats(values["losses"]), color=COLORS[0])
        for place, name, marker in zip((0, 1), names, MARKERS, strict=False):
            height = np.interp(place, values["axes"][0], _floats(values["losses"]))
            axes.plot(place, height, marker, color=COLORS[1], label=name)
        axes.set(
            xlabel="share of the way from the first to the second", ylabel="training loss (nats)"
        )
        logarithmic(axes)
        axes.grid(alpha=0.25)
    else:
        figure, (axes,) = new(4.4, 3.6)
        shades = contours(axes, values, _levels([_floats(values["losses"])]))
        for place, name, marker in zip(((0, 0), (1, 0), (0, 1)), names, MARKERS, strict=True):
            axes.plot(*place, marker, color="white", markeredgecolor="black", label=name)
        axes.set(xlabel="share of the way to the second", ylabel="share of the way to the third")
        _colorbar(figure, shades, [axes])
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return figure, BATCHNORM[values["batchnorm"]]


def short(names: Iterable[str]) -> list[str]:
    """Names of runs without the words at both ends that all have in common."""
    words = [re.split(r"(-|, )", name) for name in names]
    if len(words) == 1:
        return ["".join(words[0])]
    while len({w[0] for w in words}) == 1 and min(map(len, words)) > 2:
        words = [w[2:] for w in words]
    while len({w[-1] for w in words}) == 1 and min(map(len, words)) > 2:
        words = [w[:-2] for w in words]
    return ["".join(w) for w in words]


def contours(axes: Any, values: Values, levels: np.ndarray) -> Any:
    """Filled contours of the losses on a logarithmic scale, with lines; white where not finite."""
    from matplotlib.colors import LogNorm

    losses = np.clip(_floats(values["losses"]), levels[0], None)
    x, y = values["axes"]
    norm = LogNorm(levels[0], levels[-1])
    shades = axes.contourf(x, y, losses.T, levels, norm=norm, cmap="cividis", extend="max")
    axes.contour(x, y, losses.T, levels[::2], colors="white", linewidths=0.4, alpha=0.7)
    axes.set_aspect("equal")
    return shades


def logarithmic(axes: Any, ratio: float = 20) -> None:
    """A logarithmic scale with plain numbers, where the lines' values span more than `ratio`."""
    heights = np.concatenate([np.asarray(one.get_ydata(), dtype=float) for one in axes.lines])
    heights = heights[np.isfinite(heights)]
    if heights.min() > 0 and heights.max() > ratio * heights.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def _distances(axes: Any, runs: Mapping[str, Values]) -> None:
    for i, values in enumerate(runs.values()):
        found = np.asarray(values["distances"])
        spread = np.linspace(-0.12, 0.12, len(found))
        axes.plot(i + spread, found, MARKERS[i], color=COLORS[i], alpha=0.5, markersize=3)
        axes.errorbar(
            i + 0.25, values["mean"], values["error"], color=COLORS[i], marker=MARKERS[i], capsize=3
        )
    rise = next(iter(runs.values()))["threshold"]
    axes.set(
        title="flatness", xlim=(-0.5, len(runs) - 0.35), ylim=(0, None),
        ylabel=f"distance to a loss {rise:g} nats higher\n(filter norms)",
    )  # fmt: skip
    axes.set_xticks(range(len(runs)), [name.replace(", ", "\n") for name in short(runs)])
    axes.grid(axis="y", alpha=0.25)


def _flat_note(runs: Mapping[str, Values]) -> str:
    first = next(iter(runs.values()))
    return (
        f"Flatness: each small marker one of {len(first['distances'])} directions; the large one "
        "the mean ± standard error."
    )


def _levels(losses: Sequence[np.ndarray]) -> np.ndarray:
    """Sixteen contour levels in equal ratios over all finite losses."""
    finite = np.concatenate([one[np.isfinite(one) & (one > 0)] for one in losses])
    low = finite.min()
    return np.geomspace(low, max(finite.max(), low * 1.1), 17)


def _colorbar(figure: Any, shades: Any, axes: list[Any]) -> None:
    ticks = [m * 10.0**e for e in range(-8, 9) for m in (1, 2, 5)]
    low, high = shades.levels[0], shades.levels[-1]
    ticks = [t for t in ticks if low <= t <= high]
    bar = figure.colorbar(shades, ax=axes, label="training loss (nats)", ticks=ticks)
    bar.ax.set_yticklabels([f"{t:g}" for t in ticks])
    bar.minorticks_off()


def _note(values: Values, what: str) -> str:
    return (
        f"{what} (seed {values['seed']}), filter-normalised to each run's own weights; "
        f"{VECTORS[values['vectors']]}. {BATCHNORM[values['batchnorm']]}"
    )


def _floats(losses: Any) -> np.ndarray:
    """Losses as they are read from JSON; NaN for None."""
    return np.array(losses, dtype=float)
