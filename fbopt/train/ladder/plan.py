"""`fbopt ladder`: train every row of the ladder with several seeds, then write a table and figures.

Rows that are done are not trained again, interrupted ones go on. All files lie in one folder:
ROW-sSEED/ (the runs), logs/, ladder.md, ladder.json and four figures.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError, RecipeName, flag
from fbopt.train.torchrun import is_rank_zero, only_rank_zero_prints, rank_and_world_size

RUN_BYTES = 1.5e9  # of a small run, most of it torch
OWN = ("recipe", "seed", "out", "resume", "overwrite", "chunk_norms")  # set for every run


@dataclass(frozen=True)
class Ladder:
    """Train every row with seeds 0 … seeds − 1, then write a table and figures.

    The options of `fbopt train` may be given too, for all rows alike (see its --help), but for
    those that the ladder sets itself, such as --recipe and --seed.
    """

    data: str = "mnist1d"
    """Data set, as for `fbopt train`."""
    rows: tuple[RecipeName, ...] = ("sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong")
    """Recipes to train, the rows of the table; `fbopt recipes` lists them."""
    seeds: int = 3
    """Runs per row."""
    share: float = 1.0
    """Share of its recipe's epochs or steps that each row takes; its schedule shrinks with it."""
    jobs: int | None = None
    """Runs at the same time. Default: as many as there are cores for, and memory; 1 on CUDA."""
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
    def everything(self) -> list[Options]:
        """All runs, those that take the longest first."""
        runs = [options for row in self.runs.values() for options in row]
        return sorted(runs, key=_work, reverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt ladder …`; returns 0, 1 (a run failed), 2 (bad input) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with only_rank_zero_prints(errors=True):
        wanted, common = parse(arguments)
    if rank_and_world_size()[1] > 1:
        if is_rank_zero():
            _say("starts its own processes; start it without torchrun, or `fbopt train` with it")
        return 2
    from fbopt.train.ladder.runner import Stopped, run_all
    from fbopt.train.ladder.summary import write

    try:
        plan = make_plan(wanted, common, shlex.join(["fbopt", "ladder", *arguments]))
        failed = run_all(plan)
        print(write(plan))
    except (OptionsError, DataError) as error:
        _say(str(error))
        return 2
    except OSError as error:
        _say(f"{error}; see to the disk, then give the same command again")
        return 1
    except Stopped as stop:
        print(stop, flush=True)
        return 130
    return 1 if failed else 0


def parse(arguments: Sequence[str]) -> tuple[Ladder, Options]:
    """The ladder that a command line asks for, and the options that hold for all its runs."""
    import tyro

    words = {"prog": "fbopt ladder", "args": arguments}
    wanted, rest = tyro.cli(Ladder, **words, return_unknown_args=True)
    return wanted, tyro.cli(Options, prog="fbopt ladder", args=["--data", wanted.data, *rest])


def make_plan(wanted: Ladder, common: Options, command: str = "fbopt ladder") -> Plan:
    """What to run. Raises OptionsError for anything that cannot work, before anything is run."""
    from fbopt.train.config.resolve import resolve

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
    runs = {
        row: [_options(wanted, common, row, seed, folder) for seed in range(wanted.seeds)]
        for row in wanted.rows
    }
    jobs = wanted.jobs or _jobs([resolve(row[0]) for row in runs.values()])
    runs = {row: [_shared(o, jobs) for o in options] for row, options in runs.items()}
    for options in runs.values():
        for one in options:
            _check_earlier(one)
    return Plan(wanted, folder, runs, jobs, command)


def _options(wanted: Ladder, common: Options, row: str, seed: int, folder: Path) -> Options:
    out = folder / f"{row}-s{seed}"
    options = replace(common, recipe=row, seed=seed, out=out, resume="auto", chunk_norms=True)
    if wanted.share == 1:
        return options
    from fbopt.train.config.resolve import resolve

    name = "epochs" if options.stochastic else "steps"
    passes = max(1, round(wanted.share * resolve(options).passes))
    return replace(options, **{name: passes})


def _jobs(rows: list[Options]) -> int:
    """As many runs at once as there are cores for, each with its threads."""
    from fbopt._build import jobs
    from fbopt.train.config.resolve import device_type

    threads = [row.threads or jobs.cores() for row in rows]
    if any(device_type(row.device) == "cuda" for row in rows):
        return 1
    return max(1, min(jobs.cores() // max(threads), int(jobs.memory() / RUN_BYTES)))


def _shared(options: Options, jobs: int) -> Options:
    """The same run with its share of the cores, unless its threads are given."""
    from fbopt._build import jobs
    from fbopt.train.config.resolve import resolve

    if jobs == 1 or resolve(options).threads is not None:
        return options
    return replace(options, threads=max(1, jobs.cores() // jobs))


def _check_earlier(options: Options) -> None:
    """Refuse a run that is there already and was made with other options."""
    from fbopt.train.checkpoint.run_dir import RunFolder
    from fbopt.train.config.diff import check_options
    from fbopt.train.config.resolve import resolve

    if (made := RunFolder(options.out).read_options()) is not None:
        check_options(f"the run in {options.out}", made, resolve(options))


def _work(options: Options) -> int:
    """How long a run takes, by what each pass visits and how often."""
    from fbopt.train.config.resolve import resolve
    from fbopt.train.trainer import GRADIENTS

    options = resolve(options)
    replicas = 1 if options.stochastic else options.replicas or 1
    return options.passes * GRADIENTS[options.method] * replicas


def _say(message: str) -> None:
    print(f"fbopt ladder: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
