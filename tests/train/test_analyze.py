"""`fbopt analyze`: results and figures, what an interrupt keeps, and errors for bad input."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch

from fbopt import cli
from fbopt.analysis import (
    Hessian,
    Objective,
    batch_sharpness,
    critical_sharpness,
    directional_sharpness,
    eigenpairs,
    fisher_trace,
    gradient_rank,
    gradient_statistics,
    loss_gap,
    spectral_density,
    subspace_share,
)
from fbopt.train import loop
from fbopt.train.analyze import measures, runs
from fbopt.train.analyze.options import MEASURES, Analysis
from fbopt.train.checkpoint import atomic, format
from fbopt.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = [
    *("--points", "5", "--grid", "3", "--samples", "2", "--directions", "2"),
    *("--eigenvalues", "2", "--train-steps", "1", "--probes", "2", "--steps", "4"),
    *("--batch-sizes", "6", "45", "1000"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=45)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Three runs of the small CNN (one of SGD), and one with BatchNorm and dropout."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda folder, options: False)
        train(tiny_runs.options(tiny, folder / "first", save_every=6, keep=5))
        train(tiny_runs.options(tiny, folder / "second", seed=1, penalty=0, max_norm=float("inf")))
        train(tiny_runs.options(tiny, folder / "third", "sgd"))
        train(tiny_runs.with_noise(tiny, folder / "noisy", steps=3))
    return folder


def analyze(*arguments) -> int:
    return cli.main(["analyze", *map(str, arguments)])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_three_runs_side_by_side(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = [folder / name for name in ("first", "second", "third")]
    out = tmp_path / "out"
    assert analyze(*names, "--out", out, "--measures", *MEASURES, "--between", *QUICK) == 0
    found = results(out)
    labels = ["first, step 12", "second, step 12", "third, step 36"]
    assert list(found["runs"]) == labels
    assert list(found["measures"]) == [*MEASURES, "between"]
    for name in MEASURES:
        assert list(found["measures"][name]) == labels
        for values in found["measures"][name].values():
            assert set(values["cost"]) == {
                "losses", "gradients", "second_backwards", "seconds", "training_passes",
            }  # fmt: skip
    between = found["measures"]["between"]
    at = [np.argmin(np.abs(np.array(between["axes"][0]) - place)) for place in (0, 1)]
    gradient = found["measures"]["gradient"]
    for label, (i, j) in zip(labels, ((0, 0), (1, 0), (0, 1)), strict=True):
        loss = between["losses"][at[i]][at[j]]
        assert loss == pytest.approx(gradient[label]["loss"], rel=1e-5)
    for label in labels:
        middle = found["measures"]["plane"][label]["losses"][1][1]
        assert middle == pytest.approx(gradient[label]["loss"], rel=1e-6)
    for name in ("sharpness", "flatness", "line", "plane", "spectrum", "between"):
        assert min(size(out / f"{name}.png")) > 600
    printed = capsys.readouterr().out
    assert "passes of training" in printed and "written:" in printed


def test_the_numbers_are_the_librarys(folder, tmp_path):
    out, wanted = tmp_path / "out", ["--measures", "gradient", "sharpness", *QUICK]
    assert analyze(folder / "first", "--out", out, *wanted) == 0
    subject = runs.read(folder / "first", Analysis(runs=(folder / "first",)))
    run = subject.run
    x, y = run.data.train.batch(slice(None))
    model = run.model
    chunks = list(zip(x.split(32), y.split(32), strict=True))
    objective = Objective(model, torch.nn.functional.cross_entropy, chunks)
    found = results(out)["measures"]
    gradient = gradient_statistics(objective, subject.momentum)
    assert gradient.momentum_angle is not None
    for name, value in gradient.as_json().items():
        assert found["gradient"]["first, step 12"][name] == pytest.approx(value, rel=1e-6)
    sharpness = found["sharpness"]["first, step 12"]
    values = eigenpairs(Hessian(objective), 2).values
    np.testing.assert_allclose(sharpness["eigenvalues"], values, rtol=1e-4)
    lr = run.optimizer.param_groups[0]["lr"]
    clip = sharpness["rule"]["clip"]
    assert clip == pytest.approx(min(1, 0.25 / (gradient.gradient_norm + 1e-6)), rel=1e-4)
    assert sharpness["threshold"] == pytest.approx((3.8 / 2.8 / lr - 5e-4) / clip)


def test_the_other_numbers_are_the_librarys(folder, tmp_path, capsys):
    out, names = tmp_path / "out", ["spectrum", "fisher", "rank", "direction", "batches"]
    assert analyze(folder / "first", "--out", out, "--measures", *names, *QUICK) == 0
    found = {name: results(out)["measures"][name]["first, step 12"] for name in names}
    subject = runs.read(folder / "first", Analysis(runs=(folder / "first",)))
    objective = subject.objective
    density = spectral_density(Hessian(objective), 2, 4)
    np.testing.assert_allclose(found["spectrum"]["nodes"], density.nodes, rtol=1e-5, atol=1e-6)
    assert found["spectrum"]["trace"]["value"] == pytest.approx(density.trace.value, rel=1e-5)
    for labels in ("data", "model"):
        expected = fisher_trace(objective, labels, samples=2)
        assert found["fisher"][labels]["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["rank"]["noise"]["stable"] == pytest.approx(
        gradient_rank(objective, centered=True).stable, rel=1e-5
    )
    pairs, along = eigenpairs(Hessian(objective), 2, tolerance=1e-3), found["direction"]
    assert along["directional_sharpness"] == pytest.approx(
        directional_sharpness(objective), rel=1e-5
    )
    assert along["critical_step"] == pytest.approx(critical_sharpness(objective).step, rel=1e-3)
    momentum = objective.flatten(subject.momentum)
    for name, vector in (("gradient", objective.gradient()), ("momentum", momentum)):
        share = subspace_share(vector, pairs)
        assert along["shares"][name] == pytest.approx(share, rel=1e-2, abs=1e-5)
    (sharp,), (gap,) = (f(objective, [6], 2) for f in (batch_sharpness, loss_gap))
    batches = found["batches"]
    assert batches["sharpness"][0]["value"] == pytest.approx(sharp.value, rel=1e-4)
    assert batches["gap"][0]["distance_mean"] == pytest.approx(gap.distance_mean, rel=1e-4)
    assert batches["left_out"] == [1000]
    assert "1000 samples: left out" in capsys.readouterr().out


def test_the_models_labels_need_a_cross_entropy(tiny, tmp_path, capsys):
    options = tiny_runs.options(tiny, tmp_path / "run", steps=2, loss="misclassified")
    train(options)
    assert analyze(tmp_path / "run", "--measures", "fisher", "direction", *QUICK) == 0
    assert list(results(tmp_path / "run" / "analysis")["measures"]["fisher"]["run, step 2"]) == [
        "data",
        "cost",
    ]
    assert "the model has no labels" in capsys.readouterr().out


def test_a_checkpoint_file_is_measured_and_the_run_untouched(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in (folder / "first").iterdir() if p.is_file()}
    file = folder / "first" / "checkpoint-6.pt"
    assert analyze(file, "--out", tmp_path, "--measures", "gradient", *QUICK) == 0
    assert list(results(tmp_path)["runs"]) == ["first, step 6"]
    state = format.read(file)
    momenta = state["optimizer"]["state"]
    assert momenta and {p.name: p.read_bytes() for p in (folder / "first").iterdir()} == before


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    noisy = [folder / "noisy", "--products", "central", "--dropout", "seeded", *QUICK]
    every = ["--measures", "gradient", "sharpness", "trace", "flatness", "line"]
    for name in ("a", "b"):
        assert analyze(*noisy, *every, "--out", tmp_path / name) == 0
    assert analyze(*noisy, *every, "--out", tmp_path / "c", "--seed", 1) == 0
    kept = []
    for name in ("a", "b", "c"):
        found = results(tmp_path / name)["measures"]
        for values in found.values():
            for one in values.values():
                del one["cost"]
        kept.append(found)
    assert kept[0] == kept[1] != kept[2]
    assert kept[0]["line"]["noisy, step 3"]["batchnorm"] == "chunk"
    for path in (tmp_path / "a").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_batchnorm_is_stated(folder, tmp_path):
    losses = []
    for batchnorm in ("chunk", "frozen"):
        out = tmp_path / batchnorm
        quick = ["--measures", "line", "--batchnorm", batchnorm, *QUICK]
        assert analyze(folder / "noisy", "--out", out, *quick) == 0
        values = results(out)["measures"]["line"]["noisy, step 3"]
        assert values["batchnorm"] == batchnorm
        losses.append(values["losses"])
    assert losses[0] != losses[1]


def test_the_penalised_objective_is_measured(tiny, tmp_path, capsys):
    """Of its next step; runs without a penalty on chunks, and measures of samples, are refused."""
    smooth = {"model": "mlp", "activation": "tanh", "precision": "fp64", "steps": 3, "lr": 1.0}
    train(tiny_runs.options(tiny, tmp_path / "run", penalty=4.0, **smooth))
    train(tiny_runs.options(tiny, tmp_path / "plain", "fb", **smooth))
    values = {}
    for words in ([], ["--penalised"]):
        few = ["--measures", "sharpness", "--eigenvalues", "1", "--tolerance", "1e-6"]
        assert analyze(tmp_path / "run", *few, *words, "--out", tmp_path / "found") == 0
        (found,) = results(tmp_path / "found")["measures"]["sharpness"].values()
        values[bool(words)] = found["eigenvalues"][0]
    run = runs.read(tmp_path / "run", Analysis((tmp_path / "run",), penalised=True))
    lr = run.run.optimizer.param_groups[0]["lr"]
    assert run.objective.coefficient == pytest.approx(lr * 4 / 4)
    dense = eigenpairs(Hessian(run.objective, "central"), 1, tolerance=1e-5).values[0]
    assert values[True] == pytest.approx(dense, rel=1e-4) and values[True] > 1.01 * values[False]
    capsys.readouterr()
    assert analyze(tmp_path / "plain", "--penalised", "--out", tmp_path / "no") == 2
    assert "has no gradient penalty on chunks" in capsys.readouterr().err
    assert analyze(tmp_path / "run", "--penalised", "--measures", "fisher") == 2
    assert "fisher is of the loss alone" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_finished(folder, tmp_path, monkeypatch, capsys):
    def stopped(subject, options):
        raise KeyboardInterrupt

    monkeypatch.setitem(measures.MEASURES, "trace", stopped)
    quick = ["--measures", "gradient", "flatness", "trace", "line", *QUICK]
    assert analyze(folder / "first", "--out", tmp_path, *quick) == 130
    assert list(results(tmp_path)["measures"]) == ["gradient", "flatness"]
    drawn = find_spec("matplotlib") is not None
    assert (tmp_path / "flatness.png").exists() == drawn and not (tmp_path / "line.png").exists()
    assert f"what was finished is in {tmp_path}" in capsys.readouterr().err


def test_a_bar_counts_passes(folder, tmp_path, monkeypatch):
    """On a terminal the bar ends at its announced total."""
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**(options | {"disable": False, "file": sys.stderr}))
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    names = ["gradient", "trace", "line", "plane"]
    assert analyze(folder / "first", "--out", tmp_path, "--measures", *names, *QUICK) == 0
    assert [bar.desc for bar in bars] == [f"first, step 12: {name}" for name in names]
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [1 + 3, 2, 5, 9]


def altered(folder: Path, out: Path, change) -> Path:
    """A copy of the first run whose newest checkpoint is changed."""
    shutil.copytree(folder / "first", out)
    path = out / "checkpoint-12.pt"
    state = {k: v for k, v in format.read(path).items() if k != "format"}
    change(state)
    path.write_bytes(format.seal(state))
    return out


def other_model(state):
    state["model"]["0.weight"] = torch.ones(2, 2)


def not_finite(state):
    state["model"]["0.weight"][0] = float("nan")


def other_data(state):
    state["data"] = "0" * 64


REFUSED = {
    "no folder": (["nowhere"], 2, "there is no such folder or file"),
    "no checkpoint": (["first/checkpoint-7.pt"], 2, "has checkpoint-12.pt, checkpoint-6.pt"),
    "no run": (["."], 2, "is no run's folder"),
    "no checkpoint file": (["first/options.json"], 2, "cannot be measured: it is cut short"),
    "twice": (["first", "first"], 2, "first, step 12 is given twice"),
    "four": (["first", "second", "third", "noisy"], 2, "give one to three runs, not 4"),
    "between one": (["first", "--between"], 2, "--between needs two runs"),
    "between models": (["first", "noisy", "--between"], 2, "holds another model"),
    "device": (["first", "--device", "nothing"], 2, "--device nothing"),
    "span": (["first", "--span", "0"], 2, "--span 0.0: has to be above 0"),
    "grid": (["first", "--grid", "2"], 2, "--grid 2: has to be at least 3"),
    "probes": (["first", "--probes", "1"], 2, "--probes 1: has to be at least 2"),
    "batch sizes": (["first", "--batch-sizes", "8", "0"], 2, "--batch-sizes 0: has to be at least"),
    "no batch sizes": (["first", "--batch-sizes"], 2, "--batch-sizes is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(folder, tmp_path, monkeypatch, capsys, name):
    arguments, status, message = REFUSED[name]
    monkeypatch.chdir(folder)
    clash = {"--grid", "--probes", "--batch-sizes"} & set(arguments)
    quick = [*QUICK, "--measures"] if not clash else ["--measures", "gradient"]
    quick = [*quick, "gradient"] if quick[-1] == "--measures" else quick
    assert analyze(*arguments, "--out", tmp_path / "out", *quick) == status
    assert message in capsys.readouterr().err


CHANGED = {
    other_model: (2, "holds another model than these options build: 0.weight"),
    not_finite: (1, "0.weight of the model holds infinite or undefined values"),
    other_data: (2, "is not the data that the run began with"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_bad_checkpoints_are_named(folder, tmp_path, capsys, change):
    status, message = CHANGED[change]
    run = altered(folder, tmp_path / "run", change)
    assert analyze(run, "--measures", "gradient", *QUICK) == status
    assert message in capsys.readouterr().err


def test_unknown_measures_and_help(folder, capsys):
    for arguments, status in (([folder / "first", "--measures", "size"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            analyze(*arguments)
        assert stop.value.code == status
    assert "  analyze " in cli.usage()


def test_tracking_measures_and_changes_nothing(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    digests, records = [], []
    for name, track in (("plain", {}), ("tracked", {"track": "sharpness,noise", "every": 2})):
        options = tiny_runs.with_noise(tiny, tmp_path / name, steps=4, log_every=4, **track)
        result = train(options)
        digests.append(atomic.read_lines(result.folder.fingerprints))
        records.append(result.folder.read_metrics())
    assert digests[0] == digests[1]
    names = {"sharpness", "sharpness_threshold", "noise_scale", "noise_trace", "squared_signal",
             "chunk_signal_to_noise"}  # fmt: skip
    assert [r["step"] for r in records[1] if names <= set(r)] == [1, 2, 4]
    assert all(not names & set(r) for r in records[0])
    tall, short = (size(tmp_path / name / "curves.png") for name in ("tracked", "plain"))
    assert tall[1] > 1.4 * short[1]
    assert analyze(tmp_path / "tracked", "--measures", "sharpness", *QUICK) == 0
    sharpness = results(tmp_path / "tracked" / "analysis")["measures"]["sharpness"]
    assert records[1][-1]["sharpness"] == pytest.approx(
        sharpness["tracked, step 4"]["eigenvalues"][0], rel=1e-3
    )


def test_compiled_runs_are_measured_as_others(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, backend="eager"))
    runs = []
    for name, compiled in (("plain", False), ("compiled", True)):
        options = tiny_runs.options(
            tiny, tmp_path / name, steps=2, compile=compiled, track="sharpness"
        )
        runs.append(train(options))
        assert analyze(tmp_path / name, "--measures", "sharpness", *QUICK) == 0
    plain, compiled = (run.folder.read_metrics()[-1]["sharpness"] for run in runs)
    assert compiled == pytest.approx(plain, rel=1e-3)
    found = results(tmp_path / "compiled" / "analysis")["measures"]["sharpness"]
    assert found["compiled, step 2"]["eigenvalues"][0] == pytest.approx(plain, rel=1e-3)


def test_a_bf16_run_is_measured_as_it_was_trained(tiny, tmp_path):
    """Its own next step logs the loss and the gradient norm at a checkpoint's weights."""
    saved = {"save_every": 1, "keep": 5, "track": "noise", "every": 1}
    options = tiny_runs.options(
        tiny, tmp_path / "run", steps=3, precision="bf16", penalty=0, **saved
    )
    records = train(options).folder.read_metrics()
    file = tmp_path / "run" / "checkpoint-2.pt"
    assert analyze(file, "--measures", "gradient", "--out", tmp_path, *QUICK) == 0
    found = results(tmp_path)["measures"]["gradient"]["run, step 2"]
    for name in ("loss", "gradient_norm"):
        assert found[name] == pytest.approx(records[2][name], rel=1e-6)
    assert found["noise_trace"] == pytest.approx(records[1]["noise_trace"], rel=1e-6)
    subject = runs.read(file, Analysis(runs=(file,)))
    assert subject.objective.autocast == torch.bfloat16
    subject.objective.autocast = None
    assert subject.objective.loss() != pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"track": "size"}, "--track size: choose sharpness, noise"),
        ({"every": 3}, "--every goes with --track"),
        ({"track": "noise", "every": 0}, "--every 0: has to be at least 1"),
    ],
)
def test_bad_tracking_is_named(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_runs.options(tiny, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
