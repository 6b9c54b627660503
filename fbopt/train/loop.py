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

from fbopt.train import models, precision
from fbopt.train.checkpoint.provenance import environment
from fbopt.train.checkpoint.resume import Start, find_start, restore
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.checkpoint.saver import Saver
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.curvature import CurvatureTracker
from fbopt.train.data.load import load
from fbopt.train.distributed import DistributedContext, distributed_context, select_device
from fbopt.train.reporting.describe import describe
from fbopt.train.reporting.plots import draw_curves
from fbopt.train.reporting.progress import Progress
from fbopt.train.reporting.tensorboard import TensorBoard, check_installed
from fbopt.train.signals import Interrupted, SignalHandler
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

    Under torchrun all processes train together, each on its share of the chunks. Rank 0 alone reads
    and writes the folder, and prints. An error is raised on the rank where it happened; the others
    raise PeerError.

    Raises:
        OptionsError, DataError: something cannot work; nothing was created.
        Interrupted: a signal came; the run is saved.
        Diverged: the loss is not finite.
        WriteError: a full disk and the like; earlier checkpoints are whole.
    """
    with distributed_context() as context, ExitStack() as lock:
        return _train(options, callbacks, context, lock)


def _train(
    options: Options, callbacks: Sequence[Callback], context: DistributedContext, lock: ExitStack
) -> Result:
    start = context.from_rank_zero(lambda: _find_start(options, lock))
    with context.raising_together():
        trainer, digest = _build(start.options, context)
        facts = environment(trainer, digest)
        if start.state is not None:
            restore(trainer, start, facts)
    if start.state is None:
        _broadcast_model(trainer, digest)
    summary = context.from_rank_zero(lambda: _summary_if_finished(trainer, start.folder))
    if summary is None:
        context.from_rank_zero(lambda: _open_folder(trainer, start, facts, lock))
        saver = write = None
        with SignalHandler(start.folder) as signals, ExitStack() as logs:
            if context.is_rank_zero:
                saved = None if start.state is None else trainer.step
                extra = {"data": digest, "environment": facts}
                saver = Saver(trainer, start.folder, extra, saved)
                write = logs.enter_context(_logging(trainer.options, start.folder, callbacks))
            _fit(trainer, saver, signals, write)
        summary = context.from_rank_zero(lambda: _write_summary(trainer, start.folder))
    return Result(trainer.options, start.folder, summary, trainer.model)


def _find_start(options: Options, lock: ExitStack) -> Start:
    start = find_start(options, lock)
    if start.options.log:
        check_installed()
    return start


@contextmanager
def _logging(options: Options, folder: RunFolder, callbacks: Sequence[Callback]) -> Iterator[Write]:
    """A function that writes a row of metrics to all who want it."""
    board = TensorBoard(folder) if options.log else None
    receivers = [*([board] if board else []), *callbacks]

    def write(row: dict[str, Any]) -> None:
        folder.append(folder.metrics, row)
        for receive in receivers:
            receive(dict(row))

    with closing(board) if board else nullcontext():
        yield write


def _build(options: Options, context: DistributedContext) -> tuple[Trainer, str]:
    """The trainer, and the SHA-256 of its data."""
    if not context.is_single and (options.stochastic or options.switch_at):
        what = "--recipe sgd runs" if options.stochastic else "--switch-at's mini-batches are taken"
        raise OptionsError(
            f"{what} in one process, not in {context.world_size}, which would change its "
            "mini-batches; start it without torchrun, or choose a full-batch recipe"
        )
    device = select_device(options.device, context.world_size)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load(
        options.data, options.image_size, options.data_dir, options.download, options.samples
    )
    precision.set_float32_precision(options.precision, device)
    on_device = data.to(device, options.channels_last)
    return Trainer(options, on_device, device, context), data.sha256()


def _broadcast_model(trainer: Trainer, digest: str) -> None:
    """Give every rank the initial weights of rank 0; refuse other data than rank 0 has."""
    context = trainer.context
    if context.is_single:
        return
    model = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
    theirs, state = context.from_rank_zero(lambda: (digest, model))
    with context.raising_together():
        if theirs != digest:
            raise DataError(
                f"--data {trainer.options.data}: process {context.rank} has other samples or "
                f"labels than process 0 (SHA-256 {digest[:12]}…, not {theirs[:12]}…); give all the "
                "same"
            )
        trainer.model.load_state_dict(state)


def _open_folder(trainer: Trainer, start: Start, facts: dict[str, Any], lock: ExitStack) -> None:
    """Prepare the folder for the steps to come, and print what they are."""
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
    print(f"{describe(trainer)}\n{where}", flush=True)


def _summary_if_finished(trainer: Trainer, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that needs no further step; None of any other."""
    if trainer.step < trainer.total_steps or not folder.result.exists():
        return None
    summary = folder.read_result()
    print(f"{folder.path}/ is finished: test accuracy {summary['test_accuracy']:.2%}", flush=True)
    return summary


def _fit(
    trainer: Trainer, saver: Saver | None, signals: SignalHandler, write: Write | None
) -> None:
    """Take the remaining steps; log, save now and then, and stop after a signal.

    Rank 0 has `saver` and `write`.
    """
    progress = Progress(
        trainer.options.passes, trainer.position[0], len(trainer.current_chunks.split)
    )
    trainer.on_samples, tracker = progress.advance, CurvatureTracker(trainer)
    begin, before = time.monotonic(), trainer.seconds
    try:
        while trainer.step < trainer.total_steps:
            trainer.take_step()
            trainer.seconds = before + time.monotonic() - begin
            if trainer.position[1] == 0:
                _log(trainer, write, progress, tracker)
                trainer.scheduler.step()
            last = trainer.step == trainer.total_steps
            stop = trainer.context.any(signals.requested) and not last
            if saver is not None:
                saver.after_step(at_once=stop or last)
            if stop:
                what = f"saved at step {trainer.step} of {trainer.total_steps}"
                raise Interrupted(what, signals.folder)
    finally:
        progress.close()


def _log(
    trainer: Trainer, write: Write | None, progress: Progress, tracker: CurvatureTracker
) -> None:
    """Evaluate, measure and write one line of metrics after a pass, where they are due."""
    options, done = trainer.options, trainer.position[0]
    test = done % options.eval_every == 0 or trainer.step == trainer.total_steps
    track = tracker.is_due(done)
    if test or track or done == 1 or done % options.log_every == 0:
        record = trainer.record(with_test=test)
        if track and write is not None:
            record |= tracker.measure()
        progress.report(record)
        if write is not None:
            write(record)


def _write_summary(trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """Write and print the summary of the run that has just ended, and draw its curves."""
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
    drawn = draw_curves(folder, trainer.options)
    print(
        f"test accuracy {summary['test_accuracy']:.2%} (loss {summary['test_loss']:.4f}), train "
        f"{summary['train_accuracy']:.2%} (loss {summary['loss']:.4f}) after {trainer.step} steps, "
        f"{summary['seconds']:.0f} s\nwritten: {folder.path}/ (options.json, metrics.jsonl, "
        f"{'curves.png, ' if drawn else ''}checkpoint-{trainer.step}.pt, result.json)",
        flush=True,
    )
    return summary
