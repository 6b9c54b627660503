"""Tune every row of a ladder with equal care, by an accuracy on held-out training samples.

    pip install optuna
    python examples/tune.py --data mnist1d --rows sgd fb-clip fb-penalty --trials 16 --share 0.33
    fbopt ladder --data mnist1d --rows sgd fb-clip fb-penalty --validation 0.1 --first-seed 1 \
      --tuned runs/tune-mnist1d/tuned.json

All options of `fbopt train` hold for every trial. A row's first trial is its recipe; the others
search its learning rate, its weight decay, the size of its chunks or mini-batches, and what it has
of clipping norm, penalty, radius and rho. The best has the highest accuracy, after the last pass,
on the samples that --validation holds out of the training set. The test set is never looked at,
and trials have seed 0 (or --seed), which then is none of the ladder's.

Each row is a study of Optuna in OUT/ROW.db: after an interruption the same command goes on.
"""

import json
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from fbopt.train import (
    DataError,
    Diverged,
    Interrupted,
    Options,
    OptionsError,
    parse,
    resolve,
    train,
)
from fbopt.train.ladder import Ladder, make_plan

SPACE = {  # smallest and largest as factors of the recipe's value; or, of sizes, all of them
    "lr": (1 / 4, 6),
    "weight_decay": (1 / 4, 4),
    "max_norm": (1 / 4, 8),
    "penalty": (1 / 2, 16),
    "radius": (1 / 2, 16),
    "rho": (1 / 4, 4),
    "batch_size": (0.5, 1, 2),
    "chunk_size": (0.5, 1, 2),
}
RANDOM = 4  # first trials, the recipe's among them, that do not follow from those before
interrupted = threading.Event()  # in this process


@dataclass(frozen=True)
class Tuning:
    """Choose the hyperparameters of every row on samples held out of the training set."""

    data: str = "mnist1d"
    """Data set, as for `fbopt train`."""
    rows: tuple[str, ...] = ("sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong")
    """Recipes to tune."""
    trials: int = 16
    """Trials of every row."""
    share: float = 0.33
    """Fraction of its recipe's epochs or steps that a trial takes."""
    validation: float = 0.1
    """Share of the training samples that the choice is made by."""
    jobs: int | None = None
    """Rows tuned at the same time. Default: as many as cores and memory allow."""
    out: Path | None = None
    """Folder to write. Default: runs/tune-DATA."""


def main(words=None):
    """Tune all rows, several at a time, and write tuned.json."""
    wanted, common = parse("tune.py", words, Tuning, Options)
    ladder = Ladder(wanted.data, wanted.rows, seeds=1, share=wanted.share, jobs=wanted.jobs)
    try:
        if not wanted.validation or common.test is not None:
            raise OptionsError("hyperparameters are chosen on --validation, never on the test set")
        if common.eval_every or common.keep:
            raise OptionsError("--eval-every and --keep are set for every trial; leave them out")
        plan = make_plan(ladder, replace(common, validation=wanted.validation))
        folder = wanted.out or Path(f"runs/tune-{common.data_name}")
        folder.mkdir(parents=True, exist_ok=True)
        bases = [replace(base, test="never") for base in plan.last_row_first]
        with ProcessPoolExecutor(plan.jobs, get_context("spawn")) as pool:
            found = list(pool.map(partial(tune, folder=folder, trials=wanted.trials), bases))
    except (OptionsError, DataError) as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the processes have had it too, and save their runs
        found = [None]
    if None in found:
        print("interrupted; the same command goes on")
        return 130
    rows = {base.recipe: row for base, row in zip(bases, found, strict=True)}
    written = folder / "tuned.json"
    before = json.loads(written.read_text())["rows"] if written.exists() else {}
    rows = before | {row: rows[row] for row in plan.runs}
    content = {"chosen_by": "validation_accuracy", "rows": rows}
    written.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {written}")
    return 0


