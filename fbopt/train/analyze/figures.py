"""The figures of `fbopt analyze`, drawn from the measures in results.json, as PNG for print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fbopt.analysis.density import smoothed
from fbopt.train.reporting import plots
from fbopt.train.reporting.plots import BLUE, GREEN, GREY, ORANGE

Values = Mapping[str, Any]  # of one run
COLORS, MARKERS, STYLES = (BLUE, ORANGE, GREEN), ("o", "s", "^"), ("-", "--", ":")
BATCHNORM = {
    "none": "The model has no BatchNorm.",
    "chunk": "BatchNorm re-estimated: each chunk's own statistics at every point.",
    "frozen": "BatchNorm frozen: running statistics of the checkpoint (the first, if several).",
}
VECTORS = {
    "zero": "biases and BatchNorm parameters stay",
    "scaled": "biases and BatchNorm parameters change too",
}


def draw(name: str, measures: Mapping[str, Any], path: Path) -> None:
    """Draw the figure of one measure at 300 dots per inch; the same values give the same bytes.

    Args:
        name: a key of `DRAWINGS`.
        measures: the "measures" of results.json.
        path: the file, .png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context(plots.STYLE):
        figure, note = DRAWINGS[name](measures)
        lines = textwrap.fill(note, int(figure.get_size_inches()[0] * 17))
        figure.supxlabel(lines, fontsize=7, color=GREY)
        plots.save(figure, path, dpi=300)


