"""`--perturbation`: which options belong to which, and mini-batches with a second point."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import digest, interrupt_after, options
from torch import nn

from fbopt import GradientPenalty, SharpnessAware
from fbopt.train import build, loop
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.perturbation import ALL
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.loop import train
from fbopt.train.reporting.describe import describe
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer

RULES = {
    "recipe": ({}, GradientPenalty(0.5), 2),
    "none": ({"perturbation": "none"}, None, 1),
    "no strength": ({"penalty": 0.0}, None, 1),
    "a strength": ({"recipe": "fb", "penalty": 0.1}, GradientPenalty(0.1), 2),
    "penalty": ({"recipe": "fb", "perturbation": "penalty"}, GradientPenalty(0.5), 2),
    "norm": ({"perturbation": "gnp", "penalty": 0.2}, GradientPenalty(0.2, power=1), 2),
    "whole": ({"full_penalty": 0.3}, GradientPenalty(0.5, full_strength=0.3), 3),
    "whole alone": (
        {"recipe": "fb", "full_penalty": 0.3}, GradientPenalty(0.0, full_strength=0.3), 3,
    ),
    "exact": ({"method": "exact"}, GradientPenalty(0.5, method="exact"), 2),
    "sam": ({"recipe": "fb-sam"}, SharpnessAware(0.05), 2),
    "sam in place": ({"perturbation": "sam", "rho": 0.2}, SharpnessAware(0.2), 2),
    "asam": ({"recipe": "fb-asam-aug"}, SharpnessAware(0.5, adaptive=True), 2),
    "full": (
        {"recipe": "fb-sam", "scope": "full", "method": "central", "sam_share": 0.5},
        SharpnessAware(0.05, scope="full", alpha=0.5, method="central"), 4,
    ),
    "sgd": ({"recipe": "sgd"}, None, 1),
    "sgd, penalty": ({"recipe": "sgd", "penalty": 0.4}, GradientPenalty(0.4), 2),
    "sgd, sam": ({"recipe": "sgd", "perturbation": "sam"}, SharpnessAware(0.05), 2),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_options_of_a_perturbation(case):
    given, expected, gradients = RULES[case]
    o = resolve(Options(**given))
    assert build.build_perturbation(o) == expected
    assert resolve(replace(o, perturbation=o.perturbation or _word(o))) == o
    assert (o.perturbation is None) == (not isinstance(expected, SharpnessAware)
                                        and getattr(expected, "power", 2) == 2)  # fmt: skip
    if expected is None:
        assert [getattr(o, name) for name in ALL] == [None] * len(ALL)
    assert build.gradients_per_pass(o) == gradients


def _word(o: Options) -> str:
    return "none" if o.penalty is None else "penalty"


REFUSED = {
    "rho of a penalty": ({"rho": 0.1}, "--rho has no effect without --perturbation sam or asam"),
    "scope of none": ({"recipe": "fb", "scope": "full"}, "--scope has no effect without a pert"),
    "radius of sam": ({"recipe": "fb-sam", "radius": 0.1}, "--radius has no effect without"),
    "strength of sam": ({"perturbation": "sam", "penalty": 0.5}, "--penalty has no effect without"),
    "strength of none": ({"perturbation": "none", "penalty": 0.5}, "--penalty has no effect"),
    "no strength": ({"perturbation": "gnp", "penalty": 0.0}, "--penalty 0 contradicts --pert"),
    "norm of all": ({"perturbation": "gnp", "full_penalty": 0.5}, "--full-penalty is on a squared"),
    "exact sam": ({"perturbation": "asam", "method": "exact"}, "--method exact is for penalties"),
    "mini-batches": (
        {"recipe": "sgd", "perturbation": "sam", "scope": "full"}, "the mini-batch is all",
    ),
    "whole of sgd": ({"recipe": "sgd", "full_penalty": 0.5}, "--full-penalty is only for"),
    "rho 0": ({"recipe": "fb-sam", "rho": 0.0}, "--rho 0.0: has to be above 0"),
    "share": ({"recipe": "fb-sam", "sam_share": -1.0}, "--sam-share -1.0: has to be above 0"),
    "unknown": ({"perturbation": "lookahead"}, "--perturbation lookahead: choose none, penalty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_of_another_perturbation_are_refused(case):
    given, words = REFUSED[case]
    with pytest.raises(OptionsError, match=words):
        resolve(Options(**given))


def plain_step(model, optimizer, batch, rule, max_norm) -> None:
    """A mini-batch's step in plain torch; the second pass leaves BatchNorm alone."""
    (x, y), params = batch, list(model.parameters())

    def gradient():
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params)

    grads = gradient()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    if isinstance(rule, SharpnessAware):
        radius, factor = rule.rho, rule.alpha
    else:
        lr = optimizer.param_groups[0]["lr"]
        radius, factor = rule.radius, lr * rule.strength / 4 * norm / rule.radius
    with torch.no_grad():
        saved = [p.clone() for p in params]
        for p, g in zip(params, grads, strict=True):
            p += radius * g / norm
    shifted = gradient()
    with torch.no_grad():
        for p, s in zip(params, saved, strict=True):
            p.copy_(s)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for p, a, b in zip(params, grads, shifted, strict=True):
        p.grad = a + factor * (b - a)
    nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()


