"""Train: one loop for full-batch gradient descent and for its stochastic baseline.

for step in …:  take a step;  after each pass: log, evaluate, move the learning rate;  save.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fbopt.train import models
from fbopt.train.interrupt import Interrupt, Interrupted
from fbopt.train.options import Options, OptionsError, check_resume, resolve
from fbopt.train.progress import Progress
from fbopt.train.report import draw_curves
from fbopt.train.run import Run
from fbopt.train.sources import DataError, load
from fbopt.train.store import RunFolder

SAVE_SECONDS = 300.0


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
    Interrupted after a signal (the run is saved), Diverged for a loss that is not finite.
    """
    options, state = _prepare(options)
    folder = RunFolder(options.resume or options.folder)
    if state is None:
        folder.check_free(options.overwrite)
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load(options.data, options.image_size)
    fingerprint = data.sha256()
    run = Run(options, data.to(device), device)
    if state is None:
        folder.create(options.as_json())
    else:
        if state["data"] != fingerprint:
            raise DataError(
                f"--resume {folder.path}: {options.data} is not the data that the run "
                "began with; restore it, or start a new run with --out"
            )
        run.load_state_dict(state)
        folder.forget_after(run.step)
    where = f"resumed at step {run.step} of {run.total_steps}" if state else "run folder"
    print(f"{run.describe()}\n{where}: {folder.path}/", flush=True)
    with Interrupt(folder) as interrupt:
        _fit(run, folder, interrupt, {"data": fingerprint})
    return _finish(run, folder)


def _prepare(options: Options) -> tuple[Options, dict[str, Any] | None]:
    """Resolved options, and the checkpoint to go on from where `options` ask for that."""
    if options.resume is None:
        return resolve(options), None
    check_resume(options)
    folder = RunFolder(options.resume)
    state = folder.load()
    try:
        saved = Options.from_json(state["options"])
    except (KeyError, TypeError) as error:
        raise OptionsError(
            f"--resume {folder.path}: the run was made by another version of fbopt ({error}); "
            "go on with that version, or start a new run with --out"
        ) from error
    if folder.result.exists():
        raise OptionsError(
            f"--resume {folder.path}: the run is finished; start a new one with --out"
        )
    threads = options.threads or saved.threads
    return replace(saved, resume=folder.path, device=options.device, threads=threads), state


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


def _fit(run: Run, folder: RunFolder, interrupt: Interrupt, extra: dict[str, Any]) -> None:
    """Take the steps that are left; log, save now and then, and stop when asked to."""
    options = run.options
    progress = Progress(options.passes, run.step // run.steps_per_pass, len(run.data.train))
    run.advance = progress.advance
    begin, before, saved = time.monotonic(), run.seconds, time.monotonic()
    try:
        while run.step < run.total_steps:
            run.take_step()
            run.seconds = before + time.monotonic() - begin
            if run.step % run.steps_per_pass == 0:
                done = run.step // run.steps_per_pass
                on_test = done % options.eval_every == 0 or done == options.passes
                if on_test or done == 1 or done % options.log_every == 0:
                    record = run.record(on_test)
                    folder.append(record)
                    progress.report(record)
                run.scheduler.step()
            late = time.monotonic() - saved > SAVE_SECONDS
            if late or (interrupt.requested and run.step < run.total_steps):
                run.check_finite()
                folder.save(run.state_dict() | extra)
                saved = time.monotonic()
                if interrupt.requested:
                    raise Interrupted(f"saved at step {run.step} of {run.total_steps}", folder)
    finally:
        progress.close()
    folder.save(run.state_dict() | extra)


def _finish(run: Run, folder: RunFolder) -> Result:
    records = folder.read_metrics()
    summary = {
        **records[-1],
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
        f"{'curves.png, ' if drawn else ''}checkpoint.pt, result.json)",
        flush=True,
    )
    return Result(run.options, folder, summary, run.model)
