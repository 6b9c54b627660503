"""The figure of `benchmarks.step --peers --growth`: a panel for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.growth import LINES, Axis
from fbopt.train.reporting.plots import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    figure,
    log_scale,
    log_steps,
    tidy,
)

# Markers and dashes tell the lines apart without colours.
STYLES = ((BLACK, "x", ":"), (ORANGE, "s", "--"), (PURPLE, "^", "-."), (BLUE, "o", "-"))
STYLES += ((GREEN, "D", "-"),)


def draw(axes: Sequence[Axis], heading: str, path: Path) -> bool:
    """Write the figure; return False where matplotlib is not installed."""
    if (page := figure(9, 7)) is None:
        return False
    styles = dict(zip(dict.fromkeys(LINES.values()), STYLES, strict=True))
    for panel, axis in zip(page.subplots(2, 2).flat, axes, strict=True):
        for line, style in styles.items():
            if line in axis.curves:
                _draw_line(panel, axis.curves[line], line, style)
        panel.set(title=axis.title, ylabel="ms for a penalised gradient", xlabel=axis.label)
        log_scale(panel)
        if axis.label == "processes":
            panel.set_xticks(sorted({x for curve in axis.curves.values() for x in curve}))
            panel.set_ylim(0, None)
        else:
            log_steps(panel, axis.label)
        tidy(panel)
    handles, labels = page.axes[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    page.suptitle(heading)
    page.savefig(path)
    return True


def _draw_line(panel: Any, curve: dict[int, float], label: str, style: tuple[str, ...]) -> None:
    color, marker, dashes = style
    places = sorted(curve)
    milliseconds = [1e3 * curve[place] for place in places]
    look = {"marker": marker, "linestyle": dashes, "markersize": 4, "linewidth": 1.2}
    panel.plot(places, milliseconds, color=color, label=label, **look)
