"""The runs of a figure: their metrics, and the values of the options that they are coloured by and
drawn over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError
from fbopt.train.config.parser import nearest
from fbopt.train.config.reading import options_of
from fbopt.train.plot.options import ENTRIES, Plot
from fbopt.train.reporting.plots import Records, drawn


@dataclass(frozen=True)
class Run:
    """A run to draw.

    Attributes:
        path: its folder, as it was given.
        value: that of the option of --by; the folder without --by.
        records: the lines of its metrics.jsonl.
        place: the number of the option of --x; None if it is drawn over an entry.
    """

    path: Path
    value: Any
    records: Records
    place: float | None = None

    def points(self, x: str, key: str) -> tuple[list[float], list[float]]:
        """The places and values of a metric, as they are drawn, where it was logged; over an option
        the last of them.
        """
        place = self.place
        pairs = [
            (r.get(ENTRIES[x]) if place is None else place, drawn(r, key)) for r in self.records
        ]
        found = [pair for pair in pairs if None not in pair][0 if place is None else -1 :]
        return [place for place, _ in found], [value for _, value in found]


def read(options: Plot) -> list[Run]:
    """Read the runs, finished or not; what one of them lacks is said on stderr.

    Raises:
        OptionsError: no run in a folder, or a metric that no run has; says which there are.
    """
    runs = []
    for path in options.runs:
        run = _read(path, options)
        if run.records:
            runs.append(run)
        else:
            note(f"{path} has no metrics yet; it is left out")
    if not runs:
        raise OptionsError("no run has metrics yet; wait until one has logged its first pass")
    for key in options.metrics:
        _check_metric(runs, options.x, key)
    return runs


def note(message: str) -> None:
    """Say on stderr what a figure does not show."""
    print(f"fbopt plot: {message}", file=sys.stderr, flush=True)


def _read(path: Path, options: Plot) -> Run:
    if not path.exists():
        raise OptionsError(f"{path}: there is no such folder; give one that `fbopt train` made")
    folder = RunFolder(path)
    made = folder.read_options()
    if made is None:
        raise OptionsError(
            f"{path}: is no run's folder, as it has no readable options.json; give a folder that "
            "`fbopt train` made"
        )
    trained = options_of(made, str(folder.options))
    value: Any = path if options.over is None else None
    if options.option is not None:
        value = getattr(trained, options.option)
    place = None if options.over is None else getattr(trained, options.over)
    if place is None and options.over == "penalty":
        place = 0.0
    if options.over is not None and (isinstance(place, bool) or not isinstance(place, int | float)):
        raise OptionsError(
            f"--x {options.x}: is {place} in {path}, which is no number; draw over another option, "
            f"over {', '.join(ENTRIES)}, or leave the run out"
        )
    return Run(path, value, folder.read_metrics(), place)


def _check_metric(runs: Sequence[Run], x: str, key: str) -> None:
    """Raise OptionsError where no run has points of a metric; name the runs that have none or
    some that cannot be drawn.
    """
    counts = [len(run.points(x, key)[0]) for run in runs]
    if not any(counts):
        known = [k for run in runs for record in run.records for k in record if run.points(x, k)[0]]
        there = [name for name in dict.fromkeys(known) if name not in ENTRIES.values()]
        near = nearest(key, there)
        raise OptionsError(
            f"--y {key}: no run has values of it over --x {x}{near}; there are "
            f"{', '.join(there) or 'none of any metric'}"
        )
    for run, count in zip(runs, counts, strict=True):
        logged = sum(record.get(key) is not None for record in run.records)
        if not logged:
            note(f"{run.path} has no {key}; it is left out of that panel")
        elif count < logged and run.place is None:
            note(f"{run.path}: {logged - count} of {logged} values of {key} cannot be drawn: they "
                 f"are not finite, or have no {x}")  # fmt: skip
