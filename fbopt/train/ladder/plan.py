"""The runs of a ladder: every row with every seed, and how many of them at a time.

All files lie in one folder: ROW-sSEED/ (the runs), logs/, ladder.md, ladder.json and the figures.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fbopt._build.compiler import cores
from fbopt.train.config.options import Options, OptionsError, RecipeName, flag
from fbopt.train.config.resolve import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    check_bounds,
    device_type,
    resolve,
)
from fbopt.train.ladder import tuned

MOST_SEEDS = 100_001
RUN_BYTES = 1_500_000_000  # of a small run, most of it torch
# Options that only the rows of one kind have, left out for those of the other.
OF_CHUNKS = (
    "steps", "accumulation", "vectorize", "mean", "full_penalty", "chunk_max_norm", "scope",
)  # fmt: skip
OF_EPOCHS = ("epochs",)
# Set for every run.
OWN = ("recipe", "seed", "processes", "resume", "overwrite", "chunk_norms")


@dataclass(frozen=True)
class Ladder:
    """Train every row with several seeds, then write a table and figures.

    Finished runs are not trained again and interrupted ones continue, so that rows and seeds can be
    added later.
    """

    data: str = "mnist1d"
    """Data set, as for `fbopt train`."""
    rows: tuple[RecipeName, ...] = ("sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong")
    """Recipes to train, the rows of the table; `fbopt recipes` lists their hyperparameters."""
    seeds: int = 3
    """Runs per row."""
    first_seed: int = 0
    """Seed of the first of them; the others count on from it."""
    share: float = 1.0
    """Fraction of its recipe's epochs or steps that each row takes; its schedule scales with it.
    --epochs sets those of sgd's rows, --steps those of the others."""
    jobs: int | None = None
    """Runs at the same time. Default: as many as cores and memory allow; 1 on CUDA."""
    tuned: Path | None = None
    """File with hyperparameters for every row, chosen on held-out samples: the tuned.json of
    examples/tune.py. Default: the recipes' own."""
    out: Path | None = None
    """Folder to write. Default: runs/ladder-DATA."""
    minutes: float | None = None
    """Time after which no run is started and running ones stop as after Ctrl-C: each finishes the
    step that it is in, which takes its time beyond these minutes, and saves. Then the table is
    written, and the exit status is 130; the same command goes on. Default: no limit."""


@dataclass(frozen=True)
class Plan:
    """A ladder to run: its folder, the options of all runs, and how many run at once."""

    folder: Path
    runs: dict[str, list[Options]]  # by row, one for each seed
    jobs: int
    command: str
    tuned: dict[str, tuned.Tuned] = field(default_factory=dict)  # by row
    deadline: float = math.inf  # by time.monotonic()
    grace: float = math.inf  # seconds after it until runs that have not saved are ended

    @property
    def last_row_first(self) -> list[Options]:
        """All runs in their order: the rows at the end of a ladder take longest."""
        return [options for row in reversed(self.runs.values()) for options in row]


def make_plan(wanted: Ladder, common: Options, command: str = "fbopt ladder") -> Plan:
    """Plan the runs, with `common` for all of them; raises OptionsError for bad options."""
    deadline = math.inf if wanted.minutes is None else time.monotonic() + 60 * wanted.minutes
    _check(wanted, common)
    folder = wanted.out or Path("runs") / f"ladder-{common.data_name}"
    rows = {row: replace(common, recipe=row) for row in wanted.rows}
    seeds = range(wanted.first_seed, wanted.first_seed + wanted.seeds)
    chosen = {} if wanted.tuned is None else tuned.read(wanted.tuned, wanted.rows)
    for row, found in chosen.items():
        rows[row] = found.apply(rows[row], seeds)
    rows = {row: _row(options, wanted.share) for row, options in rows.items()}
    jobs = wanted.jobs or _jobs(list(rows.values()))
    if jobs > 1:  # alone: torch's own choice, and processes as they pay
        share = max(1, cores() // jobs)
        rows = {row: replace(o, threads=o.threads or share, processes=1) for row, o in rows.items()}
    runs = {
        row: [replace(o, seed=s, out=folder / f"{row}-s{s}") for s in seeds]
        for row, o in rows.items()
    }
    return Plan(folder, runs, jobs, command, chosen, deadline)


def _check(wanted: Ladder, common: Options) -> None:
    """Raise OptionsError for values that cannot work, and for options that the ladder sets."""
    for name in OWN:
        if getattr(common, name) != getattr(Options, name):
            raise OptionsError(f"{flag(name)} is set by the ladder for every run; leave it out")
    check_bounds(wanted, {"seeds": (1, True, MOST_SEEDS), "jobs": AT_LEAST_1})
    check_bounds(wanted, dict.fromkeys(("share", "minutes"), ABOVE_0) | {"first_seed": AT_LEAST_0})
    if common.test == "never":
        raise OptionsError("--test never: the table is of the test set; leave it out")
    if not wanted.rows or len(set(wanted.rows)) < len(wanted.rows):
        raise OptionsError("--rows: name at least one recipe, and each of them once")


def _row(options: Options, share: float) -> Options:
    """The options of a row's runs, with the recipe's threads."""
    options = replace(options, **dict.fromkeys(OF_CHUNKS if options.stochastic else OF_EPOCHS))
    recipe, length = resolve(options), "epochs" if options.stochastic else "steps"
    passes = getattr(options, length) or max(1, round(share * recipe.passes))
    own = {length: passes, "threads": recipe.threads}
    return replace(options, resume="auto", chunk_norms=True, **own)


def _jobs(rows: list[Options]) -> int:
    """As many runs at once as cores (each run on its threads) and memory allow."""
    if any(device_type(row.device) == "cuda" for row in rows):
        return 1
    threads = max(row.threads or cores() for row in rows)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores() // threads, memory // RUN_BYTES))