@pytest.mark.parametrize("kind", ["penalty", "sam"])
def test_mini_batches_with_a_second_point(tiny, kind, monkeypatch):
    made = build.build_model
    monkeypatch.setattr(build, "build_model", lambda *args: made(*args).double())
    given = {"model": "resnet18", "width": 2, "epochs": 2, "max_norm": 0.5, "perturbation": kind}
    o = resolve(options(tiny, Path("never written"), "sgd", **given))
    data = load(tiny)
    data = replace(data, train=replace(data.train, x=data.train.x.double()))
    trainer = Trainer(o, data, torch.device("cpu"))
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(2 * len(trainer.batches)):
        batch = trainer.batches[trainer.position[1]]
        optimizer.param_groups[0]["lr"] = trainer.optimizer.param_groups[0]["lr"]
        plain_step(model, optimizer, batch, build.build_perturbation(o), 0.5)
        trainer.take_step()
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-9, atol=0)
    assert trainer.record()["gradient_evaluations"] == 4
    assert trainer.record()["mean_squared_chunk_norm"] > 0


RESUMED = {
    "sgd": ("sgd", {"penalty": 1.0, "model": "resnet18", "width": 2, "dropout": 0.2}, 7),
    "sam": ("fb-sam", {"scope": "full", "model": "resnet18", "width": 2, "dropout": 0.2}, 5),
    "asam": ("fb-asam", {}, 5),
    "whole": ("fb-penalty", {"full_penalty": 0.5}, 5),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_on_the_same_bits(tiny, tmp_path, monkeypatch, case):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)
    recipe, changes, stop = RESUMED[case]
    whole = train(options(tiny, tmp_path / "whole", recipe, **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(Interrupted):
            train(options(tiny, tmp_path / "part", recipe, **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)


def test_words(tiny):
    def words(recipe="fb-penalty", **changes):
        o = resolve(options(tiny, Path("never written"), recipe, **changes))
        return describe(Trainer(o, load(tiny), torch.device("cpu")))

    assert "penalty 0.5 (forward differences, radius 0.01)" in words()
    assert "penalty of the norm 0.2 (exact)" in words(
        perturbation="gnp", penalty=0.2, method="exact"
    )
    assert "SAM (rho 0.05, chunk)" in words("fb-sam")
    assert "ASAM (rho 2, full, share 0.5)" in words("fb-asam", rho=2, scope="full", sam_share=0.5)
    assert "no penalty" in words(perturbation="none")
