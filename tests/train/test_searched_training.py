"""`--line-search` and `--optimizer lbfgs`: what is logged of steps that look at several points."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import digest, interrupt_after, options

from fbopt import LBFGS, FullBatchGD
from fbopt.train import loop
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.evaluate import evaluate
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def trainer_of(tiny: str, recipe: str = "fb-penalty", **changes) -> Trainer:
    # tiny_runs has a warm-up, which lbfgs has none of.
    own = {"lr": None, "warmup": None, "cosine": None} if "optimizer" in changes else {}
    chosen = resolve(options(tiny, Path("never written"), recipe, **(own | changes)))
    return Trainer(chosen, load(tiny), torch.device("cpu"))


SEARCHED = {
    "lbfgs": {"optimizer": "lbfgs", "iterations": 4},
    "lbfgs, exact products": {"optimizer": "lbfgs", "method": "exact"},
    "lbfgs, without": {"optimizer": "lbfgs", "line_search": "none", "penalty": 0.0},
    "armijo": {"line_search": "armijo"},
    "nonmonotone": {"line_search": "nonmonotone", "penalty": 0.0},
    "strong wolfe": {"line_search": "strong_wolfe", "model": "resnet18", "width": 2},
}


@pytest.mark.parametrize("case", SEARCHED)
def test_a_step_logs_what_was_before_it(tiny, case):
    trainer = trainer_of(tiny, **SEARCHED[case])
    assert isinstance(trainer.optimizer, LBFGS if "lbfgs" in case else FullBatchGD)
    losses, evaluations = [], 0
    for _ in range(3):
        split = trainer.data.train
        trainer.model.eval()
        accuracy, loss = evaluate(trainer.model, split)
        trainer.model.train()
        trainer.take_step()
        evaluations += trainer.optimizer.last_evaluations
        record = trainer.record()
        if SEARCHED[case].get("model") is None:  # BatchNorm has other statistics in training
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
            assert record["train_accuracy"] == pytest.approx(accuracy)
        losses.append(record["loss"])
        assert math.isfinite(record["gradient_norm"]) and 0 < record["clip"] <= 1
    assert losses[2] < losses[0]
    counted = record["gradient_evaluations"] / (2 if trainer.options.penalty else 1)
    # Armijo's search without a penalty looks at the loss alone.
    assert counted == evaluations or ("nonmonotone" in case and 3 <= counted <= evaluations)


@pytest.mark.parametrize("case", ["lbfgs", "lbfgs, without", "strong wolfe", "nonmonotone"])
def test_resumed_on_the_same_bits(tiny, tmp_path, monkeypatch, case):
    changes = {"steps": 5} | SEARCHED[case]
    if "lbfgs" in case:
        changes |= {"lr": None, "warmup": None, "cosine": None}
    whole = train(options(tiny, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            train(options(tiny, tmp_path / "part", **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)
    assert (
        resumed.folder.read_metrics()[-1]["gradient_evaluations"]
        == (whole.folder.read_metrics()[-1]["gradient_evaluations"])
    )


def test_options():
    o = resolve(Options(optimizer="lbfgs"))
    assert (o.line_search, o.history, o.iterations, o.lr) == ("strong_wolfe", 10, 20, 1.0)
    assert (o.schedule, o.warmup, o.max_norm, o.weight_decay) == ("constant", 0, None, 0.0)
    assert resolve(o) == o and Options.from_json(o.as_json()) == o
    o = resolve(Options(optimizer="lbfgs", line_search="none", max_norm=2.0, as_released=True))
    assert (o.line_search, o.max_norm, o.mean, o.last_chunk) == ("none", 2.0, None, "drop")
    o = resolve(Options(line_search="armijo"))
    assert (o.line_search, o.history, o.schedule, o.max_norm) == ("armijo", None, "cosine", 0.25)
    assert resolve(Options(line_search="none")) == resolve(Options())


REFUSED = {
    "sam": ({"line_search": "armijo", "recipe": "fb-sam"}, "that of sam is of none"),
    "sgd": ({"optimizer": "lbfgs", "recipe": "sgd"}, "lbfgs is for full-batch recipes"),
    "adam": ({"optimizer": "adam", "line_search": "armijo"}, "for --optimizer sgd and lbfgs"),
    "noise": ({"line_search": "armijo", "additive_noise": 0.1}, "--additive-noise: --line-search"),
    "mean": ({"optimizer": "lbfgs", "mean": "running"}, "--mean: --optimizer lbfgs compares"),
    "switch": ({"optimizer": "lbfgs", "switch_at": 2}, "--switch-at: --optimizer lbfgs compares"),
    "clip": ({"line_search": "armijo", "chunk_max_norm": 1.0}, "--chunk-max-norm: --line-search"),
    "decay": ({"optimizer": "lbfgs", "weight_decay": 0.1}, "--weight-decay is not for"),
    "warm-up": ({"optimizer": "lbfgs", "warmup": 10}, "--warmup is not for --optimizer lbfgs"),
    "schedule": ({"optimizer": "lbfgs", "schedule": "step"}, "--schedule step is not for"),
    "history": ({"history": 5}, "--history is for --optimizer lbfgs"),
    "none": ({"optimizer": "lbfgs", "history": 0}, "--history 0: has to be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_with_a_search(case):
    given, words = REFUSED[case]
    with pytest.raises(OptionsError, match=words):
        resolve(Options(**given))
