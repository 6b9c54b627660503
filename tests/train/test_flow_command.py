"""`fbopt flow`: the run's own steps again, a flow beside them, records and a figure."""

import json

import numpy as np
import pytest
import torch

from fbopt.train import Options, train
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.flow.__main__ import main
from fbopt.train.flow.beside import Beside, begin

PLAIN = {
    "data": "digits", "samples": 48, "recipe": "fb-long", "model": "mlp", "width": 4,
    "activation": "tanh", "chunk_size": 32, "momentum": 0.0, "nesterov": False,
    "weight_decay": 0.0, "schedule": "constant", "warmup": 0, "precision": "fp64", "threads": 1,
    "processes": 1, "steps": 12, "lr": 0.3, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(Options(**PLAIN, out=folder))
    return folder


def records(folder, kind):
    return [json.loads(line) for line in (folder / f"flow-{kind}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["gradient", "stable", "central"])
def test_descent_is_the_run_and_the_figure_is_drawn(run, tmp_path, kind, capsys):
    assert main([str(run), "--kind", kind, "--every", "5", "--out", str(tmp_path)]) == 0
    found = records(tmp_path, kind)
    assert [r["step"] for r in found] == [0, 5, 10, 12]
    logged = {r["pass"]: r["loss"] for r in RunFolder(run).read_metrics()}
    # The loss that a step logs is that before it; chunk sizes differ, so weights round.
    for record in found[:3]:
        assert record["loss"] == pytest.approx(logged[record["step"] + 1], rel=1e-12)
    assert found[0]["function_distance"] == found[0]["parameter_distance"] == 0
    assert 0 < found[-1]["function_distance"] < 0.1
    assert (tmp_path / f"flow-{kind}.png").stat().st_size > 10_000
    assert "flow" in capsys.readouterr().out


def test_distances_are_those_of_the_definition(run):
    beside = Beside(begin(run, "cpu"), "gradient", 2, 0.05)
    *_, last = beside.follow(3, 1)
    iterates = []  # of an independent loop in plain torch
    model = begin(run, "cpu").model
    data = torch.cat([x for x, _ in beside.descent.chunks])
    target = torch.cat([y for _, y in beside.descent.chunks])
    for _ in range(5):
        iterates.append(
            (model(data).detach(), torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        )
        loss = torch.nn.functional.cross_entropy(model(data), target)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.3 * g
    flow = beside.flow.objective
    outputs = flow.model(data).detach()
    theta = flow.theta()
    smooth = [(a + 2 * b + c) / 4 for a, b, c in zip(*iterates[2:5], strict=True)]
    for key, at in (("", iterates[3]), ("_smoothed", smooth)):
        rms, apart = (outputs - at[0]).square().mean().sqrt(), (theta - at[1]).norm()
        assert last[f"function_distance{key}"] == pytest.approx(float(rms), rel=1e-8)
        assert last[f"parameter_distance{key}"] == pytest.approx(float(apart), rel=1e-8)


def test_sharpness_is_the_dense_hessians(run):
    beside = Beside(begin(run, "cpu"), "gradient", 2, 0.05)
    first = next(beside.follow(1, 1))
    fresh = begin(run, "cpu").model
    data = torch.cat([x for x, _ in beside.descent.chunks])
    target = torch.cat([y for _, y in beside.descent.chunks])
    names = [n for n, _ in fresh.named_parameters()]
    shapes = [p.shape for p in fresh.parameters()]

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(fresh, values, (data,))
        return torch.nn.functional.cross_entropy(output, target)

    theta = torch.nn.utils.parameters_to_vector(fresh.parameters()).detach()
    dense = torch.autograd.functional.hessian(loss, theta)
    assert first["sharpness"] == pytest.approx(np.linalg.eigvalsh(dense.numpy())[-1], rel=1e-5)


@pytest.mark.parametrize("rule", [
    {"optimizer": "rmsprop", "alpha": 0.9},
    {"optimizer": "adam", "beta1": 0.0, "beta2": 0.9},
])  # fmt: skip
def test_rmsprop_some_steps_after_its_first(tmp_path, rule):
    """The flow begins at the run's weights and mean of squares, and is near the run for a while."""
    changes = {"optimizer": "sgd", "momentum": None, "nesterov": None, "lr": 1e-4, "steps": 20}
    train(Options(**PLAIN | changes | rule, out=tmp_path / "run"))
    words = ["--kind", "gradient", "--after", "8", "--every", "4"]
    assert main([str(tmp_path / "run"), *words]) == 0
    found = records(tmp_path / "run", "gradient")
    assert [r["step"] for r in found] == [8, 12, 16, 20]
    logged = {r["pass"]: r["loss"] for r in RunFolder(tmp_path / "run").read_metrics()}
    for record in found[:3]:
        assert record["loss"] == pytest.approx(logged[record["step"] + 1], rel=1e-12)
    assert found[0]["parameter_distance"] == 0 and found[0]["threshold"] == pytest.approx(2e4)
    assert found[0]["sharpness"] == pytest.approx(found[0]["flow_sharpness"], rel=1e-4)
    assert found[-1]["sharpness"] == pytest.approx(found[-1]["flow_sharpness"], rel=0.05)
    moved = found[0]["loss"] - found[-1]["loss"]
    assert moved > 0 and abs(found[-1]["flow_loss"] - found[-1]["loss"]) < 0.02 * moved
    assert main([str(tmp_path / "run"), "--after", "20"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam", "momentum": None, "nesterov": None}, "--beta1 0.9"),
        ({"momentum": 0.9}, "--momentum 0.9"),
        ({"weight_decay": 0.1}, "--weight-decay 0.1"),
        ({"schedule": "cosine", "cosine": 20}, "--schedule cosine"),
        ({"max_norm": 0.5}, "--max-norm 0.5"),
        ({"recipe": "fb-penalty", "max_norm": float("inf")}, "penalty"),
    ],
)
def test_other_runs_are_refused_by_their_option(tmp_path, capsys, changes, words):
    train(Options(**PLAIN | {"steps": 1} | changes, out=tmp_path / "run"))
    assert main([str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("run/flow-*"))


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
    assert main([]) == 2
    assert "one run" in capsys.readouterr().err
    assert main([str(tmp_path), "--every", "0"]) == 2
    assert "--every 0" in capsys.readouterr().err


def test_a_central_flow_above_the_edge_is_refused(tmp_path, capsys):
    train(Options(**PLAIN | {"steps": 1, "lr": 1000.0}, out=tmp_path / "run"))
    assert main([str(tmp_path / "run"), "--kind", "central"]) == 1
    assert "begins where no curvature is above" in capsys.readouterr().err
