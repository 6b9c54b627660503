"""Train: one loop for full-batch gradient descent and for its stochastic baseline.

for step in …:  take a step;  after each pass: log, evaluate, move the learning rate;  save.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fbopt.train import models
from fbopt.train.environment import facts
from fbopt.train.interrupt import Interrupt, Interrupted
from fbopt.train.options import Options, OptionsError
from fbopt.train.progress import Progress
from fbopt.train.report import draw_curves
from fbopt.train.resume import find_start, restore
from fbopt.train.run import Run
from fbopt.train.saving import Saver
from fbopt.train.sources import load
from fbopt.train.store import RunFolder
from fbopt.train.track import Tracker


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
    """
    start = find_start(options)
    options, folder, state = start
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load(options.data, options.image_size)
    digest = data.sha256()
    run = Run(options, data.to(device), device)
    surroundings = facts(run, digest)
    if state is None:
        folder.create(options.as_json() | {"resume": None})
    else:
        restore(run, start, surroundings)
        if run.step == run.total_steps and folder.result.exists():
            return _finished(run, folder)
        folder.forget_after(run.step)
    folder.append(folder.environment, {"step": run.step} | surroundings)
    where = f"run folder: {folder.path}/"
    if state is not None:
        where = f"resumed at step {run.step} of {run.total_steps}: {folder.path_of(run.step)}"
    print(f"{run.describe()}\n{where}", flush=True)
    extra = {"data": digest, "environment": surroundings}
    with Interrupt(folder) as interrupt:
        saver = Saver(run, folder, extra, None if state is None else run.step)
        _fit(run, saver, interrupt)
    return _finish(run, folder)


def _finished(run: Run, folder: RunFolder) -> Result:
    """The result of a run that needs no further step."""
    summary = folder.read_result()
    print(f"{folder.path}/ is finished: test accuracy {summary['test_accuracy']:.2%}", flush=True)
    return Result(run.options, folder, summary, run.model)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionsError(f"--device {name}: {reason}; use cpu, or leave it out") from error
    return device


def _fit(run: Run, saver: Saver, interrupt: Interrupt) -> None:
    """Take the steps that are left; log, save now and then, and stop when asked to."""
    options, folder = run.options, saver.folder
    progress = Progress(options.passes, run.step // run.steps_per_pass, len(run.data.train))
    run.advance, tracker = progress.advance, Tracker(run)
    begin, before = time.monotonic(), run.seconds
    try:
        while run.step < run.total_steps:
            run.take_step()
            run.seconds = before + time.monotonic() - begin
            if run.step % run.steps_per_pass == 0:
                done = run.step // run.steps_per_pass
                on_test = done % options.eval_every == 0 or done == options.passes
                tracked = tracker.due(done)
                if on_test or tracked or done == 1 or done % options.log_every == 0:
                    record = run.record(on_test) | (tracker.measure() if tracked else {})
                    folder.append(folder.metrics, record)
                    progress.report(record)
                run.scheduler.step()
            last = run.step == run.total_steps
            stop = interrupt.requested and not last
            saver.after_step(at_once=stop or last)
            if stop:
                raise Interrupted(f"saved at step {run.step} of {run.total_steps}", folder)
    finally:
        progress.close()


def _finish(run: Run, folder: RunFolder) -> Result:
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
    return Result(run.options, folder, summary, run.model)
