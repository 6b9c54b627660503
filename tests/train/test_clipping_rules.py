"""Clipping by units, to the largest of the last norms and by other norms, against plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import interrupt_after, options
from torch import nn

from fbopt.train import loop
from fbopt.train.checkpoint.digest import fingerprint, groups
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.grad_transforms import GradientTransform
from fbopt.train.loop import train
from fbopt.train.reporting.describe import describe
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer
from fbopt.train.unit_clip import clip_units_

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((4, 3, 2, 2), (4,), (), (2, 3), (5, 1, 1))  # the last as the gains of an NFNet


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def trainer_of(tiny: str, recipe: str = "fb", **changes) -> Trainer:
    chosen = resolve(options(tiny, Path("never written"), recipe, **changes))
    return Trainer(chosen, load(tiny), torch.device("cpu"))


def parameters(scale: float = 1.0) -> list[nn.Parameter]:
    """Parameters in float64, with gradients; one with the channels last in memory."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
    params = [nn.Parameter(pair[0].clone()) for pair in draw]
    for p, pair in zip(params, draw, strict=True):
        p.grad = scale * pair[1]
    params[0].grad = params[0].grad.to(memory_format=torch.channels_last)
    return params


def clipped_by_units(p: torch.Tensor, g: torch.Tensor, share: float) -> torch.Tensor:
    """Brock et al. 2021, a unit at a time."""
    if p.squeeze().dim() < 2:
        bound = share * max(float(p.norm()), 1e-3)
        return g * min(1.0, bound / float(g.norm())) if g.any() else g
    rows = [clipped_by_units(w.flatten(), v.flatten(), share).view_as(v)
            for w, v in zip(p, g, strict=True)]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.1, 0.7, 100.0])
def test_units_are_clipped_each_by_its_own_weights(share):
    params = parameters()
    with torch.no_grad():
        params[0][1] = 0  # a row of zeros, whose bound is that of 0.001
        params[0].grad[2] = 0
        params[1].zero_()
    before = [p.grad.clone() for p in params]
    expected = [clipped_by_units(p.detach(), p.grad, share) for p in params]
    clip_units_(params, share)
    for p, wanted, old in zip(params, expected, before, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-13, atol=0)
        if share == 100.0 and p is not params[1] and p is not params[0]:
            assert torch.equal(p.grad, old)
    assert not torch.equal(params[1].grad, before[1])
    params[0].grad = None
    clip_units_(params, share)


def chosen(**changes) -> Options:
    return resolve(Options(recipe="fb", **changes))


@pytest.mark.parametrize("most", [None, 1.7])
def test_the_largest_of_the_last_norms(most):
    scales = [1.0, 3.0, 0.5, 0.25, 0.2, 2.0, 9.0, 0.1, 0.3]
    o = chosen(clip_history=3, **({} if most is None else {"max_norm": most}))
    unit = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters()))
    transform, norms = GradientTransform(parameters(), o), []
    for step, scale in enumerate(scales):
        bound = min(max(norms[-3:], default=math.inf), math.inf if most is None else most * unit)
        params = parameters(scale)
        before = [p.grad.clone() for p in params]
        transform.params = params
        if most is not None:
            transform.options = chosen(clip_history=3, max_norm=most * unit)
        assert float(transform.bound()) == pytest.approx(bound, rel=1e-12)
        norm = transform(step)
        factor = min(1.0, bound / (scale * unit + 1e-6))
        assert float(norm) == pytest.approx(scale * unit, rel=1e-12)
        assert transform.coefficient() == pytest.approx(factor, rel=1e-12)
        for p, g in zip(params, before, strict=True):
            torch.testing.assert_close(p.grad, factor * g, rtol=1e-12, atol=0)
        norms.append(scale * unit)
        if step == 4:  # a checkpoint in between
            state = {k: v.clone() if isinstance(v, torch.Tensor) else v
                     for k, v in transform.history.state_dict().items()}  # fmt: skip
            transform = GradientTransform(parameters(), o)
            transform.history.load_state_dict(state)


def test_undefined_norms_do_not_clip():
    """The run then says that it diverged, rather than that a bound is wrong."""
    transform = GradientTransform(parameters(), chosen(clip_history=2))
    transform(0)
    transform.params[0].grad.fill_(math.nan)
    assert math.isnan(transform(1))
    assert float(transform.bound()) == math.inf
    transform(2)


