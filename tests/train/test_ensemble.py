"""Many networks trained at once, against the same runs alone: numbers, folders, what is refused."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import nn

from fbopt.train import loop, train, train_many
from fbopt.train.__main__ import main
from fbopt.train.analyze.__main__ import main as analyze
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.ensemble import kind
from fbopt.train.ensemble.ensemble import Ensemble
from fbopt.train.ensemble.gradient import Stack, StackedGradient
from fbopt.train.ladder.__main__ import main as ladder
from fbopt.train.loop import Result
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Diverged


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_runs.data(tmp_path_factory.mktemp("data"))


def of(tiny: str, out: Path, recipe: str = "fb", **changes) -> Options:
    """Eight steps of a small perceptron in float64, in chunks of 32, 32 and 11."""
    common = {"model": "mlp", "width": 6, "steps": 8, "precision": "fp64", "processes": 1}
    return tiny_runs.options(tiny, out, recipe, **(common | changes))


def together_and_alone(base: Options, changes: list[dict], folder: Path):
    """The results of the same runs, trained at once and one by one."""
    many = [replace(base, out=folder / f"many{i}", **c) for i, c in enumerate(changes)]
    alone = [
        replace(base, accumulation="float32", out=folder / f"alone{i}", **c)
        for i, c in enumerate(changes)
    ]
    return train_many(many), [train(one) for one in alone]


def assert_same(found: list, expected: list, tolerance: float = 1e-9) -> None:
    """Assert the same parameters, momentum and records, to rounding."""
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        rows, others = (tiny_runs.metrics(run.folder) for run in (a, b))
        assert [list(row) for row in rows] == [list(row) for row in others]
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, rel=1e-7, abs=1e-12)
        states = [run.folder.read_checkpoint(8) for run in (a, b)]
        assert [set(state) for state in states] == [set(states[1])] * 2
        assert torch.equal(states[0]["rng"], states[1]["rng"])
        assert states[0]["closure"]["step"] == states[1]["closure"]["step"] == 8
        momenta = [state["optimizer"]["state"] for state in states]
        assert list(momenta[0]) == list(momenta[1])
        for i, kept in momenta[1].items():
            torch.testing.assert_close(momenta[0][i], kept, rtol=tolerance, atol=tolerance)


KINDS = {
    "plain": ("fb", {}),
    "clip": ("fb-clip", {"max_norm": 0.05}),
    "clip by the largest": ("fb-clip", {"max_norm": 0.05, "norm_type": "inf"}),
    "forward": ("fb-penalty", {"radius": 1e-3}),
    "central": ("fb-penalty", {"method": "central"}),
    "half a radius": ("fb-penalty", {"method": "central", "central_radius": "half"}),
    "norm": ("fb-clip", {"perturbation": "gnp", "penalty": 0.1}),
    "sam": ("fb-sam", {"rho": 0.1, "sam_share": 0.7}),
    "sam, central": ("fb-sam", {"method": "central"}),
    "chunk norms": ("fb", {"chunk_norms": True}),
    "no momentum": ("fb", {"momentum": 0.0, "nesterov": False}),
    "heavy ball": ("fb", {"nesterov": False, "weight_decay": 0.1}),
    "decay of weights": ("fb", {"decay": "weights", "weight_decay": 0.1}),
    "smoothing": ("fb", {"label_smoothing": 0.1, "smoothing": "others"}),
    "wrong ones alone": ("fb", {"loss": "misclassified"}),
    "squared": ("fb", {"loss": "squared"}),
    "steps of the rate": ("fb", {"schedule": "step", "milestones": "0.3,0.6", "cosine": None}),
    "rate from zero": ("fb-penalty", {"first_rate": "zero", "floor": 0.2}),
    "dropped rest": ("fb-penalty", {"last_chunk": "drop"}),
    "shuffled": ("fb-penalty", {"chunks": "shuffled"}),
    "replacement": ("fb", {"chunks": "replacement"}),
    "chunks at once": ("fb-penalty", {"chunk_size": 10, "vectorize": 3}),
    "shuffled at once": ("fb-penalty", {"chunk_size": 10, "vectorize": 3, "chunks": "shuffled"}),
    "cnn": ("fb-penalty", {"model": "cnn", "width": 3}),
}


@pytest.mark.parametrize("name", KINDS)
def test_members_are_those_of_runs_alone(tiny, tmp_path, name):
    recipe, changes = KINDS[name]
    found, expected = together_and_alone(
        of(tiny, tmp_path, recipe, **changes), [{"seed": 0}, {"seed": 3}], tmp_path
    )
    assert_same(found, expected)
    assert found[0].summary["loss"] != found[1].summary["loss"]


def test_networks_with_group_norm_are_trained_at_once(tiny, tmp_path):
    base = of(tiny, tmp_path, model="resnet20", width=32, norm="group", steps=1, samples=4)
    found, expected = together_and_alone(base, [{"seed": 0}, {"seed": 1}], tmp_path)
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_members_differ_in_numbers(tiny, tmp_path):
    changes = [
        {"lr": 0.1, "penalty": 0.5, "warmup": 0},
        {"lr": 0.3, "penalty": 0.0, "max_norm": 0.1},
        {"momentum": 0.0, "schedule": "constant", "cosine": None, "seed": 5, "weight_decay": 0.0},
        {"perturbation": "sam", "recipe": "fb-clip", "rho": 0.2, "nesterov": False},
        {"radius": 0.1, "max_norm": math.inf, "decay": "weights", "eval_every": 3},
    ]
    found, expected = together_and_alone(of(tiny, tmp_path, "fb-penalty"), changes, tmp_path)
    assert_same(found, expected)
    options = [json.loads(run.folder.options.read_text()) for run in (*found, *expected)]
    for one, other in zip(options[:5], options[5:], strict=True):
        differing = {name for name in one if one[name] != other[name]}
        assert differing == {"out"}


def test_float32_is_the_same_to_rounding_from_the_same_bits(tiny, tmp_path):
    base = of(tiny, tmp_path, "fb-penalty", precision="fp32", fingerprint_every=1)
    found, expected = together_and_alone(base, [{"seed": s} for s in range(3)], tmp_path)
    for a, b in zip(found, expected, strict=True):
        first, other = (r.folder.fingerprints.read_text().splitlines()[0] for r in (a, b))
        assert first == other  # of the initial weights
        for one, two in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_each_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.functional.cross_entropy
    input = torch.randn(2, 6, 5, dtype=torch.float64)  # two chunks
    target = torch.randint(0, 3, (2, 6))
    stacked = StackedGradient(model, partial(loss, reduction="none"))
    points = torch.randn(3, 2, 4 * 5 + 4 + 3 * 4 + 3, dtype=torch.float64)
    found = stacked(points, Stack(input, target, shared=True))
    for k in range(3):
        for v in range(2):
            p = points[k, v].clone().requires_grad_()
            parts = stacked.model.named(p)
            hidden = torch.tanh(input[v] @ parts["1.weight"].T + parts["1.bias"])
            logits = hidden @ parts["3.weight"].T + parts["3.bias"]
            value = loss(logits, target[v])
            torch.testing.assert_close(found.losses[k, v], value.detach())
            torch.testing.assert_close(found.grads[k, v], torch.autograd.grad(value, p)[0])
            assert found.correct[k, v] == (logits.argmax(1) == target[v]).sum()


def test_compiled_passes_are_the_same(tiny, tmp_path, monkeypatch):
    compile, calls = torch.compile, []

    def traced(function, **options):  # inductor takes most of a minute
        calls.append(options)
        return compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    base = of(tiny, tmp_path, "fb-penalty", steps=3, samples=32)
    plain = train_many([replace(base, seed=s, out=tmp_path / f"p{s}") for s in range(2)])
    compiled = train_many(
        [replace(base, seed=s, out=tmp_path / f"c{s}", compile=True) for s in range(2)]
    )
    assert calls == [{"fullgraph": True, "dynamic": False}]
    for a, b in zip(plain, compiled, strict=True):
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_one_that_diverges_does_not_stop_the_others(tiny, tmp_path, capsys):
    base = of(tiny, tmp_path, "fb", steps=30, save_every=1, activation="relu", momentum=0.9)
    rates = (0.1, 1e200, 0.2)
    many = [replace(base, lr=lr, out=tmp_path / f"m{i}") for i, lr in enumerate(rates)]
    found = train_many(many)
    assert isinstance(found[1], Diverged) and not (tmp_path / "m1" / "result.json").exists()
    with pytest.raises(Diverged) as alone:
        train(replace(base, lr=1e200, accumulation="float32", out=tmp_path / "alone"))
    assert str(found[1]) == str(alone.value)
    assert f"m1: {found[1]}" in capsys.readouterr().err
    records = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("m1", "alone")]
    assert records[0].count("\n") == records[1].count("\n")
    for i in (0, 2):
        one = train(replace(many[i], accumulation="float32", out=tmp_path / f"a{i}"))
        for p, q in zip(found[i].model.parameters(), one.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def interrupt_after(patch: pytest.MonkeyPatch, step: int) -> None:
    take_step = Ensemble.take_step

    def interrupted(ensemble: Ensemble) -> None:
        take_step(ensemble)
        if ensemble.members[0].step == step:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Ensemble, "take_step", interrupted)


def test_interrupted_runs_go_on_together_or_alone(tiny, tmp_path, capsys):
    base = of(tiny, tmp_path, "fb-penalty")
    whole = train_many([replace(base, seed=s, out=tmp_path / f"w{s}") for s in range(3)])
    parts = [replace(base, seed=s, out=tmp_path / f"p{s}") for s in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted, match=r"saved at step 5 of 8 .3 runs.; go on with"):
            train_many(parts)
    alone = train(Options(resume=tmp_path / "p1"))
    assert alone.summary["step"] == 8
    assert "kernels stacked before" in capsys.readouterr().out
    stamp = (tmp_path / "p1" / "result.json").stat().st_mtime_ns
    found = train_many([replace(one, resume="auto") for one in parts])
    assert (tmp_path / "p1" / "result.json").stat().st_mtime_ns == stamp
    assert "p1/ is finished" in capsys.readouterr().out
    for a, b in zip(found, whole, strict=True):
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert [r["step"] for r in tiny_runs.metrics(a.folder)] == list(range(1, 9))


def test_the_same_runs_go_on_with_the_same_bits(tiny, tmp_path):
    base = of(tiny, tmp_path, "fb-penalty", precision="fp32")
    whole = train_many([replace(base, seed=s, out=tmp_path / f"w{s}") for s in range(2)])
    parts = [replace(base, seed=s, out=tmp_path / f"p{s}") for s in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            train_many(parts)
    found = train_many([replace(one, resume="auto") for one in parts])
    for a, b in zip(found, whole, strict=True):
        assert tiny_runs.digest(a.model) == tiny_runs.digest(b.model)
        assert tiny_runs.metrics(a.folder) == tiny_runs.metrics(b.folder)


def test_runs_at_different_steps_are_resumed(tiny, tmp_path):
    base = of(tiny, tmp_path, "fb", save_every=2)
    runs = [replace(base, seed=s, out=tmp_path / f"s{s}") for s in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            train_many(runs)
    (tmp_path / "s1" / "checkpoint-4.pt").unlink()
    found = train_many([replace(one, resume="auto") for one in runs])
    whole = train_many([replace(one, out=tmp_path / f"w{one.seed}") for one in runs])
    for a, b in zip(found, whole, strict=True):
        assert a.summary["step"] == 8
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


REFUSED = {
    "recipe": ({"recipe": "sgd", "steps": None, "chunk_size": None, "epochs": 3}, "--recipe sgd"),
    "accumulation": ({"accumulation": "exact"}, "--accumulation exact"),
    "augment": ({"augment": "random"}, "--augment random"),
    "dropout": ({"dropout": 0.5}, "--dropout 0.5"),
    "optimizer": ({"optimizer": "adam", "lr": None}, "--optimizer adam"),
    "line search": ({"line_search": "armijo"}, "--line-search armijo"),
    "exact": ({"recipe": "fb-penalty", "method": "exact"}, "--method exact"),
    "asam": ({"recipe": "fb-asam"}, "--perturbation asam"),
    "full": ({"recipe": "fb-sam", "scope": "full"}, "--scope full"),
    "whole": ({"recipe": "fb-penalty", "full_penalty": 0.5}, "--full-penalty 0.5"),
    "chunk clip": ({"chunk_max_norm": 1.0}, "--chunk-max-norm 1.0"),
    "agc": ({"agc": 0.1}, "--agc 0.1"),
    "history": ({"clip_history": 5}, "--clip-history 5"),
    "ema": ({"ema": 0.9}, "--ema 0.9"),
    "noise": ({"additive_noise": 0.1}, "--additive-noise 0.1"),
    "norm bias": ({"norm_bias": 0.1}, "--norm-bias 0.1"),
    "fitted": ({"stop_fitted": 2}, "--stop-fitted 2"),
    "mean": ({"mean": "running"}, "--mean running"),
    "bf16": ({"precision": "bf16"}, "--precision bf16"),
    "processes": ({"processes": 2}, "--processes 2"),
    "switch": ({"switch_at": 2}, "--switch-at 2"),
    "batchnorm": ({"model": "resnet20"}, "--model resnet20: has BatchNorm"),
    "value": ({"lr": -1.0}, "--lr -1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_at_once_is_refused(tiny, tmp_path, name):
    changes, words = REFUSED[name]
    base = replace(of(tiny, tmp_path), **changes)
    with pytest.raises(OptionsError, match=words):
        train_many([replace(base, seed=s, out=tmp_path / f"s{s}") for s in range(2)])
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".npz"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 7}, "--width 6 and 7: networks that are trained at once share it"),
        ({"steps": 9}, "--steps 8 and 9"),
        ({"chunk_size": 16}, "--chunk-size 32 and 16"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.0 and 0.1"),
        ({"activation": "tanh"}, "--activation relu and tanh"),
        ({"recipe": "fb-sam", "method": "central"}, "--method central and forward"),
        ({"out": "s0"}, "2 runs would write it"),
    ],
)
def test_what_the_networks_share_has_to_be_the_same(tiny, tmp_path, changes, words):
    base = of(tiny, tmp_path / "s0", "fb-penalty")
    if "out" in changes:
        changes = {"out": tmp_path / "s0"}
    with pytest.raises(OptionsError, match=words):
        train_many([base, replace(base, **({"seed": 1, "out": tmp_path / "s1"} | changes))])
    assert not list(tmp_path.iterdir())


def test_no_options_and_torchrun_are_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(OptionsError, match="those of one run"):
        train_many([])
    monkeypatch.setattr(kind, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(OptionsError, match="without torchrun"):
        train_many([of(tiny, tmp_path / "run")])


def test_a_run_that_is_there_is_kept(tiny, tmp_path):
    base = of(tiny, tmp_path / "s1")
    train_many([base])
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_many([replace(base, out=tmp_path / "s0"), base])
    assert not (tmp_path / "s0").exists()
    (again,) = train_many([replace(base, overwrite=True, steps=2, cosine=None, warmup=None)])
    assert again.summary["step"] == 2


def test_threads_are_torchs_choice_and_exactness_is_not_assumed(tiny, tmp_path):
    (one,) = train_many([replace(of(tiny, tmp_path / "s"), threads=None)])
    assert one.options.threads is None and one.options.accumulation == "float32"
    assert resolve(replace(of(tiny, tmp_path / "s"), threads=None)).threads == 1


def test_tracked_measures_are_of_each_network(tiny, tmp_path):
    base = of(tiny, tmp_path, "fb", track="sharpness,noise", every=8)
    found, expected = together_and_alone(base, [{"seed": 1}, {"seed": 2}], tmp_path)
    for a, b in zip(found, expected, strict=True):
        rows = [[r for r in tiny_runs.metrics(x.folder) if "sharpness" in r] for x in (a, b)]
        assert len(rows[0]) == 2
        for row, other in zip(*rows, strict=True):
            assert row == pytest.approx(other, rel=1e-4)


def test_the_command_line_trains_and_others_read_the_folders(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--model", "mlp", "--width", "6", "--steps", "6", "--threads", "1"]
    words += ["--recipe", "fb-clip", "--chunk-size", "32"]
    out = tmp_path / "ladder"
    assert main([*words, "--seeds", "0-1", "--out", str(out), "--chunk-norms"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["fb-clip-s0", "fb-clip-s1"]
    assert "fb-clip-s1/: test accuracy" in capsys.readouterr().out
    common = [*words[:8], "--chunk-size", "32", "--accumulation", "float32", "--out", str(out)]
    assert (
        ladder(["--rows", "fb-clip", "--seeds", "2", "--jobs", "1", *common, "--threads", "1"]) == 0
    )
    assert "2 runs, 2 of them finished" in capsys.readouterr().out
    measured = tmp_path / "measured"
    assert analyze([str(out / "fb-clip-s0"), "--out", str(measured), "--measures", "gradient"]) == 0


def test_the_command_line_says_what_diverged(tiny, tmp_path, capsys):
    words = ["--data", tiny, "--model", "mlp", "--width", "6", "--steps", "20", "--recipe", "fb"]
    words += ["--chunk-size", "32", "--threads", "1", "--out", str(tmp_path / "runs")]
    assert main([*words, "--grid", "lr=0.1,1e30"]) == 1
    said = capsys.readouterr().err
    assert "fb-lr=1e+30-s0: the loss became infinite" in said and "1 of 2 runs diverged" in said
    assert (tmp_path / "runs" / "fb-lr=0.1-s0" / "result.json").exists()
    assert main([*words, "--grid", "width=4,8"]) == 2
    assert "give one value for all" in capsys.readouterr().err


def test_results_are_in_the_order_of_the_options(tiny, tmp_path):
    base = of(tiny, tmp_path, steps=1)
    found = train_many([replace(base, seed=s, out=tmp_path / f"s{s}") for s in (3, 1, 2)])
    assert [run.options.seed for run in found] == [3, 1, 2]
    assert all(isinstance(run, Result) for run in found)
    for p in found[0].model.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes  # not the whole ensemble's
