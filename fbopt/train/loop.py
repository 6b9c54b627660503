"""Train: one loop for full-batch gradient descent and for its stochastic baseline.

for step in …:  take a step;  after each pass: log, evaluate, move the learning rate;  save.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fbopt.train import models, precision
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.provenance import facts
from fbopt.train.checkpoint.resume import Start, find_start, restore
from fbopt.train.checkpoint.run_dir import Lock, RunFolder
from fbopt.train.checkpoint.saver import Saver
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.curvature import Tracker
from fbopt.train.data.load import load
from fbopt.train.distributed import World, joined
from fbopt.train.reporting.describe import describe
from fbopt.train.reporting.plots import draw_curves
from fbopt.train.reporting.progress import Progress
from fbopt.train.signals import Interrupt, Interrupted
from fbopt.train.trainer import Run


@dataclass(frozen=True)
class Result:
    """A finished run: its options, folder and summary, and the trained model."""

    options: Options
    folder: RunFolder
    summary: dict[str, Any]
    model: nn.Module


def train(options: Options) -> Result:
    """Train as `options` say (see `Options`), write the run folder, and return the result.

    Raises OptionsError or DataError before anything is created where something cannot work,
    Interrupted after a signal (the run is saved), Diverged for a loss that is not finite,
    WriteError for a full disk and the like (earlier checkpoints are whole).

    Under torchrun all its processes train together, each on its share of the chunks. Rank 0 alone
    reads and writes the folder, and prints. An error is raised by the process that it happened in;
    the others raise PeerError.
    """
    with joined() as world, Lock() as lock:
        return _train(options, world, lock)


def _train(options: Options, world: World, lock: Lock) -> Result:
    start = world.decided(lambda: find_start(options, lock))
    with world.alike():
        run, digest = _build(start.options, world)
        surroundings = facts(run, digest)
        if start.state is not None:
            restore(run, start, surroundings)
    if start.state is None:
        _share_beginning(run, digest)
    folder, extra = start.folder, {"data": digest, "environment": surroundings}
    if world.decided(lambda: _is_finished(run, folder)):
        return Result(run.options, folder, world.decided(lambda: _finished(folder)), run.model)
    world.decided(lambda: _open(run, start, surroundings, lock))
    with Interrupt(folder) as interrupt:
        saved = None if start.state is None else run.step
        saver = Saver(run, folder, extra, saved) if world.lead else None
        _fit(run, folder, saver, interrupt)
    return Result(run.options, folder, world.decided(lambda: _finish(run, folder)), run.model)


def _build(options: Options, world: World) -> tuple[Run, str]:
    """The run and the SHA-256 of its data."""
    if world.size > 1 and (options.stochastic or options.switch_at):
        what = "--recipe sgd runs" if options.stochastic else "--switch-at's mini-batches are taken"
        raise OptionsError(
            f"{what} in one process, not in {world.size}, which would change its "
            "mini-batches; start it without torchrun, or choose a full-batch recipe"
        )
    device = world.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load(
        options.data, options.image_size, options.data_dir, options.download, options.samples
    )
    precision.settle(options.precision, device)
    return Run(options, data.to(device, options.channels_last), device, world), data.sha256()


def _share_beginning(run: Run, digest: str) -> None:
    """Give every process the parameters of rank 0; refuse other data than it has."""
    world = run.world
    if world.size == 1:
        return
    theirs, model = world.decided(lambda: (digest, format.plain(run.model.state_dict())))
    with world.alike():
        if theirs != digest:
            raise DataError(
                f"--data {run.options.data}: process {world.rank} has other samples or labels than "
                f"process 0 (SHA-256 {digest[:12]}…, not {theirs[:12]}…); give all the same"
            )
        run.model.load_state_dict(model)


def _open(run: Run, start: Start, surroundings: dict[str, Any], lock: Lock) -> None:
    """Make the folder ready for the steps to come, and say what they are."""
    folder = start.folder
    where = f"run folder: {folder.path}/"
    if start.state is None:
        lock.hold(folder)
        folder.check_free(run.options.overwrite)  # once more, now that no other can change it
        folder.create(run.options.as_json() | {"resume": None})
    else:
        folder.forget_after(run.step)
        where = f"resumed at step {run.step} of {run.total_steps}: {folder.path_of(run.step)}"
    folder.append(folder.environment, {"step": run.step} | surroundings)
    print(f"{describe(run)}\n{where}", flush=True)


def _is_finished(run: Run, folder: RunFolder) -> bool:
    return run.step == run.total_steps and folder.result.exists()


def _finished(folder: RunFolder) -> dict[str, Any]:
    """The summary of a run that needs no further step."""
    summary = folder.read_result()
    print(f"{folder.path}/ is finished: test accuracy {summary['test_accuracy']:.2%}", flush=True)
    return summary


def _fit(run: Run, folder: RunFolder, saver: Saver | None, interrupt: Interrupt) -> None:
    """Take the steps that are left; log, save now and then, and stop when asked to.

    Rank 0 has the saver and writes. It also evaluates the test set alone, which is small and needs
    no backward pass: nothing of it then depends on the number of processes.
    """
    options, world = run.options, run.world
    progress = Progress(options.passes, run.place[0], len(run.visited.split))
    run.advance, tracker = progress.advance, Tracker(run)
    begin, before = time.monotonic(), run.seconds
    try:
        while run.step < run.total_steps:
            run.take_step()
            run.seconds = before + time.monotonic() - begin
            done, rest = run.place
            if rest == 0:
                on_test = done % options.eval_every == 0 or run.step == run.total_steps
                tracked = tracker.due(done)
                if on_test or tracked or done == 1 or done % options.log_every == 0:
                    record = run.record(on_test and world.lead)
                    if tracked and world.lead:
                        record |= tracker.measure()
                    progress.report(record)
                    if world.lead:
                        folder.append(folder.metrics, record)
                run.scheduler.step()
            last = run.step == run.total_steps
            stop = world.any(interrupt.requested) and not last
            if saver is not None:
                saver.after_step(at_once=stop or last)
            if stop:
                raise Interrupted(f"saved at step {run.step} of {run.total_steps}", folder)
    finally:
        progress.close()


def _finish(run: Run, folder: RunFolder) -> dict[str, Any]:
    """Write the summary of the run that has just ended, and its curves."""
    last = [record for record in folder.read_metrics() if record["step"] == run.step]
    if not last:
        raise OptionsError(
            f"{folder.metrics} has no line for the last step; put it back and resume, or start "
            "again with --overwrite"
        )
    summary = {
        **last[-1],
        "parameters": models.count_parameters(run.model),
        "device": str(run.device),
        "torch": torch.__version__,
    }
    folder.write_result(summary)
    drawn = draw_curves(folder, run.options)
    print(
        f"test accuracy {summary['test_accuracy']:.2%} (loss {summary['test_loss']:.4f}), train "
        f"{summary['train_accuracy']:.2%} (loss {summary['loss']:.4f}) after {run.step} steps, "
        f"{summary['seconds']:.0f} s\nwritten: {folder.path}/ (options.json, metrics.jsonl, "
        f"{'curves.png, ' if drawn else ''}checkpoint-{run.step}.pt, result.json)",
        flush=True,
    )
    return summary
