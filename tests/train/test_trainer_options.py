"""Options that are off by default: their equations, and resuming a run that has them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import digest, interrupt_after, options, trainer_of
from torch import nn

from fbopt.train import loop
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import SPEED, resolve
from fbopt.train.data.dataset import Split
from fbopt.train.data.load import load
from fbopt.train.evaluate import evaluate, moving_average
from fbopt.train.grad_transforms import GradientTransform
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def test_moving_average():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = moving_average(model, 0.75)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    model(torch.randn(5, 2))
    average.update_parameters(model)
    for name, mean in average.module.state_dict().items():
        now = model.state_dict()[name]
        expected = 0.75 * first[name] + 0.25 * now if now.is_floating_point() else now
        torch.testing.assert_close(mean, expected)
    assert int(average.module[1].num_batches_tracked) == 1


def test_the_average_is_what_is_evaluated(tiny):
    trainer = trainer_of(tiny, ema=0.9, steps=3)
    for _ in range(3):
        trainer.take_step()
    with torch.no_grad():
        for p in trainer.average.module.parameters():
            p.zero_()
    assert trainer.record(["test"])["test_loss"] == pytest.approx(math.log(3), rel=1e-6)
    assert trainer.record(["test"])["loss"] != pytest.approx(math.log(3), rel=1e-6)


def test_only_weights_decay(tiny):
    wanted = tiny_runs.with_noise(tiny, Path("never written"), "fb", decay="weights")
    trainer = Trainer(resolve(wanted), load(tiny), torch.device("cpu"))
    modules = dict(trainer.model.named_modules())
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"]
              for group in trainer.optimizer.param_groups for p in group["params"]}  # fmt: skip
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        layer, kind = name.rsplit(".", 1)
        norm = isinstance(modules[layer], torch.nn.BatchNorm2d)
        assert decay == (0 if norm or kind == "bias" else 5e-4), name


def test_label_smoothing_is_for_training_only(tiny):
    wanted = options(tiny, Path("never written"), "fb", label_smoothing=0.2)
    trainer = Trainer(resolve(wanted), load(tiny), torch.device("cpu"))
    x, y = trainer.data.train.batch(slice(None))
    logits = trainer.model(x)
    target = torch.nn.functional.one_hot(y, 3) * 0.8 + 0.2 / 3
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(trainer.closure(), expected.detach(), rtol=1e-5, atol=1e-6)
    logits = trainer.model(trainer.data.test.batch(slice(None))[0])
    plain = torch.nn.functional.cross_entropy(logits, trainer.data.test.y)
    trainer.gradient_norm = torch.zeros(())
    assert trainer.record(["test"])["test_loss"] == pytest.approx(plain.item(), rel=1e-5)


def test_flips_at_test_time(tiny):
    wanted = options(tiny, Path("never written"), "fb")
    trainer = Trainer(resolve(wanted), load(tiny), torch.device("cpu"))
    test = trainer.data.test
    with torch.no_grad():
        mean = (trainer.model(test.x).softmax(1) + trainer.model(test.x.flip(3)).softmax(1)) / 2
    accuracy, loss = evaluate(trainer.model, test, size=7, flip=True)
    assert accuracy == (mean.argmax(1) == test.y).double().mean().item()
    assert loss == pytest.approx(float(-mean.log()[range(30), test.y].mean()), rel=1e-5)
    mirrored = Split(test.x.flip(3), test.y)
    assert evaluate(trainer.model, mirrored, flip=True)[1] == pytest.approx(loss, rel=1e-6)
    assert evaluate(trainer.model, test)[1] != pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("target", [0.5, 4.0])  # both sides of the norm
def test_norm_bias_is_the_gradient_of_what_it_says(tiny, power, target):
    trainer = trainer_of(tiny, norm_bias=0.3, norm_bias_power=power, norm_bias_target=target)
    params = list(trainer.model.parameters())
    excess = sum(p.square().sum() for p in params) - target**2
    loss = 0.3 * (excess.abs() if power == 1 else excess.square() / 2)
    expected = torch.autograd.grad(loss, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    free = replace(trainer.options, max_norm=None)
    norm = GradientTransform(params, free)(0)
    for p, g in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in expected]).norm())


def test_noise_follows_clipping_and_the_step_alone(tiny):
    def grads(step=0, **changes):
        trainer = trainer_of(tiny, **changes)
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p)
        torch.rand(int(step) + 3)  # other draws in between change nothing
        GradientTransform(list(trainer.model.parameters()), trainer.options)(step)
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    count = len(grads())
    clipped = 0.25 / math.sqrt(count)
    added = grads(additive_noise=0.1) - clipped
    assert added.std().item() == pytest.approx(0.1, rel=0.2) and abs(added.mean()) < 0.03
    factor = grads(multiplicative_noise=0.1) / clipped
    assert factor.std().item() == pytest.approx(0.1, rel=0.2)
    assert factor.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(grads(additive_noise=0.1), grads(additive_noise=0.1))
    assert not torch.equal(grads(1, additive_noise=0.1), grads(2, additive_noise=0.1))
    assert not torch.equal(grads(additive_noise=0.1), grads(additive_noise=0.1, seed=1))


def test_chunk_norms_are_logged_and_change_nothing(tiny, tmp_path):
    for recipe in ("sgd", "fb", "fb-penalty"):
        plain = train(options(tiny, tmp_path / recipe, recipe))
        noted = train(options(tiny, tmp_path / f"{recipe}-noted", recipe, chunk_norms=True))
        assert digest(plain.model) == digest(noted.model)
        for record in noted.folder.read_metrics():
            # The mean square of norms is at least the square of the norm of the mean.
            assert record["mean_squared_chunk_norm"] > 0
            if recipe == "fb":
                assert record["mean_squared_chunk_norm"] >= 0.999 * record["gradient_norm"] ** 2


def test_stop_when_fitted(tiny, tmp_path, capsys):
    changes = {"lr": 0.3, "steps": 200, "cosine": 300, "width": 8, "log_every": 1}
    whole = train(options(tiny, tmp_path / "whole", "fb-clip", **changes))
    right = [record["train_accuracy"] == 1 for record in whole.folder.read_metrics()]
    end = next(n for n in range(3, 201) if all(right[n - 3 : n]))
    early = train(options(tiny, tmp_path / "early", "fb-clip", **changes, stop_fitted=3))
    assert early.summary["step"] == end < 200 and "test_accuracy" in early.summary
    again = options(tiny, tmp_path / "early", "fb-clip", **changes, stop_fitted=3)
    train(replace(again, resume="auto"))
    assert "is finished" in capsys.readouterr().out


def test_switch_from_stochastic_to_full_batch(tiny, tmp_path):
    common = {"warmup": 2, "cosine": 16, "log_every": 1}
    mixed = options(tiny, tmp_path / "mixed", "fb-penalty", switch_at=4, batch_size=16, **common)
    records = train(mixed).folder.read_metrics()
    assert [r["pass"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records] == [5, 10, 15, 20, *range(21, 29)]
    assert [r["gradient_evaluations"] for r in records] == [1, 2, 3, 4, *range(6, 22, 2)]
    assert ["mean_squared_chunk_norm" in r for r in records] == [False] * 4 + [True] * 8
    sgd = train(options(tiny, tmp_path / "sgd", "sgd", max_norm=0.25, **common))
    for a, b in zip(records[:4], sgd.folder.read_metrics()[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["lr"] == b["lr"]


EXTRAS = {
    "switch, in an epoch": ({"switch_at": 4, "batch_size": 16}, 7),
    "switch, at its end": ({"switch_at": 4, "batch_size": 16}, 20),
    "switch, after it": ({"switch_at": 4, "batch_size": 16}, 23),
    "average": ({"ema": 0.8}, 5),
    "noise": ({"additive_noise": 0.01, "multiplicative_noise": 0.1, "norm_bias": 0.01}, 5),
    "chunks": ({"chunk_max_norm": 0.2, "chunk_norms": True}, 5),
    "bf16": ({"precision": "bf16", "model": "resnet18"}, 5),
    "chunks at once": ({"vectorize": 2, "model": "resnet18", "width": 2, "dropout": 0.3}, 5),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, case):
    changes, stop = EXTRAS[case]
    whole = train(options(tiny, tmp_path / "whole", **changes))
    plain = train(options(tiny, tmp_path / "plain", **({"model": changes.get("model")})))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, stop)
        train(options(tiny, tmp_path / "part", **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)
    first, second = ({**r.summary, "seconds": 0} for r in (resumed, whole))
    assert first == second
    assert whole.summary["test_loss"] != plain.summary["test_loss"]


def test_precision_and_layout_change_bits_not_results(tiny):
    def losses(**changes):
        trainer = trainer_of(tiny, model="resnet18", **changes)
        for _ in range(3):
            trainer.take_step()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert all(s.dtype == torch.float32 for s in trainer.closure.sums.views)
        return trainer.record(["test"])

    plain = losses()
    for changes in ({"precision": "bf16"}, {"channels_last": False}):
        other = losses(**changes)
        assert other["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert other["test_loss"] == pytest.approx(plain["test_loss"], rel=0.1)
        if "precision" in changes:
            assert other["loss"] != plain["loss"]


@pytest.mark.parametrize("recipe", ["fb-clip", "fb-penalty", "fb-shuffled-aug"])
@pytest.mark.parametrize("count", [2, 100])
def test_chunks_at_once_are_worked_on_as_one_by_one(tiny, count, recipe):
    """Crops and flips, of which there are no others for groups, and BatchNorm included."""

    def after_three_steps(**changes):
        trainer = trainer_of(
            tiny, recipe, model="resnet18", width=2, chunk_size=16, chunk_norms=True, **changes
        )
        for _ in range(3):
            trainer.take_step()
        return trainer.record(["test"]) | {"seconds": 0}

    one_by_one, at_once = after_three_steps(), after_three_steps(vectorize=count)
    assert at_once == pytest.approx(one_by_one, rel=1e-3)


@pytest.mark.parametrize("augment", ["none", "random"])
@pytest.mark.parametrize("last", [True, False])
def test_images_lie_in_memory_as_asked(tiny, last, augment):
    chosen = resolve(
        options(tiny, Path("x"), model="resnet18", channels_last=last, augment=augment)
    )
    data = load(tiny).to("cpu", last)
    three = replace(data.train, x=data.train.x.repeat(1, 3, 1, 1))
    if last:
        three = three.to("cpu")
    image = Trainer(chosen, replace(data, train=three), torch.device("cpu")).chunks[0][0]
    assert image.is_contiguous(memory_format=torch.channels_last) == last
    assert image.is_contiguous() != last


@pytest.mark.parametrize("recipe", ["sgd", "fb-penalty"])
def test_defaults_of_a_device(monkeypatch, recipe):
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        o = resolve(Options(recipe=recipe))
        speed = SPEED["cuda" if cuda else "cpu"]
        graphs = speed["cuda_graph"] and recipe != "sgd"
        assert (o.precision, o.channels_last) == (speed["precision"], speed["channels_last"])
        assert (o.cuda_graph, o.compile) == (graphs, False)
        assert resolve(o) == o and o.as_json()["precision"] == o.precision
        if cuda:
            assert resolve(Options(recipe=recipe, device="cpu")).precision == "fp32"


BAD = {
    "graphs on the CPU": ({"cuda_graph": True, "device": "cpu"}, "--cuda-graph True is for CUDA"),
    "tf32 on the CPU": ({"precision": "tf32", "device": "cpu"}, "--precision tf32 is for CUDA"),
    "precision": ({"precision": "fp16"}, "--precision fp16: choose fp32, tf32, bf16"),
    "at once": ({"vectorize": 0}, "--vectorize 0: has to be at least 1"),
    "at once, sgd": ({"recipe": "sgd", "vectorize": 1}, "--vectorize is only for .*sgd has none"),
    "ema": ({"ema": 1.0}, "--ema 1.0: has to be at least 0 and below 1"),
    "noise": ({"additive_noise": -1.0}, "--additive-noise -1.0: has to be at least 0"),
    "noise, sgd": ({"recipe": "sgd", "additive_noise": 1.0}, "--additive-noise is only for a full"),
    "bias, sgd": ({"recipe": "sgd-aug", "norm_bias": 1.0}, "--norm-bias is only for a full-batch"),
    "bias alone": ({"norm_bias_target": 1.0}, "--norm-bias-target has no effect without"),
    "power": ({"norm_bias": 1.0, "norm_bias_power": 3}, "--norm-bias-power 3: choose 1, 2"),
    "chunks": ({"chunk_max_norm": 0.0}, "--chunk-max-norm 0.0: has to be above 0"),
    "chunks, sgd": ({"recipe": "sgd", "chunk_max_norm": 1.0}, "--chunk-max-norm.*use --max-norm"),
    "fitted": ({"stop_fitted": -1}, "--stop-fitted -1: has to be at least 0"),
    "switch, sgd": ({"recipe": "sgd", "switch_at": 3}, "--switch-at is only for a full-batch"),
    "switch, late": ({"switch_at": 1000}, "--switch-at 1000: has to be below --steps 1000"),
    "batch, no switch": ({"batch_size": 3}, "--batch-size is only for"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    changes, message = BAD[case]
    with pytest.raises(OptionsError, match=message):
        resolve(Options(**changes))


def test_a_switch_takes_its_mini_batches_from_the_baseline():
    assert resolve(Options(switch_at=3)).batch_size == 100
    assert resolve(Options(data="cifar10", switch_at=3)).batch_size == 128
    assert resolve(Options(switch_at=3, batch_size=7)).batch_size == 7


@pytest.fixture
def compiled(monkeypatch) -> list[Any]:
    """What torch.compile is given: traced and differentiated as ever, without code generation."""
    compile, given = torch.compile, []

    def quickly(function, *, fullgraph=False, backend=None):
        given.append(function)
        return compile(function, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quickly)
    return given


@pytest.mark.parametrize(
    "changes", [{}, {"vectorize": 2}, {"method": "exact"}, {"ema": 0.5}], ids=str
)
def test_compiled_passes(tiny, tmp_path, compiled, changes):
    changes = {"steps": 2, "chunk_size": 25, "track": "sharpness", **changes}
    plain = train(options(tiny, tmp_path / "plain", **changes))
    assert not compiled
    fast = train(options(tiny, tmp_path / "fast", **changes, compile=True))
    assert compiled and fast.model not in compiled  # measured and evaluated as it is
    assert fast.folder.read_options()["compile"] is True
    for name in ("loss", "test_loss", "sharpness"):
        assert fast.summary[name] == pytest.approx(plain.summary[name], rel=1e-4)


def test_compiled_mini_batches(tiny, tmp_path, compiled):
    plain = train(options(tiny, tmp_path / "plain", "sgd", epochs=2))
    fast = train(options(tiny, tmp_path / "fast", "sgd", epochs=2, compile=True))
    assert compiled == [fast.model]
    assert fast.summary["loss"] == pytest.approx(plain.summary["loss"], rel=1e-4)


def test_mini_batches_and_chunks_are_compiled_in_turn(tiny, tmp_path, monkeypatch, compiled):
    changes = {"steps": 4, "switch_at": 2, "batch_size": 25, "chunk_size": 25, "compile": True}
    whole = train(options(tiny, tmp_path / "whole", **changes))
    model, *passes = compiled
    assert model is whole.model and passes
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "part", **changes))
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)


@pytest.mark.parametrize(("lr", "steps"), [(1e12, 1), (1e6, 1), (1e6, 2)])
def test_a_run_whose_last_losses_are_not_finite_or_huge_ends_with_them(tiny, tmp_path, lr, steps):
    wild = options(tiny, tmp_path / "run", "fb", lr=lr, steps=steps, warmup=0, width=2)
    loss = train(wild).summary["test_loss"]
    assert not loss < 1e15
    (tmp_path / "run" / "curves.png").unlink(missing_ok=True)
    again = train(replace(wild, resume="auto")).summary["test_loss"]
    assert again == loss or (again != again and loss != loss)
