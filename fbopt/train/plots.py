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
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    ratio = max(values, default=1) / min(values, default=1)
    if ratio > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if ratio < 300 else NullFormatter())


def log_steps(axes: Any, label: str) -> None:
    """A logarithmic scale of counts from left to right."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.tick_params(axis="x", which="minor", labelsize="small")
    axes.set_xlabel(label)