def line(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The loss along one random direction, all runs in one panel."""
    runs: Mapping[str, Values] = measures["line"]
    figure, (axes,) = _panels(4.6, 3.2)
    for name, values, color, style in zip(short(runs), runs.values(), COLORS, STYLES, strict=False):
        axes.plot(values["axes"][0], _losses(values), style, color=color, label=name)
    axes.set(xlabel="distance along the direction (filter norms)", ylabel="training loss")
    plots.log_scale(axes)
    _finish(figure, axes, len(runs))
    return figure, _note(runs, "One random direction")


def plane(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The loss in the plane of two random directions, a panel per run, on one colour scale; beside
    them the flatness, where it was measured.
    """
    runs, flat = measures["plane"], measures.get("flatness", {})
    panels = len(runs) + bool(flat)
    widths = [1.0] * len(runs) + [0.8] * bool(flat)
    figure, axes = _panels(2.6 * panels + 0.9, 2.9, panels, width_ratios=widths)
    levels = _levels(list(runs.values()))
    for one, name, values in zip(axes, short(runs), runs.values(), strict=False):
        filled = _contours(one, values, levels)
        one.plot(0, 0, "+", color="white", markersize=7)
        one.set(title=name, xlabel="direction 1 (filter norms)")
    axes[0].set_ylabel("direction 2 (filter norms)")
    _colorbar(figure, filled, list(axes[: len(runs)]))
    note = _note(runs, "Two random directions, the same for all runs")
    return figure, f"{note} {_distances(axes[-1], flat)}" if flat else note


def flatness(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The distances at which the loss has risen by the threshold."""
    runs = measures["flatness"]
    figure, (axes,) = _panels(1.6 + 1.2 * len(runs), 3.1)
    return figure, _distances(axes, runs)


def sharpness(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The eigenvalues in order, and each run's threshold of stability."""
    runs: Mapping[str, Values] = measures["sharpness"]
    names = short(runs)
    figure, (axes,) = _panels(4.6, 3.2)
    for i, (name, values) in enumerate(zip(names, runs.values(), strict=True)):
        found, threshold = values["eigenvalues"], values["threshold"]
        axes.plot(range(1, len(found) + 1), found, MARKERS[i], color=COLORS[i], label=name)
        if threshold is not None:
            style = {"color": COLORS[i], "linestyle": STYLES[i], "linewidth": 1}
            axes.axhline(threshold, label=f"stable below {threshold:.3g}", **style)
    order = {"both": "largest, then smallest"}.get(values["ends"], values["ends"])
    axes.set(xlabel=f"index ({order} first)", ylabel="eigenvalue of the Hessian")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(0, color=GREY, linewidth=0.6)
    _finish(figure, axes, len(runs))
    formulas = {n: v["threshold_formula"] for n, v in zip(names, runs.values(), strict=True)}
    known = {name: words for name, words in formulas.items() if words is not None}
    if not known:
        return figure, "No threshold of stability is known of these eigenvalues."
    if len(set(formulas.values())) > 1:
        known = {name: f"{name}: {words}" for name, words in known.items()}
    words = "; ".join(dict.fromkeys(known.values()))
    return figure, f"Lines: full-batch steps are stable below {words}."


def spectrum(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The density of all eigenvalues on a logarithmic axis."""
    runs: Mapping[str, Values] = measures["spectrum"]
    figure, (axes,) = _panels(4.6, 3.2)
    nodes = np.concatenate([values["nodes"] for values in runs.values()])
    width = max((nodes.max() - nodes.min()) / 200, 1e-12)
    x = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, 2001)
    highest = 0.0
    for name, values, color, style in zip(short(runs), runs.values(), COLORS, STYLES, strict=False):
        curve = smoothed(np.array(values["nodes"]), np.array(values["weights"]), x, width)
        axes.plot(x, curve, style, color=color, label=name)
        highest = max(highest, float(curve.max()))
    size = max(values["size"] for values in runs.values())
    one = 1 / (size * width * np.sqrt(2 * np.pi))  # the peak of a single eigenvalue
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
    axes.set_ylim(one / 5, 2 * highest)
    _finish(figure, axes, len(runs))
    first = next(iter(runs.values()))
    return figure, (
        f"Stochastic Lanczos quadrature, {first['probes']} random vectors, at most "
        f"{first['steps']} products each; Gaussians of width {width:.2g}; a single eigenvalue of "
        f"{size:,} has a peak of {one:.2g}."
    )


def between(measures: Mapping[str, Any]) -> tuple[Any, str]:
    """The loss on the line through two runs, or in the plane through three."""
    values: Values = measures["between"]
    names = short(values["names"])
    figure, (axes,) = _panels(4.6, 3.4)
    if len(names) == 2:
        axes.plot(values["axes"][0], _losses(values), color=BLUE)
        places = [(x, np.interp(x, values["axes"][0], _losses(values))) for x in (0, 1)]
        style = {"color": ORANGE}
        labels = "share of the way from the first to the second", "training loss"
        plots.log_scale(axes)
    else:
        filled = _contours(axes, values, _levels([values]))
        _colorbar(figure, filled, [axes])
        places = [(0, 0), (1, 0), (0, 1)]
        style = {"color": "white", "markeredgecolor": "black"}
        labels = "share of the way to the second", "share of the way to the third"
    for place, name, marker in zip(places, names, MARKERS, strict=False):
        axes.plot(*place, marker, label=name, **style)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    _finish(figure, axes, len(names), grid=len(names) == 2)
    return figure, BATCHNORM[values["batchnorm"]]


DRAWINGS = {f.__name__: f for f in (sharpness, flatness, line, plane, spectrum, between)}


def short(names: Iterable[str]) -> list[str]:
    """Names of runs without the leading and trailing words that all of them share."""
    words = [re.split(r"(-|, )", name) for name in names]
    for end, rest in ((0, slice(2, None)), (-1, slice(-2))):
        while len(words) > 1 and len({w[end] for w in words}) == 1 and min(map(len, words)) > 2:
            words = [w[rest] for w in words]
    return ["".join(w) for w in words]


def _panels(width: float, height: float, columns: int = 1, **grid: Any) -> tuple[Any, Any]:
    """A figure of that size in inches, and its row of axes."""
    figure = plots.figure(width, height)
    return figure, figure.subplots(1, columns, squeeze=False, **grid)[0]


def _finish(figure: Any, axes: Any, columns: int, grid: bool = True) -> None:
    if grid:
        plots.tidy(axes)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)


def _contours(axes: Any, values: Values, levels: np.ndarray) -> Any:
    """Filled contours of the losses on a logarithmic scale, with lines; white where not finite."""
    from matplotlib.colors import LogNorm

    losses = np.clip(_losses(values), levels[0], None).T
    norm = LogNorm(levels[0], levels[-1])
    filled = axes.contourf(*values["axes"], losses, levels, norm=norm, cmap="cividis", extend="max")
    axes.contour(*values["axes"], losses, levels[::2], colors="white", linewidths=0.4, alpha=0.7)
    axes.set_aspect("equal")
    return filled


def _levels(runs: Sequence[Values]) -> np.ndarray:
    """Contour levels that divide the range of all finite losses into sixteen equal ratios."""
    losses = np.concatenate([_losses(values).ravel() for values in runs])
    finite = losses[np.isfinite(losses) & (losses > 0)]
    return np.geomspace(finite.min(), max(finite.max(), finite.min() * 1.1), 17)


def _colorbar(figure: Any, filled: Any, axes: list[Any]) -> None:
    low, *_, high = filled.levels
    ticks = [t for e in range(-8, 9) for m in (1, 2, 5) if low <= (t := m * 10.0**e) <= high]
    bar = figure.colorbar(filled, ax=axes, label="training loss", ticks=ticks)
    bar.ax.set_yticklabels([f"{t:g}" for t in ticks])
    bar.minorticks_off()


def _distances(axes: Any, runs: Mapping[str, Values]) -> str:
    """Draw a point per direction, with mean and standard error; return the note."""
    for i, values in enumerate(runs.values()):
        found, style = values["distances"], {"color": COLORS[i], "marker": MARKERS[i]}
        places = i + np.linspace(-0.12, 0.12, len(found))
        axes.plot(places, found, linestyle="", alpha=0.5, markersize=3, **style)
        axes.errorbar(i + 0.25, values["mean"], values["error"], capsize=3, **style)
    axes.set(title="flatness", xlim=(-0.5, len(runs) - 0.35), ylim=(0, None))
    axes.set_ylabel(f"distance to a loss {values['threshold']:g} higher\n(filter norms)")
    axes.set_xticks(range(len(runs)), [name.replace(", ", "\n") for name in short(runs)])
    axes.grid(axis="y", alpha=0.25)
    return (
        f"Flatness: each small marker one of {len(found)} directions; the large one the mean ± "
        "standard error."
    )


def _note(runs: Mapping[str, Values], what: str) -> str:
    values = next(iter(runs.values()))
    return (
        f"{what} (seed {values['seed']}), filter-normalised to each run's own weights; "
        f"{VECTORS[values['vectors']]}. {BATCHNORM[values['batchnorm']]}"
    )


def _losses(values: Values) -> np.ndarray:
    """The losses of a run; NaN where results.json has null."""
    return np.array(values["losses"], dtype=float)
