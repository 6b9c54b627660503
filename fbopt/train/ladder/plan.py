"""The runs of a ladder: every row with every seed, and how many of them at a time.

All files lie in one folder: ROW-sSEED/ (the runs), logs/, ladder.md, ladder.json and four figures.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

from fbopt.train.config.options import Options, OptionsError, RecipeName, flag
from fbopt.train.config.resolve import device_type, resolve

RUN_BYTES = 1.5e9  # of a small run, most of it torch
OWN = ("recipe", "seed", "resume", "overwrite", "chunk_norms")  # set for every run


@dataclass(frozen=True)
class Ladder:
    """Train every row with seeds 0 … seeds − 1, then write a table and figures.

    Finished runs are not trained again and interrupted ones continue, so that rows and seeds can be
    added later.
    """

    data: str = "mnist1d"
    """Data set, as for `fbopt train`."""
    rows: tuple[RecipeName, ...] = ("sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong")
    """Recipes to train, the rows of the table; `fbopt recipes` lists their hyperparameters."""
    seeds: int = 3
    """Runs per row."""
    share: float = 1.0
    """Fraction of its recipe's epochs or steps that each row takes; its schedule scales with it."""
    jobs: int | None = None
    """Runs at the same time. Default: as many as cores and memory allow; 1 on CUDA."""
    out: Path | None = None
    """Folder to write. Default: runs/ladder-DATA."""


@dataclass(frozen=True)
class Plan:
    """A ladder to run: what was asked for, the options of all runs, and how many run at once."""

    wanted: Ladder
    folder: Path
    runs: dict[str, list[Options]]  # by row, one for each seed
    jobs: int
    command: str

    @property
    def longest_first(self) -> list[Options]:
        """All runs, in the order of their work."""
        return sorted(itertools.chain(*self.runs.values()), key=_work, reverse=True)


def make_plan(wanted: Ladder, common: Options, command: str = "fbopt ladder") -> Plan:
    """Plan the runs, with `common` for all of them; raises OptionsError for bad options."""
    for name in OWN:
        if getattr(common, name) != getattr(Options, name):
            raise OptionsError(f"{flag(name)} is set by the ladder for every run; leave it out")
    for name in ("seeds", "jobs"):
        if (value := getattr(wanted, name)) is not None and value < 1:
            raise OptionsError(f"--{name} {value}: has to be at least 1")
    if not 0 < wanted.share <= 100:
        raise OptionsError(f"--share {wanted.share}: has to be above 0, and at most 100")
    if not wanted.rows or len(set(wanted.rows)) < len(wanted.rows):
        raise OptionsError("--rows: name at least one recipe, and each of them once")
    folder = wanted.out or Path("runs") / f"ladder-{common.data_name}"
    rows = {row: _row(replace(common, recipe=row), wanted.share) for row in wanted.rows}
    jobs = wanted.jobs or _jobs([resolve(options) for options in rows.values()])
    runs = {
        row: [replace(o, seed=s, out=folder / f"{row}-s{s}") for s in range(wanted.seeds)]
        for row, o in ((row, _with_threads(o, jobs)) for row, o in rows.items())
    }
    return Plan(wanted, folder, runs, jobs, command)


def _row(options: Options, share: float) -> Options:
    """The options of a row's runs."""
    options, passes = replace(options, resume="auto", chunk_norms=True), resolve(options).passes
    name = "epochs" if options.stochastic else "steps"
    return options if share == 1 else replace(options, **{name: max(1, round(share * passes))})


def _jobs(rows: list[Options]) -> int:
    """As many runs at once as cores (each run on its threads) and memory allow."""
    if any(device_type(row.device) == "cuda" for row in rows):
        return 1
    threads = max(row.threads or cores() for row in rows)
    return max(1, min(cores() // threads, int(memory() / RUN_BYTES)))


def _with_threads(options: Options, jobs: int) -> Options:
    """Give a run its share of the cores, unless its number of threads is set already."""
    if jobs == 1 or resolve(options).threads is not None:
        return options
    return replace(options, threads=max(1, cores() // jobs))


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _work(options: Options) -> int:
    """Forward and backward passes per sample."""
    options = resolve(options)
    replicas = 1 if options.stochastic else options.replicas or 1
    return options.passes * (2 if options.penalty else 1) * replicas