def tune(base, folder, trials):
    """Run the trials of a row that are missing; what it came to, None if interrupted."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    resolved = resolve(base)
    base = replace(base, eval_every=max(1, resolved.passes // 5), keep=1)
    space = {name: factors for name, factors in SPACE.items() if getattr(resolved, name)}
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/{base.recipe}.db",
        study_name=base.recipe,
        direction="maximize",
        # Not before a row that takes few, large steps shows what it is worth.
        pruner=optuna.pruners.MedianPruner(2, n_warmup_steps=int(0.4 * resolved.passes)),
        load_if_exists=True,
    )
    made_with = {"space": space, "passes": resolved.passes, "common": common_of(base)}
    check_same(study, made_with, folder)
    try:
        while not interrupted.is_set() and (done := len(finished(study))) < trials:
            if not done and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial({name: getattr(resolved, name) for name in space})
            # A function of the trials before: what is interrupted here is tried again.
            seed = base.seed + done
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=RANDOM, multivariate=True, seed=seed
            )
            out = folder / base.recipe / f"trial-{done}"
            out.parent.mkdir(exist_ok=True)
            study.optimize(partial(run, base=replace(base, out=out), space=space), n_trials=1)
            print(f"{base.recipe} {done + 1}/{trials}: {words_of(study)}", flush=True)
    except (Interrupted, KeyboardInterrupt):
        interrupted.set()  # for the rows that this process has not begun
    return None if interrupted.is_set() else summary(study, base, resolved.passes)


def run(trial, base, space):
    """Train once; the accuracy on the validation split."""
    recipe, chosen = resolve(base), {}
    for name, factors in space.items():
        values = [getattr(recipe, name) * factor for factor in factors]
        if name.endswith("_size"):
            chosen[name] = trial.suggest_categorical(name, list(map(int, values)))
        else:
            chosen[name] = trial.suggest_float(name, *values, log=True)

    reported = set()

    def report(row):
        if "validation_accuracy" in row and row["pass"] not in reported:
            reported.add(row["pass"])
            trial.report(row["validation_accuracy"], row["pass"])
            if trial.should_prune():
                raise optuna.TrialPruned

    metrics = base.out / "metrics.jsonl"  # of an interrupted trial, which is resumed
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        report(json.loads(line))
    torch.compiler.reset()  # it compiles few variants of one function
    with open(f"{base.out}.log", "a") as log, redirect_stdout(log):
        try:
            return train(replace(base, **chosen), [report]).summary["validation_accuracy"]
        except Diverged:
            return 0.0


def check_same(study, made_with, folder):
    """Refuse to mix trials of other options into a study."""
    made_with = json.loads(json.dumps(made_with))
    before = study.user_attrs.get("made_with")
    if before is None and not study.trials:
        study.set_user_attr("made_with", made_with)
    elif before != made_with:
        raise OptionsError(
            f"{folder} holds trials of other options, passes or ranges than these: {before}; give "
            "another --out"
        )


def common_of(base):
    """The options that all trials of a row share."""
    named = {k: v for k, v in base.as_json().items() if v != getattr(Options, k)}
    return {k: v for k, v in named.items() if k not in ("out", "threads", "processes")}


def finished(study):
    """The trials that ended by themselves or were pruned, in their order."""
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def words_of(study):
    """The last trial and the best value."""
    last = finished(study)[-1]
    result = "pruned" if last.state == TrialState.PRUNED else f"{last.value:.2%}"
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in last.params.items())
    return f"{result} (best {study.best_value:.2%}): {chosen}"


def summary(study, base, passes):
    """The best trial of a row, all trials, and the options that they share."""
    trials = [
        {"state": t.state.name.lower(), "validation_accuracy": t.value, **t.params}
        for t in finished(study)
    ]
    best = {"options": study.best_params, "validation_accuracy": study.best_value}
    return {**best, "passes": passes, "common": common_of(base), "trials": trials}


if __name__ == "__main__":
    sys.exit(main())
