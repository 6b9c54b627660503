"""The figure of `fbopt flow`: losses, sharpness, and distances to the steps of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fbopt.train.reporting import plots

DISTANCES = {"function": "outputs apart (RMS)", "parameter": "parameters apart"}


def draw(records: Sequence[dict[str, Any]], kind: str) -> Any:
    """Draw the records; returns the figure. Raises NoFigures without matplotlib."""
    with plots.styled():
        page = plots.blank(plots.PAGE, 4.4)
        (loss, sharpness), distances = page.subplots(2, 2, sharex=True)
        steps = [r["step"] for r in records]

        def curve(axes: Any, key: str, color: str, style: str = "-", label: str = "") -> None:
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=label)

        curve(loss, "loss", plots.BLACK, label="steps of the run")
        curve(loss, "flow_loss", plots.ORANGE, label=f"{kind} flow")
        if kind == "central":
            curve(loss, "flow_mean_loss", plots.ORANGE, ":", "… with the oscillation's loss")
        loss.set(ylabel="training loss", yscale="log")
        curve(sharpness, "sharpness", plots.BLACK)
        curve(sharpness, "flow_sharpness", plots.ORANGE)
        sharpness.plot(
            steps, [r["threshold"] for r in records], "--", color=plots.GREY, label="2/lr"
        )
        sharpness.set(ylabel="sharpness")
        for axes, (key, label) in zip(distances, DISTANCES.items(), strict=True):
            curve(axes, f"{key}_distance", plots.ORANGE, ":", "to the iterates")
            curve(axes, f"{key}_distance_smoothed", plots.ORANGE, "-", "to the smoothed iterates")
            axes.set(xlabel="steps", ylabel=label, ylim=(0, None))
        for axes in (loss, sharpness, *distances):
            plots.tidy(axes)
            axes.legend(fontsize=7)
        return page
