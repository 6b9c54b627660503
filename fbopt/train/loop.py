"""The training loop, for full-batch gradient descent and for its stochastic baseline.

for step in …:  take a step;  after each pass: log, evaluate, move the learning rate;  save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fbopt.train import models
from fbopt.train.agreement import check_environment, check_options, check_state
from fbopt.train.begin import Loaded, broadcast_model, build_trainer, find
from fbopt.train.checkpoint.provenance import environment
from fbopt.train.checkpoint.resume import Start, restore
from fbopt.train.checkpoint.run_dir import RunFolder, accuracies
from fbopt.train.checkpoint.saver import Saver
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.curvature import CurvatureTracker
from fbopt.train.distributed import DistributedContext, distributed_context
from fbopt.train.output import nobody_reads
from fbopt.train.reporting.describe import describe
from fbopt.train.reporting.plots import draw_curves
from fbopt.train.reporting.progress import Progress
from fbopt.train.reporting.tensorboard import TensorBoard
from fbopt.train.signals import STOP, Interrupted, SignalHandler
from fbopt.train.trainer import Trainer

Write = Callable[[dict[str, Any]], None]
Callback = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class Result:
    """A finished run: its options, folder and summary, and the trained model."""

    options: Options
    folder: RunFolder
    summary: dict[str, Any]
    model: nn.Module


def train(options: Options, callbacks: Sequence[Callback] = ()) -> Result:
    """Train as `options` say, write the run folder, and return the result.

    Each of `callbacks` is called with every row that goes to metrics.jsonl, a dict of numbers,
    after it was written, on rank 0. A resumed run begins with the first row after its checkpoint.

    It trains in this process alone (`fbopt train` starts others, see launch.py). Under torchrun all
    processes train together, each on its share of the chunks. Rank 0 alone reads
    and writes the folder, and prints. An error is raised on the rank where it happened; the others
    raise PeerError.

    Raises:
        OptionsError, DataError: something cannot work; nothing was created.
        Interrupted: a signal came; the run is saved.
        Diverged: the loss is not finite.
        ProcessesDiffer: another process has other parameters than rank 0.
        WriteError: a full disk and the like; earlier checkpoints are whole.
    """
    with distributed_context(options.device, options.timeout) as context, ExitStack() as lock:
        check_options(context, options)
        start = context.from_rank_zero(lambda: find(options, lock))
        return train_from(start, context, lock, callbacks)


def train_from(
    start: Start,
    context: DistributedContext,
    lock: ExitStack,
    callbacks: Sequence[Callback] = (),
    *,
    loaded: Loaded | None = None,
    stop_by: Sequence[int] = STOP,
) -> Result:
    """Train as `train` does, from a start that was found, on data that may be `loaded` already.

    `lock` holds the lock of the run folder. The signals in `stop_by` let the run stop.
    """
    with context.raising_together():
        trainer, digest = build_trainer(start.options, context, loaded)
        facts = environment(trainer, digest)
        if start.state is not None:
            restore(trainer, start, facts)
    check_environment(context, facts)
    if start.state is None:
        broadcast_model(trainer, digest)
    summary = context.from_rank_zero(lambda: summary_if_finished(trainer, start.folder))
    if summary is None:
        context.from_rank_zero(lambda: _announce(trainer, start, facts, lock))
        saver = write = None
        tracker = CurvatureTracker(trainer, (start.state or {}).get("curvature"))
        with SignalHandler(start.folder, stop_by) as signals, ExitStack() as logs:
            if context.is_rank_zero:
                saved = None if start.state is None else trainer.step
                extra = {"data": digest, "environment": facts}
                saver = Saver(trainer, start.folder, lambda: extra | tracker.saved(), saved)
                write = logs.enter_context(metrics_writer(trainer.options, start.folder, callbacks))
            _fit(trainer, saver, signals, write, tracker)
        summary = context.from_rank_zero(lambda: _write_summary(trainer, start.folder))
    return Result(trainer.options, start.folder, summary, trainer.model)


@contextmanager
def metrics_writer(
    options: Options, folder: RunFolder, callbacks: Sequence[Callback]
) -> Iterator[Write]:
    """A function that writes a row of metrics to all who want it."""
    board = TensorBoard(folder) if options.log else None
    receivers = [*([board] if board else []), *callbacks]

    def write(row: dict[str, Any]) -> None:
        folder.append(folder.metrics, row)
        for receive in receivers:
            receive(dict(row))

    with closing(board) if board else nullcontext():
        yield write


def _announce(trainer: Trainer, start: Start, facts: dict[str, Any], lock: ExitStack) -> None:
    """Prepare the folder for the steps to come, and print what they are."""
    where = open_folder(trainer, start, facts, lock)
    print(f"{describe(trainer)}\n{where}", flush=True)


def open_folder(trainer: Trainer, start: Start, facts: dict[str, Any], lock: ExitStack) -> str:
    """Prepare the folder for the steps to come; return where they begin, in words."""
    folder = start.folder
    where = f"run folder: {folder.path}/"
    if start.state is None:
        options = trainer.options.as_json() | {"resume": None}
        folder.create(options, trainer.options.overwrite, lock)
    else:
        folder.forget_after(trainer.step)
        path = folder.path_of(trainer.step)
        where = f"resumed at step {trainer.step} of {trainer.total_steps}: {path}"
    folder.append(folder.environment, {"step": trainer.step} | facts)
    return where


def summary_if_finished(trainer: Trainer, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that needs no further step; None of any other."""
    if trainer.step < trainer.total_steps or not folder.result.exists():
        return None
    summary = folder.read_result()
    if not folder.curves.exists():  # killed between the two
        draw_curves(folder, trainer.options)
    print(f"{folder.path}/ is finished: {accuracies(summary)}", flush=True)
    return summary


