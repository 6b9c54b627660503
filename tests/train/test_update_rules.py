"""The update rules of `--optimizer` against plain torch, and runs of each of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args

import pytest
import tiny_runs
import torch
from tiny_runs import interrupt_after, options, trainer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fbopt import cli
from fbopt.analysis import PreconditionedHessian, eigenpairs
from fbopt.train import loop
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.digest import fingerprint, groups
from fbopt.train.config.diff import differences, resolve_for
from fbopt.train.config.options import OptimizerName, Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.config.rules import OWN, RULES
from fbopt.train.curvature import training_loss
from fbopt.train.grad_transforms import ClipHistory
from fbopt.train.loop import train
from fbopt.train.optimizers.lars import LARS
from fbopt.train.optimizers.muon import Muon
from fbopt.train.optimizers.simple import NormalizedGD, SignDescent
from fbopt.train.signals import Interrupted

# lbfgs, which evaluates several in a step, is in test_searched_training.
ONE_GRADIENT = [rule for rule in RULES if rule != "lbfgs"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


# --- the rules ------------------------------------------------------------------------------------


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


SHAPES = ((4, 3), (5,), ())


def run(kind, steps: int = 6, *, decays=(0.3, 0.0), **rule) -> list[torch.Tensor]:
    """Parameters in two groups after some steps; the gradient is a function of the step."""
    params = [nn.Parameter(t) for t in tensors(0, *SHAPES)]
    params[1].data.zero_()  # as biases may begin
    listed = [{"params": params[:2], "weight_decay": decays[0]},
              {"params": params[2:], "weight_decay": decays[1]}]  # fmt: skip
    optimizer = kind(listed, **rule)
    for step in range(steps):
        for p, g in zip(params, tensors(step + 1, *SHAPES), strict=True):
            p.grad = g
        if step == 3:  # a state dict in between, and a gradient of zero
            state = optimizer.state_dict()
            optimizer = kind(listed, **rule)
            optimizer.load_state_dict(state)
            params[0].grad.zero_()
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    return [p.detach() for p in params]


def plainly(rule, steps: int = 6, decays=(0.3, 0.3, 0.0)) -> list[torch.Tensor]:
    """The same by `rule(params, decayed gradients, gradients, decays, memory)`, in plain torch."""
    params, memory = tensors(0, *SHAPES), {}
    params[1].zero_()
    for step in range(steps):
        grads = tensors(step + 1, *SHAPES)
        if step == 3:
            grads[0].zero_()
        decayed = [g + d * p for p, g, d in zip(params, grads, decays, strict=True)]
        params = rule(params, decayed, grads, decays, memory)
    return params


def test_sign_descent():
    found = run(SignDescent, lr=0.1)
    expected = plainly(lambda params, decayed, *_: [
        p - 0.1 * (g > 0).double() + 0.1 * (g < 0).double()
        for p, g in zip(params, decayed, strict=True)])  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_normalized_gradient_descent():
    def rule(params, decayed, *_):
        norm = math.sqrt(sum(float((g**2).sum()) for g in decayed))
        return [p - 0.1 * g / norm for p, g in zip(params, decayed, strict=True)]

    for a, b in zip(run(NormalizedGD, lr=0.1), plainly(rule), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    NormalizedGD([p], lr=0.1).step()
    assert torch.equal(p, torch.ones(3))
    p.grad[1] = math.nan
    NormalizedGD([p], lr=0.1).step()
    assert p.isnan().any()  # so that the run says that it diverged


def test_lars():
    def rule(params, decayed, grads, decays, memory):
        after = []
        for i, (p, d, g) in enumerate(zip(params, decayed, grads, strict=True)):
            weight, gradient = float(p.norm()), float(g.norm())
            ratio = 1.0
            if weight and gradient:
                ratio = 0.02 * weight / (gradient + decays[i] * weight)
            memory[i] = 0.8 * memory.get(i, 0) + 3.0 * ratio * d
            after.append(p - memory[i])
        return after

    found = run(LARS, lr=3.0, momentum=0.8, trust=0.02)
    for a, b in zip(found, plainly(rule), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SignDescent, NormalizedGD, LARS])
def test_options_that_rules_refuse(kind):
    p = nn.Parameter(torch.ones(3))
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            kind([p], **{"lr": 1.0, name: -1.0})
    p.grad = torch.ones(3)
    assert kind([p], lr=0.0).step(lambda: 7) == 7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_on_convolutions_as_matrices(layout):
    """As torch's Muon on the flattened weights, and torch's AdamW on the rest."""
    (weight,), (bias,) = tensors(0, (6, 4, 3, 2)), tensors(1, (6,))
    conv = nn.Parameter(weight.clone().to(memory_format=layout))
    rest = nn.Parameter(bias.clone())
    rule = {"lr": 0.02, "weight_decay": 0.1}
    listed = [{"params": [conv], "matrices": True}, {"params": [rest]}]
    ours = Muon(listed, **rule, momentum=0.9, betas=(0.8, 0.9), eps=1e-6)
    flat, alone = nn.Parameter(weight.flatten(1).clone()), nn.Parameter(bias.clone())
    muon = torch.optim.Muon([flat], **rule, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([alone], **rule, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        (g,), (h,) = tensors(step + 5, (6, 4, 3, 2)), tensors(step + 50, (6,))
        conv.grad, rest.grad = g.clone(), h.clone()  # a gradient may lie otherwise
        flat.grad, alone.grad = g.flatten(1), h
        if step == 2:
            state = ours.state_dict()
            ours = Muon(listed, lr=1.0)
            ours.load_state_dict(state)
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    torch.testing.assert_close(rest, alone, rtol=1e-12, atol=1e-12)
    # The orthogonalisation is in bfloat16, and sums in the order of the columns.
    close = {"rtol": 0, "atol": 0.0 if layout is torch.contiguous_format else 2e-3}
    torch.testing.assert_close(conv.detach().flatten(1), flat.detach(), **close)
    assert (conv.detach() - weight).abs().max() > 0.02
    buffer = ours.state[conv]["momentum_buffer"]
    torch.testing.assert_close(buffer.flatten(1), muon.state[flat]["momentum_buffer"])
    with pytest.raises(ValueError, match="at least 2 dimensions, not of shape"):
        Muon([{"params": [rest], "matrices": True}])


def test_muon_leaves_the_last_layer_and_all_vectors_to_adamw(tiny):
    trainer = trainer_of(tiny, optimizer="muon", model="resnet18", width=2, decay="weights")
    names = {p: name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = {names[p]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for p, name in names.items():
        assert found[name]["matrices"] == (p.dim() == 4), name
        assert found[name]["weight_decay"] == (0.1 if p.dim() > 1 else 0.0), name
    before = {name: p.detach().clone() for p, name in names.items()}
    trainer.take_step()
    assert all(not torch.equal(p, before[name]) for p, name in names.items())


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fb-penalty", "sgd"])
@pytest.mark.parametrize("rule", ONE_GRADIENT)
def test_nothing_is_left_open(rule, recipe):
    o = resolve(Options(recipe=recipe, optimizer=rule))
    assert {n for n in OWN if getattr(o, n) is not None} == RULES[rule].keys() & set(OWN)
    defaults = {k: v for k, v in RULES[rule].items() if v is not None}
    assert {name: getattr(o, name) for name in defaults} == defaults
    assert resolve(o) == o and Options.from_json(o.as_json()) == o
    given = resolve(Options(recipe=recipe, optimizer=rule, lr=0.5, weight_decay=0.25))
    assert (given.lr, given.weight_decay) == (0.5, 0.25)


def test_names_and_torchs_defaults_agree():
    assert get_args(OptimizerName) == tuple(RULES)
    p = [nn.Parameter(torch.ones(2, 2))]
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW),
                       ("rmsprop", torch.optim.RMSprop), ("muon", torch.optim.Muon)):  # fmt: skip
        torchs = kind(p).defaults
        torchs["beta1"], torchs["beta2"] = torchs.get("betas", (0.9, 0.999))
        own = {k: v for k, v in RULES[name].items() if (name, k) != ("muon", "eps")}
        assert {k: torchs[k] for k in own} == own
    plain = resolve(Options())
    assert resolve(Options(optimizer="adam")).weight_decay == plain.weight_decay == 5e-4
    assert resolve(Options(optimizer="lars")).momentum == plain.momentum == 0.9


BAD = {
    "unknown": ({"optimizer": "adm"}, "--optimizer adm: choose sgd, adam"),
    "momentum": (
        {"optimizer": "adam", "momentum": 0.5},
        "--momentum is for --optimizer sgd, rmsprop, muon, lars, not for adam; leave it out",
    ),
    "nesterov": (
        {"optimizer": "lars", "nesterov": True},
        "--nesterov is for --optimizer sgd, muon",
    ),
    "beta1": ({"beta1": 0.5}, "--beta1 is for --optimizer adam, adamw, muon, not for sgd"),
    "eps": ({"optimizer": "sign", "eps": 0.5}, "--eps is for --optimizer adam, adamw, rmsprop, m"),
    "alpha": ({"optimizer": "adam", "alpha": 0.5}, "--alpha is for --optimizer rmsprop, not for"),
    "trust": ({"optimizer": "muon", "trust": 0.5}, "--trust is for --optimizer lars, not for muon"),
    "beta2 1": ({"optimizer": "adam", "beta2": 1.0}, "--beta2 1.0: has to be at least 0 and below"),
    "eps 0": ({"optimizer": "adam", "eps": 0.0}, "--eps 0: has to be above 0"),
    "eps -1": ({"optimizer": "adam", "eps": -1.0}, "--eps -1.0: has to be at least 0"),
    "trust 0": ({"optimizer": "lars", "trust": 0.0}, "--trust 0.0: has to be above 0"),
    "no momentum": (
        {"optimizer": "muon", "momentum": 0.0, "nesterov": True},
        "--nesterov needs momentum",
    ),
    "clip, signs": (
        {"optimizer": "sign", "max_norm": 1.0, "weight_decay": 0.0},
        "--max-norm has no effect on --optimizer sign, which follows the gradient's signs alone",
    ),
    "history, direction": (
        {"optimizer": "normalized", "clip_history": 3, "weight_decay": 0.0},
        "--clip-history has no effect on --optimizer normalized, .* the gradient's direction alone",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    changes, message = BAD[case]
    with pytest.raises(OptionsError, match=message):
        resolve(Options(**changes))


def test_runs_from_before_there_were_rules():
    """Their options do not name them, and they go on as they did."""
    new = ("optimizer", "norm_type", "agc", "clip_history", *OWN[2:])
    o = resolve(Options())
    older = {k: v for k, v in o.as_json().items() if k not in new}
    assert Options.from_json(older) == o
    assert not differences(older, resolve_for(older, Options()).as_json())
    now = resolve_for(older, Options(optimizer="sign")).as_json()
    assert ("--optimizer", "sgd", "sign") in differences(older, now)


# --- runs -----------------------------------------------------------------------------------------

RUNS = {
    "adam": {},
    "adamw": {"recipe": "sgd", "epochs": 3},
    "rmsprop": {"momentum": 0.5},
    "sign": {"recipe": "sgd", "epochs": 3},
    "normalized": {},
    "muon": {"decay": "weights", "switch_at": 2, "batch_size": 25},
    "lars": {"clip_history": 3},
}


@pytest.mark.parametrize("rule", RUNS)
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, rule):
    changes = {"optimizer": rule, "lr": None, "fingerprint_every": 1, "log_every": 1, **RUNS[rule]}
    changes = {"steps": 6, **changes} if changes.get("recipe") != "sgd" else changes
    whole = train(options(tiny, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 4)
        train(options(tiny, tmp_path / "part", **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    states = [run.folder.load() for run in (resumed, whole)]
    records = [fingerprint(state) for state in states]
    assert records[0] == records[1]
    kept = {name.partition(" ")[2] for name in groups(states[0])["momentum"]}
    own = {"adam": {"exp_avg", "exp_avg_sq", "step"}, "rmsprop": {"", "square_avg", "step"},
           "sign": set(), "normalized": set(), "lars": {""}}  # fmt: skip
    own |= {"adamw": own["adam"], "muon": own["adam"] | {""}}
    assert kept == own[rule]
    assert tiny_runs.metrics(resumed.folder) == tiny_runs.metrics(whole.folder)
    for row in whole.folder.read_metrics():
        assert row["gradient_norm"] > 0 and 0 < row["clip"] <= 1
    plain = train(options(tiny, tmp_path / "plain", **changes | {"optimizer": "sgd", "lr": 0.1}
                          | {n: None for n in OWN if n in changes}))  # fmt: skip
    assert plain.summary["test_loss"] != whole.summary["test_loss"]


@pytest.mark.parametrize("rule", ONE_GRADIENT)
def test_a_step_is_that_of_the_clipped_gradient(tiny, rule):
    """The metrics have the norm before clipping, and the rule sees the gradient after."""
    bound = 0.01
    trainer = trainer_of(tiny, "fb", optimizer=rule, max_norm=bound)
    torch.manual_seed(0)
    free = trainer_of(tiny, "fb", optimizer=rule)
    trainer.take_step()
    grads = [p.grad.clone() for p in trainer.model.parameters()]
    free.closure()
    full = [p.grad for p in free.model.parameters()]
    norm = torch.cat([g.flatten() for g in full]).norm()
    record = trainer.record()
    assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert record["clip"] == pytest.approx(bound / norm.item(), rel=1e-4)
    if rule != "sgd":  # whose kernel clips within its step
        for g, whole in zip(grads, full, strict=True):
            torch.testing.assert_close(g, whole * record["clip"], rtol=1e-4, atol=1e-9)


def test_the_penalty_follows_the_rate_of_every_rule(tiny):
    for rule in ONE_GRADIENT:
        trainer = trainer_of(tiny, optimizer=rule, penalty=0.5)
        penalty = trainer.closure.penalty
        now = trainer.optimizer.param_groups[0]["lr"]
        assert now == trainer.options.lr / 2  # in the first of two passes of warm-up
        assert penalty.coefficient_at(0, trainer.optimizer) == pytest.approx(now * 0.5 / 4)


@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop", "lars"])
def test_sharpness_is_logged_with_a_threshold_where_one_is_known(tiny, tmp_path, capsys, rule):
    run = train(options(tiny, tmp_path / "run", "fb", optimizer=rule, steps=2, track="sharpness"))
    row = run.folder.read_metrics()[-1]
    note = "note: no threshold of stability is known for --optimizer lars, so none is logged"
    assert (note in capsys.readouterr().out) == (rule == "lars")
    found = {name for name in row if "sharpness" in name}
    if rule == "lars":
        assert found == {"sharpness", "sharpness_residual"}
        return
    seen = "sharpness" if rule == "sgd" else "preconditioned_sharpness"
    assert found == {seen, f"{seen}_residual", "sharpness_threshold"}
    reach = {"sgd": 3.8 / 2.8, "adam": 38, "rmsprop": 2}[rule]
    decay = 5e-4 if rule == "sgd" else 0
    assert row["sharpness_threshold"] == pytest.approx(reach / row["lr"] - decay)
    assert row[seen] > 0


def test_no_threshold_for_units_that_are_clipped_each_on_its_own(tiny, tmp_path, capsys):
    wanted = options(tiny, tmp_path / "run", "fb", optimizer="adam", steps=1, track="sharpness")
    run = train(replace(wanted, agc=0.1))
    row = run.folder.read_metrics()[-1]
    assert "sharpness" in row and "sharpness_threshold" not in row
    assert "is known for --agc, so none is logged" in capsys.readouterr().out


def test_analysis_of_a_run(tiny, tmp_path, capsys):
    """The Hessian's own eigenvalues of each, and a threshold on the eigenvalue that it is of."""
    rules = {"adam": {"clip_history": 2, "norm_type": "inf"}, "lars": {}, "muon": {}}
    for rule, changes in rules.items():
        train(options(tiny, tmp_path / rule, "fb", optimizer=rule, lr=None, **changes))
    words = ["--measures", "gradient", "sharpness", "--eigenvalues", "1", "--train-steps", "1"]
    runs = [str(tmp_path / rule) for rule in rules]
    assert cli.main(["analyze", *runs, "--out", str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr().out
    measures = json.loads((tmp_path / "out" / "results.json").read_text())["measures"]
    found = {name.partition(",")[0]: values for name, values in measures["sharpness"].items()}
    angles = {n.partition(",")[0]: v["momentum_angle"] for n, v in measures["gradient"].items()}
    assert angles["lars"] is None and 0 < angles["adam"] < 90 and 0 < angles["muon"] < 90
    assert all(values["threshold"] is None for values in found.values())
    seen = found["adam"].pop("preconditioned")
    assert not any("preconditioned" in values for values in found.values())
    trainer = trainer_of(tiny, "fb", optimizer="adam", lr=None, **rules["adam"])
    trainer.load_state_dict(format.read(tmp_path / "adam" / "checkpoint-12.pt"))
    objective = training_loss(trainer)
    norm = float(objective.gradient().abs().max())
    clip = min(1.0, float(trainer.grad_transform.bound()) / norm)
    assert seen["clip"] == pytest.approx(clip, rel=1e-4)
    exact = PreconditionedHessian(objective, trainer.optimizer, clip=seen["clip"])
    assert seen["threshold"] == pytest.approx(exact.threshold.value)
    value = eigenpairs(exact, 1).values[0]
    assert seen["eigenvalues"] == [pytest.approx(value, rel=1e-3)]
    assert f"preconditioned as by adam {seen['eigenvalues'][0]:.4g}; steps are stable" in printed
    assert printed.count("no threshold of stability is known for this run's steps") == 2


class NoReads(TorchDispatchMode):
    """Refuses to read a tensor's value on the host, for which a GPU would have to be waited."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [SignDescent, NormalizedGD, LARS, Muon])
def test_no_step_reads_a_value_on_the_host(kind):
    weight, bias = (nn.Parameter(t.float()) for t in tensors(0, (4, 3, 3), (4,)))
    matrices = {"matrices": True} if kind is Muon else {}
    optimizer = kind([{"params": [weight], **matrices}, {"params": [bias]}], lr=0.1)
    history = ClipHistory(2, weight)
    for p in (weight, bias):
        p.grad = torch.ones_like(p)
    with NoReads():
        history.add(weight.grad.norm())
        assert isinstance(history.bound(), torch.Tensor)
        if kind is not Muon:  # on the CPU torch's fused AdamW reads its step
            optimizer.step()
        else:
            optimizer._step_matrices([weight], {"lr": 0.1})
    assert float(history.bound()) == pytest.approx(6.0)
