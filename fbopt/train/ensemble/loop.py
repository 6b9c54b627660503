"""The loop over the steps of many runs at once: what loop.py does for one, for each of them.

for step in …:  one step of all;  for each run: log, evaluate, move the learning rate;  save.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fbopt.train.checkpoint.resume import Start
from fbopt.train.checkpoint.run_dir import RunFolder, accuracies
from fbopt.train.checkpoint.saver import Saver
from fbopt.train.curvature import CurvatureTracker
from fbopt.train.ensemble.ensemble import Ensemble
from fbopt.train.ensemble.gradient import StackedGradient
from fbopt.train.ensemble.member import Member
from fbopt.train.loop import (
    Result,
    Write,
    metrics_writer,
    open_folder,
    record_if_due,
    write_summary,
)
from fbopt.train.losses import build_sample_losses
from fbopt.train.output import nobody_reads
from fbopt.train.reporting.describe import describe
from fbopt.train.reporting.progress import Progress
from fbopt.train.signals import Interrupted, SignalHandler
from fbopt.train.trainer import Diverged

SHOWN = ("loss", "train_accuracy", "gradient_norm", "lr")
Record = dict[str, Any]


class Run:
    """One of the runs: its member, where it begins, and its folder and records.

    Attributes:
        summary: of a run that is finished.
        error: of a run that has diverged.
    """

    def __init__(self, member: Member, start: Start, facts: Record, lock: ExitStack) -> None:
        self.member, self.folder = member, start.folder
        self.summary: Record | None = None
        self.error: Diverged | None = None
        self._start, self._facts, self._lock = start, facts, lock
        self._tracker = CurvatureTracker(member, (start.state or {}).get("curvature"))
        self._write: Write | None = None
        self._saver: Saver | None = None

    def open(self, logs: ExitStack) -> str:
        """Prepare the folder; return where the run begins, in words."""
        member, start = self.member, self._start
        where = open_folder(member, start, self._facts, self._lock)
        extra = {"data": self._facts["data"], "environment": self._facts}
        saved = None if start.state is None else member.step
        self._saver = Saver(member, self.folder, lambda: extra | self._tracker.saved(), saved)
        self._write = logs.enter_context(metrics_writer(member.options, self.folder, ()))
        return where

    def log(self, seconds: float) -> Record | None:
        """Write a line of metrics where it is due, and move the learning rate."""
        self.member.seconds += seconds
        record = None
        with self._noting_divergence():
            record = record_if_due(self.member, self._tracker)
            if record is not None:
                self._write(record)
            self.member.scheduler.step()
        return record

    def save(self, always: bool) -> None:
        """Write a checkpoint or fingerprint where it is due, or `always`."""
        with self._noting_divergence():
            if self.error is None:
                self._saver.write("checkpoint" if always else self._saver.due())

    @contextmanager
    def _noting_divergence(self) -> Iterator[None]:
        """Note and print that the run has diverged, if it has."""
        try:
            yield
        except Diverged as error:
            self.error = error
            print(f"{self.folder.path}: {error}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Write and print the summary."""
        self.member.release()
        self.summary, _ = write_summary(self.member, self.folder)
        print(f"{self.folder.path}/: {accuracies(self.summary, losses=True)}", flush=True)

    def outcome(self) -> Result | Diverged:
        """The result, or the error."""
        if self.error is not None:
            return self.error
        return Result(self.member.options, self.folder, self.summary, self.member.model)


class Folders:
    """The folders of all runs, for the message of an interruption."""

    resume_command = "the same command and --resume auto"

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def checkpoints(self) -> list[Any]:
        """Those of the first run."""
        return self._runs[0].folder.checkpoints()


def fit(runs: Sequence[Run]) -> None:
    """Take the remaining steps of runs that are at the same step, and finish them.

    One that diverges is left behind. Raises Interrupted after a signal, with all of them saved.
    """
    first = runs[0].member
    folders: RunFolder | Folders = Folders(runs)
    with SignalHandler(folders) as signals, ExitStack() as logs:
        where = [run.open(logs) for run in runs]
        more = f"\nand {len(runs) - 1} more, trained at once" if len(runs) > 1 else ""
        print(f"{describe(first)}\n{where[0]}{more}", flush=True)
        model = copy.deepcopy(first.model)
        losses = build_sample_losses(first.options)
        gradient = StackedGradient(model, losses, first.options.compile)
        progress = Progress(first.options.passes, first.position[0], first.chunks.samples)
        try:
            left = _take_steps(list(runs), gradient, signals, progress)
        finally:
            progress.close()
    for run in left:
        run.finish()


def _take_steps(
    runs: list[Run], gradient: StackedGradient, signals: SignalHandler, progress: Progress
) -> list[Run]:
    """Take all steps; return the runs that have not diverged."""
    total, ensemble = runs[0].member.total_steps, _ensemble(runs, gradient)
    before = time.monotonic()
    while runs and runs[0].member.step < total:
        ensemble.take_step()
        before, seconds = time.monotonic(), time.monotonic() - before
        records = [run.log(seconds) for run in runs]
        if shown := [record for record in records if record is not None]:
            progress.report(_mean(shown))
        last = runs[0].member.step == total
        stop = not last and (signals.requested or nobody_reads())
        for run in runs:
            run.save(stop or last)
        if stop:
            what = f"saved at step {runs[0].member.step} of {total} ({len(runs)} runs)"
            raise Interrupted(what, signals.folder)
        if any(run.error for run in runs):
            runs = [run for run in runs if run.error is None]
            ensemble = _ensemble(runs, gradient) if runs else ensemble
    return runs


def _ensemble(runs: Sequence[Run], gradient: StackedGradient) -> Ensemble:
    return Ensemble([run.member for run in runs], gradient)


def _mean(records: Sequence[Record]) -> Record:
    """The last record of all networks: the means of what is shown."""
    names = [name for name in records[0] if name in SHOWN or name.endswith("accuracy")]
    means = {name: statistics.fmean(r[name] for r in records if name in r) for name in names}
    return records[0] | means