def _fit(
    trainer: Trainer,
    saver: Saver | None,
    signals: SignalHandler,
    write: Write | None,
    tracker: CurvatureTracker,
) -> None:
    """Take the remaining steps; log, save now and then, and stop after a signal.

    Rank 0 has `saver` and `write`.
    """
    progress = Progress(trainer.options.passes, trainer.position[0], trainer.current_chunks.samples)
    trainer.on_samples = progress.advance
    begin, before = time.monotonic(), trainer.seconds
    try:
        while trainer.step < trainer.total_steps:
            trainer.take_step()
            trainer.seconds = before + time.monotonic() - begin
            if trainer.position[1] == 0:
                _log(trainer, write, progress, tracker)
                trainer.scheduler.step()
            last = trainer.step == trainer.total_steps
            requested = signals.requested or nobody_reads()
            due = "" if saver is None else saver.due()
            stop, compare = trainer.context.any(requested, bool(due))
            stop &= not last
            if compare or stop or last:
                check_state(trainer)
            if saver is not None:
                saver.write("checkpoint" if stop or last else due)
            if stop:
                what = f"saved at step {trainer.step} of {trainer.total_steps}"
                raise Interrupted(what, signals.folder)
    finally:
        progress.close()


def _log(
    trainer: Trainer, write: Write | None, progress: Progress, tracker: CurvatureTracker
) -> None:
    """Write one line of metrics after a pass, where it is due, and show it."""
    record = record_if_due(trainer, tracker, measures=write is not None)
    if record is not None:
        progress.report(record)
        if write is not None:
            write(record)


def record_if_due(
    trainer: Trainer, tracker: CurvatureTracker, measures: bool = True
) -> dict[str, Any] | None:
    """The metrics after a pass, with evaluations and, if asked for, measures where these are due;
    None where nothing is. Raises Diverged.
    """
    options, done = trainer.options, trainer.position[0]
    last = trainer.step == trainer.total_steps
    due = last or done % options.eval_every == 0
    track = tracker.is_due(done)
    if not (due or track or done == 1 or done % options.log_every == 0):
        return None
    record = trainer.record(options.evaluated(last) if due else ())
    if track and measures:
        record |= tracker.measure()
    return record


def _write_summary(trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """Write and print the summary of the run that has just ended, and draw its curves."""
    summary, drawn = write_summary(trainer, folder)
    print(
        f"{accuracies(summary, losses=True)}, train {summary['train_accuracy']:.2%} "
        f"(loss {summary['loss']:.4f}) after {trainer.step} steps, {summary['seconds']:.0f} s\n"
        f"written: {folder.path}/ (options.json, metrics.jsonl, "
        f"{'curves.png, ' if drawn else ''}checkpoint-{trainer.step}.pt, result.json)",
        flush=True,
    )
    return summary


def write_summary(trainer: Trainer, folder: RunFolder) -> tuple[dict[str, Any], bool]:
    """Write the summary of a run that has ended and draw its curves; return it, and whether there
    are curves.
    """
    last = [record for record in folder.read_metrics() if record["step"] == trainer.step]
    if not last:
        raise OptionsError(
            f"{folder.metrics} has no line for the last step; put it back and resume, or start "
            "again with --overwrite"
        )
    summary = {
        **last[-1],
        "parameters": models.count_parameters(trainer.model),
        "device": str(trainer.device),
        "torch": torch.__version__,
    }
    folder.write_result(summary)
    return summary, draw_curves(folder, trainer.options)
