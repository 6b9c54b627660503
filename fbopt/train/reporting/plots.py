"""What all pictures share: colours that any colour vision tells apart, scales, grids."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, without its yellow, which is too light for a line.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
GREY = "#555555"


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches; None, with a word of why, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def tidy(axes: Any) -> None:
    """A light grid, and no frame where there is no scale."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Any) -> None:
    """A logarithmic scale with plain numbers, for values over more than a decade."""
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    ratio = max(values, default=1) / min(values, default=1)
    if ratio > 10:
        axes.set_yscale("log")
        _name_ticks(axes.yaxis, "{x:g}", ratio)


def log_steps(axes: Any, label: str) -> None:
    """A logarithmic scale of counts from left to right."""
    places = [place for line in axes.lines for place in line.get_xdata()]
    axes.set_xscale("log")
    _name_ticks(axes.xaxis, "{x:,.0f}", max(places, default=1) / min(places, default=1))
    axes.tick_params(axis="x", which="minor", labelsize="small")
    axes.set_xlabel(label)


def _name_ticks(axis: Any, words: str, ratio: float) -> None:
    """Label the powers of ten, and where they are few what lies between them too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_formatter(words)
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter(words if ratio < 300 else NullFormatter())
