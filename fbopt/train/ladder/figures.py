"""The figures of a ladder: what every row measured on its way, mean over the seeds.

A row has the colour of its step of the ladder and the line of its table (augmentation).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.ladder.plan import Plan
from fbopt.train.reporting import plots
from fbopt.train.reporting.plots import AMBER, BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY

Record = dict[str, Any]
COLOURS = {
    "sgd": BLACK, "fb": ORANGE, "fb-long": AMBER, "fb-clip": SKY, "fb-penalty": BLUE,
    "fb-strong": GREEN, "fb-shuffled": PURPLE,
}  # fmt: skip
LINES = {"": "-", "-aug": "--", "-x10": "-.", "-x40": ":"}


class Row(NamedTuple):
    """A row's name and the records of its runs, one list for each seed."""

    name: str
    runs: list[list[Record]]

    @property
    def style(self) -> dict[str, Any]:
        """Colour and line."""
        table = next((end for end in LINES if end and self.name.endswith(end)), "")
        return {"color": COLOURS[self.name.removesuffix(table)], "linestyle": LINES[table]}

    def line(
        self, x: str, value: Callable[[Record], float | None]
    ) -> tuple[list[float], list[list[float]]]:
        """The places where all runs have a value, and the values there."""
        found: dict[float, list[float]] = {}
        for records in self.runs:
            for record in records:
                if (y := value(record)) is not None:
                    found.setdefault(record[x], []).append(y)
        places = [place for place, ys in sorted(found.items()) if len(ys) == len(self.runs)]
        return places, [found[place] for place in places]


def draw_all(plan: Plan) -> list[str]:
    """Draw all figures of the finished runs into the ladder's folder; returns their names."""
    rows = [Row(name, _records(runs)) for name, runs in plan.runs.items()]
    rows = [row for row in rows if row.runs]
    drawn = []
    for name, draw in DRAWN.items():
        panels = 2 if draw is _gradients else 1
        if not rows or (figure := plots.figure(7.5, 4.5 if panels == 1 else 7)) is None:
            break
        axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
        draw(axes, rows)
        for one in axes:
            plots.tidy(one)
        figure.suptitle(_of(plan))
        figure.savefig(plan.folder / f"{name}.png")
        drawn.append(f"{name}.png")
    return drawn


def _of(plan: Plan) -> str:
    name, seeds = next(iter(plan.runs.values()))[0].data_name, plan.wanted.seeds
    return f"{name}, one seed" if seeds == 1 else f"{name}, mean of {seeds} seeds"


def _records(runs: list[Options]) -> list[list[Record]]:
    folders = [RunFolder(options.out) for options in runs]
    return [folder.read_metrics() for folder in folders if folder.result.exists()]


def _accuracy(axes: Any, rows: list[Row]) -> None:
    ax = axes[0]
    for row in rows:
        places, values = row.line("step", lambda r: _percent(r.get("test_accuracy")))
        _draw(ax, row, places, values, spread=True)
    plots.log_steps(ax, "optimizer steps (of mini-batches for sgd, of all samples for the rest)")
    ax.set(ylabel="test samples classified right (%)", title="Test accuracy (bands: all seeds)")
    _legend(ax)


def _gradients(axes: Any, rows: list[Row]) -> None:
    norm, clip = axes
    for row in rows:
        _draw(norm, row, *row.line("pass", lambda r: r["gradient_norm"]))
        _draw(clip, row, *row.line("pass", lambda r: r["clip"]))
    norm.set(
        ylabel="Euclidean norm, before clipping",
        title="Gradient norm (of sgd: the last mini-batch's)",
    )
    plots.log_scale(norm)
    clip.set(ylabel="factor (1: not clipped)", title="Clip coefficient", ylim=(0, 1.05))
    plots.log_steps(clip, "passes over the training set (steps, or epochs of sgd)")
    _legend(norm)


def _chunks(axes: Any, rows: list[Row]) -> None:
    ax = axes[0]
    for row in rows:
        places, values = row.line("pass", lambda r: _root(r.get("mean_squared_chunk_norm")))
        _draw(ax, row, places, values)
    ax.set(
        ylabel="root mean square of the norms",
        title="Gradient norms of chunks (of sgd: mini-batches)",
    )
    plots.log_scale(ax)
    plots.log_steps(ax, "passes over the training set (steps, or epochs of sgd)")
    _legend(ax)


def _loss(axes: Any, rows: list[Row]) -> None:
    ax = axes[0]
    for row in rows:
        _draw(ax, row, *row.line("pass", lambda r: r["loss"]))
    ax.set(ylabel="mean cross-entropy (nats)", title="Training loss")
    plots.log_scale(ax)
    plots.log_steps(ax, "passes over the training set (steps, or epochs of sgd)")
    _legend(ax)


DRAWN = {"accuracy": _accuracy, "gradients": _gradients, "chunks": _chunks, "loss": _loss}


def _draw(
    ax: Any, row: Row, places: list[float], values: list[list[float]], spread: bool = False
) -> None:
    """The mean over the seeds; with `spread` the band from the least to the largest."""
    if not places:
        return
    ax.plot(places, list(map(statistics.mean, values)), label=row.name, linewidth=1.5, **row.style)
    if spread and len(row.runs) > 1:
        low, high = list(map(min, values)), list(map(max, values))
        ax.fill_between(places, low, high, color=row.style["color"], alpha=0.15, linewidth=0)


def _legend(ax: Any) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)
