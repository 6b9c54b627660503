"""The switches that follow the authors' released code, each alone and all together, against a
transcription of that code's loop in plain float64 torch.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import options
from torch import nn

from fbopt.train import build, models
from fbopt.train.batchnorm import EveryPass
from fbopt.train.config.as_released import SWITCHES
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.curvature import CurvatureTracker
from fbopt.train.data.load import load
from fbopt.train.precision import cross_entropy
from fbopt.train.trainer import Trainer

STEPS = 15
RELEASED = {name: switch.released for name, switch in SWITCHES.items()}
COMMON = {
    "model": "resnet18", "width": 2, "steps": STEPS, "warmup": 4, "cosine": 20, "lr": 0.4,
    "method": "central", "radius": 0.05, "penalty": 2.0, "label_smoothing": 0.2, "chunk_size": 20,
    "max_norm": 0.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    made = build.build_model
    monkeypatch.setattr(build, "build_model", lambda *args: made(*args).double())


def trainer_of(tiny: str, recipe: str = "fb-penalty", **changes) -> Trainer:
    chosen = resolve(options(tiny, Path("never written"), recipe, **changes))
    data = load(tiny)
    train, test = (replace(split, x=split.x.double()) for split in (data.train, data.test))
    return Trainer(chosen, replace(data, train=train, test=test), torch.device("cpu"))


class Transcription:
    """The released loop, with each of its peculiarities where `released` names it."""

    def __init__(self, model: nn.Module, x, y, released: set[str]) -> None:
        self.model, self.released = copy.deepcopy(model), released
        if "residual_init" in released:
            for block in self.model.modules():
                if hasattr(block, "bn2"):
                    nn.init.ones_(block.bn2.weight)
        size = COMMON["chunk_size"]
        chunks = list(zip(x.split(size), y.split(size), strict=True))
        ragged = len(chunks[-1][0]) < size
        self.chunks = chunks[:-1] if ragged and "last_chunk" in released else chunks
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            self.params, 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]

    def rate(self, step: int) -> float:
        warmup, cosine = COMMON["warmup"], COMMON["cosine"]
        if step < warmup:
            share = (step if "first_rate" in self.released else step + 1) / warmup
        else:
            share = (1 + math.cos(math.pi * (step - warmup) / cosine)) / 2
        return COMMON["lr"] * share

    def loss(self, x, y):
        logs, share = self.model(x).log_softmax(1), COMMON["label_smoothing"]
        classes = logs.shape[1]
        if "smoothing" in self.released:
            target = torch.full_like(logs, share / (classes - 1))
            target[range(len(y)), y] = 1 - share
        else:
            target = torch.full_like(logs, share / classes)
            target[range(len(y)), y] += 1 - share
        return -(target * logs).sum(1).mean()

    def gradient_at(self, x, y, shift=None):
        with torch.no_grad():
            saved = [p.clone() for p in self.params]
            for p, s in zip(self.params, shift or [], strict=False):
                p += s
        grads = torch.autograd.grad(self.loss(x, y), self.params)
        with torch.no_grad():
            for p, s in zip(self.params, saved, strict=True):
                p.copy_(s)
        return grads

    def statistics(self):
        return [t.clone() for m in self.norms for t in (m.running_mean, m.running_var)]

    def set_statistics(self, values) -> None:
        values = iter(values)
        for m in self.norms:
            m.running_mean.copy_(next(values))
            m.running_var.copy_(next(values))

    def penalised(self, x, y, g, strength: float):
        """Neither program needs the passes of a penalty of strength 0, and fbopt takes none."""
        far = COMMON["radius"] / (2 if "central_radius" in self.released else 1)
        norm = torch.sqrt(sum(t.square().sum() for t in g))
        plus = self.gradient_at(x, y, [far * t / norm for t in g])
        minus = self.gradient_at(x, y, [-far * t / norm for t in g])
        factor = strength * norm / (2 * far)
        return [a + factor * (p - q) for a, p, q in zip(g, plus, minus, strict=True)]

    def step(self, number: int) -> None:
        lr = self.rate(number)
        strength = lr * COMMON["penalty"] / 4
        count, total = len(self.chunks), sum(len(y) for _, y in self.chunks)
        mean = [torch.zeros_like(p) for p in self.params]
        every = "batchnorm" in self.released
        for m in self.norms:
            m.momentum = 0.1 if every else 1.0
        own = [torch.zeros_like(t) for t in self.statistics()]
        for x, y in self.chunks:
            g = self.gradient_at(x, y)
            recorded = self.statistics()
            for a, b in zip(own, recorded, strict=True):
                a += len(y) / total * b
            chunk = g if strength == 0 else self.penalised(x, y, g, strength)
            if not every:
                self.set_statistics(recorded)
            for avg, c in zip(mean, chunk, strict=True):
                if "mean" in self.released:
                    avg += (c - avg) / count
                else:
                    avg += len(y) / total * c
        if not every:
            self.set_statistics(own)
        for p, g in zip(self.params, mean, strict=True):
            p.grad = g
        self.norm = nn.utils.clip_grad_norm_(self.params, COMMON["max_norm"])
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


CASES = {"none": set(), **{name: {name} for name in SWITCHES}, "all": set(SWITCHES)}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_released_loop(tiny, case):
    released = CASES[case]
    changes = {"as_released": True} if case == "all" else {n: RELEASED[n] for n in released}
    trainer = trainer_of(tiny, **COMMON, **changes, accumulation="float32")
    assert {n for n in SWITCHES if getattr(trainer.options, n)} == released
    plain = trainer_of(tiny, **COMMON, accumulation="float32")
    split = trainer.data.train
    expected = Transcription(plain.model, split.x, split.y, released)
    scheduled = [trainer.optimizer.param_groups[0]["lr"]]
    for number in range(STEPS):
        trainer.take_step()
        trainer.scheduler.step()
        scheduled.append(trainer.optimizer.param_groups[0]["lr"])
        expected.step(number)
        assert float(trainer.gradient_norm) == pytest.approx(float(expected.norm), rel=1e-8)
    assert scheduled[:STEPS] == pytest.approx([expected.rate(n) for n in range(STEPS)], rel=1e-12)
    skipped = {k for k in trainer.model.state_dict() if k.endswith("num_batches_tracked")}
    if "mean" in released and "batchnorm" not in released:  # its statistics are weighted likewise
        skipped |= {k for k in trainer.model.state_dict() if "running" in k}
    for name, value in expected.model.state_dict().items():
        if name not in skipped:
            found = trainer.model.state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-10, msg=name)


def test_switches_dissolve_and_can_be_left_out():
    o = resolve(Options(data="cifar10", as_released=True, device="cpu"))
    found = {name: getattr(o, name) for name in SWITCHES}
    without_effect = {"central_radius": None, "smoothing": None}
    assert found == RELEASED | without_effect and not o.as_released
    assert resolve(o) == o and Options.from_json(o.as_json()) == o
    some = resolve(Options(data="cifar10", as_released=True, mean="samples", device="cpu"))
    assert some.mean is None and some.first_rate == "zero"
    sgd = resolve(Options(recipe="sgd", as_released=True))
    assert {n for n in SWITCHES if getattr(sgd, n)} == {"last_chunk", "first_rate"}
    plain = resolve(Options(mean="samples", batchnorm="mean", smoothing="all"))
    assert plain == resolve(Options())


REFUSED = {
    "mean": ({"recipe": "sgd", "mean": "running"}, "--mean running has no effect without chunks"),
    "residual": ({"residual_init": "one"}, "--residual-init one has no effect without a residual"),
    "rate": ({"first_rate": "zero", "warmup": 0}, "--first-rate zero has no effect.*--warmup 10"),
    "batchnorm": ({"batchnorm": "every-pass"}, "has no effect without BatchNorm"),
    "one pass": (
        {"batchnorm": "every-pass", "recipe": "sgd", "model": "resnet18"},
        r"has no effect without BatchNorm \(not ghost\) and several chunks or passes",
    ),
    "radius": ({"central_radius": "half"}, "without central differences; add --method central"),
    "smoothing": ({"smoothing": "others"}, "without label smoothing; add --label-smoothing"),
    "compiled": (
        {"batchnorm": "every-pass", "model": "resnet18", "compile": True},
        "--compile: --batchnorm every-pass does not see into a compiled pass",
    ),
    "at once": (
        {"batchnorm": "every-pass", "model": "resnet18", "vectorize": 4},
        "--vectorize: --batchnorm every-pass does not see into chunks at once",
    ),
    "processes": (
        {"batchnorm": "every-pass", "model": "resnet18", "processes": 2},
        "--processes 2: --batchnorm every-pass follows the passes of one process",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_switches_without_effect_are_refused(case):
    given, words = REFUSED[case]
    with pytest.raises(OptionsError, match=words):
        resolve(Options(**given))


def test_nothing_is_left_of_too_few_samples(tiny):
    with pytest.raises(OptionsError, match="leaves nothing of 75 samples in chunks of 80"):
        trainer_of(tiny, chunk_size=80, last_chunk="drop")


def test_a_dropped_chunk_counts_nowhere(tiny):
    trainer = trainer_of(tiny, chunk_size=32, last_chunk="drop")
    trainer.take_step()
    assert trainer.samples == len(trainer.chunks) * 32 == 64
    assert trainer.record()["train_accuracy"] <= 1
    sgd = trainer_of(tiny, "sgd", batch_size=32, last_chunk="drop", epochs=2)
    assert (len(sgd.batches), sgd.batches.samples, sgd.total_steps) == (2, 64, 4)


def test_exact_sums_that_visit_chunks_twice_follow_their_passes_once(tiny):
    """Exact sums take powers of two as units, and look for new ones where gradients grow."""
    found = []
    for accumulation in ("float32", "exact"):
        changes = {"batchnorm": "every-pass", "mean": "running", "accumulation": accumulation}
        trainer = trainer_of(tiny, **COMMON | changes)
        for _ in range(3):
            trainer.take_step()
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_branches_of_every_residual_network_start_at_one():
    for name in ("resnet18", "resnet50"):
        model = models.build(name, (3, 8, 8), 10, width=2)
        blocks = [m for m in model.modules() if hasattr(m, "downsample")]
        lasts = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks]
        assert all((m.weight == 0).all() for m in lasts) and len(lasts) in (8, 16)
        models.start_branches_at_one(model)
        assert all((m.weight == 1).all() for m in lasts)


def test_smoothing_over_the_others_of_any_share():
    output, target = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    goal = torch.full((5, 2), 0.95, dtype=torch.float64)
    goal[range(5), target] = 0.05
    expected = -(goal * output.log_softmax(1)).sum(1)
    for reduction, of in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        found = cross_entropy(output, target, 0.95, reduction, over_others=True)
        torch.testing.assert_close(found, of)


def test_statistics_of_passes_in_half_precision_are_of_float32(tiny):
    model = nn.BatchNorm1d(3)
    x = torch.randn(50, 3).bfloat16() + 100
    followed = EveryPass(model)
    with followed.following():
        model(x)
    assert followed._found[model][0].dtype == torch.float32
    expected = nn.BatchNorm1d(3)
    expected(x)
    torch.testing.assert_close(model.running_mean, expected.running_mean)
    torch.testing.assert_close(model.running_var, expected.running_var)


def test_the_threshold_of_stability_is_that_of_the_shorter_mean(tiny):
    """Steps that follow 0.68 of the gradient are stable to 1/0.68 of the curvature."""
    plain = {"lr": 0.1, "warmup": 0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    found = []
    for mean in ("samples", "running"):
        trainer = trainer_of(
            tiny, "fb", **plain, mean=mean, chunk_size=20, track="sharpness", every=1
        )
        trainer.take_step()
        tracker = CurvatureTracker(trainer)
        tracker.names = ("sharpness",)
        found.append(tracker.measure()["sharpness_threshold"])
    assert found == pytest.approx([2 / 0.1, 2 / 0.1 / (1 - 0.75**4)])


def test_passes_at_rate_zero_have_one_gradient(tiny):
    trainer = trainer_of(tiny, first_rate="zero", steps=4, cosine=2, warmup=1)
    for _ in range(4):  # at rates 0, all, half, 0
        trainer.take_step()
        trainer.scheduler.step()
    assert trainer.record()["gradient_evaluations"] == 1 + 2 + 2 + 1
