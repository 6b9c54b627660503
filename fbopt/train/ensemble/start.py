"""Train many runs at once: find where each begins, then go on with all of them together.

results = train_many([replace(options, seed=s, out=f"runs/s{s}") for s in range(32)])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from fbopt.train.begin import find, place, read
from fbopt.train.checkpoint.provenance import environment
from fbopt.train.checkpoint.resume import Start, restore
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import check
from fbopt.train.ensemble import kind
from fbopt.train.ensemble.loop import Run, fit
from fbopt.train.ensemble.member import Member
from fbopt.train.loop import Result, summary_if_finished
from fbopt.train.trainer import Diverged


def train_many(options: Sequence[Options]) -> list[Result | Diverged]:
    """Train networks of one architecture at once, each into a run folder as if trained alone.

    They may differ in seeds, learning rates and other numbers of the update, schedules and
    penalties; what they have to share, and what cannot be trained at once, is refused. Initial
    weights, schedule, order of the data and the kind of records are those of a run alone with
    ``accumulation="float32"``, which is the default here; the numbers are the same to rounding.
    The ``seconds`` of a record are those that all networks took together. Without ``threads`` torch
    chooses their number.

    With ``resume="auto"`` finished runs are left as they are, and others go on from their
    checkpoints.

    Args:
        options: those of every run, with folders of their own; at least one.

    Returns:
        The results in the same order; in place of a run that diverged the error, while the others
        went on.

    Raises:
        OptionsError, DataError: something cannot work; nothing was created.
        Interrupted: a signal came; all runs are saved.
        WriteError: a full disk and the like; earlier checkpoints are whole.
    """
    opened = [kind.opened(one) for one in options]
    for one in opened:
        check(one)
    with ExitStack() as lock:
        starts = [_found(one, lock) for one in opened]
        for start in starts:
            kind.check_each(start.options)
        kind.check_together([start.options for start in starts])
        runs = _runs(starts, lock)
        for step in sorted({run.member.step for run in runs if run.summary is None}):
            fit([run for run in runs if run.summary is None and run.member.step == step])
    return [run.outcome() for run in runs]


def start_many(options: Sequence[Options]) -> int:
    """Train runs at once, print what diverged, and return the exit status: 1 if one did."""
    failed = [found for found in train_many(options) if isinstance(found, Diverged)]
    if failed:
        words = f"{len(failed)} of {len(options)} runs diverged, see above; the others are finished"
        print(f"fbopt train: {words}", file=sys.stderr, flush=True)
    return int(bool(failed))


def _found(options: Options, lock: ExitStack) -> Start:
    """Where a run begins. Of one network one thread is enough, of many torch's own choice."""
    start = find(options, lock)
    return start._replace(options=replace(start.options, threads=options.threads))


def _runs(starts: Sequence[Start], lock: ExitStack) -> list[Run]:
    """The runs with their members; nothing is written."""
    data, digest, device = place(starts[0].options, loaded=read(starts[0].options))
    runs = []
    for start in starts:
        member = Member(start.options, data, device)
        if not runs:
            kind.check_model(member.model, data.shape, len(starts), start.options, device)
        facts = environment(member, digest) | {"kernels": "stacked"}
        if start.state is not None:
            restore(member, start, facts)
        runs.append(Run(member, start, facts, lock))
    for run in runs:
        run.summary = summary_if_finished(run.member, run.folder)
    return runs