@pytest.mark.parametrize("order", ["inf", 1.0, 3.0])
@pytest.mark.parametrize("case", ["fb", "sgd", "fb, adam", "sgd, rmsprop"])
def test_other_norms(tiny, case, order):
    recipe, _, rule = case.partition(", ")
    changes = {"optimizer": rule or "sgd", "weight_decay": 0.0}
    free = trainer_of(tiny, recipe, **changes)
    free.take_step()
    plain = torch.cat([p.grad.flatten() for p in free.model.parameters()])
    size = float(torch.linalg.vector_norm(plain, float(order)))
    bound = size / 4
    trainer = trainer_of(tiny, recipe, **changes, max_norm=bound, norm_type=order)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.take_step()
    record = trainer.record()
    assert record["gradient_norm"] == pytest.approx(size, rel=1e-5)
    assert record["clip"] == pytest.approx(0.25, rel=1e-3)
    if not rule:  # a step of sgd is as long as the gradient
        other = trainer_of(tiny, recipe, **changes)
        other.take_step()
        for p, q, old in zip(trainer.model.parameters(), other.model.parameters(), before,
                             strict=True):  # fmt: skip
            torch.testing.assert_close(p - old, (q - old) / 4, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("recipe", ["fb", "sgd"])
def test_units_first_then_the_whole(tiny, recipe):
    share, free = 0.02, trainer_of(tiny, recipe)
    free.take_step()
    start = trainer_of(tiny, recipe)  # the same initial weights
    *hidden, weight, bias = start.model.parameters()
    grads = [p.grad for p in free.model.parameters()]
    wanted = [clipped_by_units(p.detach(), g, share) for p, g in zip(hidden, grads, strict=False)]
    wanted += grads[-2:]  # the last layer is left out
    assert [p.shape for p in (weight, bias)] == [g.shape for g in grads[-2:]]
    inner = torch.cat([g.flatten() for g in wanted]).norm()
    whole = torch.cat([g.flatten() for g in grads]).norm()
    assert inner < 0.9 * whole
    bound = inner / 2
    trainer = trainer_of(tiny, recipe, agc=share, max_norm=float(bound))
    trainer.take_step()
    record = trainer.record()
    assert record["gradient_norm"] == pytest.approx(float(whole), rel=1e-4)
    assert record["clip"] == pytest.approx(0.5, rel=1e-3)
    for p, g in zip(trainer.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g / 2, rtol=1e-3, atol=1e-7)


def test_noise_follows_all_clipping(tiny):
    changes = {"agc": 1e-6, "clip_history": 2, "additive_noise": 0.1}
    trainer = trainer_of(tiny, **changes)
    trainer.take_step()
    noise = torch.cat([p.grad.flatten() for p in list(trainer.model.parameters())[:-2]])
    assert noise.std().item() == pytest.approx(0.1, rel=0.2)


CASES = {
    "full batch": {"agc": 0.5, "clip_history": 2, "norm_type": "inf", "lr": 2.0},
    "mini-batches": {"recipe": "sgd", "epochs": 3, "clip_history": 1, "agc": 0.5},
    "both": {"switch_at": 2, "batch_size": 25, "clip_history": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, case):
    changes = {"recipe": "fb", "fingerprint_every": 1, "log_every": 1, **CASES[case]}
    changes |= {} if changes["recipe"] == "sgd" else {"steps": 6}
    whole = train(options(tiny, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "part", **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    states = [run.folder.load() for run in (resumed, whole)]
    assert fingerprint(states[0]) == fingerprint(states[1])
    norms = groups(states[0])["momentum"]["clip_history"]
    assert norms.shape == (changes["clip_history"],) and (norms > 0).all()
    assert tiny_runs.metrics(resumed.folder) == tiny_runs.metrics(whole.folder)
    assert any(row["clip"] < 1 for row in whole.folder.read_metrics())


def test_what_a_run_says_of_it(tiny):
    words = {
        "clipped to the largest norm of 3 steps": {"clip_history": 3},
        "units to 0.1 of their weights": {"agc": 0.1},
        "clipped to 0.5 (inf-norm)": {"max_norm": 0.5, "norm_type": "inf"},
        "no clipping": {},
        "muon, momentum 0.95 (Nesterov), beta1 0.9, beta2 0.999, eps 1e-08": {"optimizer": "muon"},
    }
    for text, changes in words.items():
        assert text in describe(trainer_of(tiny, **changes)), text


def test_a_history_takes_the_place_of_the_recipes_bound():
    assert resolve(Options(recipe="fb-clip")).max_norm == 0.25
    o = resolve(Options(recipe="fb-clip", clip_history=5))
    assert (o.max_norm, o.clip_history) == (None, 5) and resolve(o) == o
    assert resolve(Options(recipe="fb-clip", clip_history=5, max_norm=0.5)).max_norm == 0.5


BAD = {
    "no units": ({"agc": 0.0}, "--agc 0.0: has to be above 0"),
    "no history": ({"clip_history": 0}, "--clip-history 0: has to be at least 1"),
    "norm 0": ({"norm_type": 0.0}, "--norm-type 0.0: has to be above 0, or inf"),
    "norm nan": ({"norm_type": math.nan}, "--norm-type nan: has to be above 0, or inf"),
    "no clipping": ({"recipe": "fb", "norm_type": 1.0}, "--norm-type has no effect without clip"),
    "units, signs": (
        {"optimizer": "sign", "agc": 0.1, "weight_decay": 0.0},
        "--agc has no effect on --optimizer sign",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    changes, message = BAD[case]
    with pytest.raises(OptionsError, match=message):
        resolve(Options(**changes))


def test_the_norms_of_mini_batches_are_euclidean_whatever_is_clipped(tiny, tmp_path):
    found = []
    for norm_type in (2.0, "inf"):
        given = options(tiny, tmp_path / str(norm_type), "sgd", epochs=1, max_norm=1e9)
        run = train(replace(given, chunk_norms=True, norm_type=norm_type))
        found.append(run.folder.read_metrics()[0]["mean_squared_chunk_norm"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
