"""`--track sharpness:3`: the dense Hessian's eigenvalues, the same bits in a resumed run."""

from __future__ import annotations

import pytest
import tiny_runs
import torch
from torch.nn import functional as F

from fbopt.analysis import (
    Hessian,
    PreconditionedHessian,
    batch_sharpness,
    eigenpairs,
    stability_threshold,
)
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.schema import fault_of_checkpoint
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.curvature import CurvatureTracker, training_loss, update_rule
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TRACK = {"track": "sharpness:3", "every": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("fbopt.train.loop.draw_curves", lambda folder, options: False)


def logged(folder):
    """The rows of metrics.jsonl without their times."""
    rows = folder.read_metrics()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_the_eigenvalues_of_every_step(tiny, rule):
    """Beside Lanczos iterations from a random vector."""
    trainer = tiny_runs.trainer_of(tiny, "fb", optimizer=rule, lr=0.01, **TRACK)
    tracker, seen = CurvatureTracker(trainer), "preconditioned_" * (rule == "adam") + "sharpness"
    for _ in range(3):
        trainer.take_step()
        found, objective = tracker.measure(), training_loss(trainer)
        operator = Hessian(objective)
        if rule == "adam":
            share = trainer.gradient_share
            operator = PreconditionedHessian(objective, trainer.optimizer, clip=share)
            assert found["sharpness_threshold"] == operator.threshold.value
        true = eigenpairs(operator, 3, tolerance=1e-4, verify=False)
        for i, value in enumerate(true.values):
            name = seen + (f"_{i + 1}" if i else "")
            assert found[name] == pytest.approx(value, rel=3e-3)
            assert 0 <= found[f"{name}_residual"] < 0.2 * value


@pytest.mark.parametrize("recipe", ["sgd", "fb"])
def test_batches_are_measured(tiny, recipe):
    """By their definition over batches of the run's size; zero gradients leave the entry out."""
    trainer = tiny_runs.trainer_of(tiny, recipe, track="batches")
    trainer.take_step()
    found = CurvatureTracker(trainer).measure()
    (known,) = batch_sharpness(
        training_loss(trainer), [trainer.chunks.size], 32, seed=trainer.options.seed
    )
    assert found["batch_sharpness"] == known.value > 0
    assert found["batch_sharpness_error"] == known.error
    assert found["batch_sharpness_ratio"] == known.ratio
    assert found["sharpness_threshold"] == stability_threshold(**update_rule(trainer)).value
    with torch.no_grad():
        list(trainer.model.parameters())[-1].copy_(torch.tensor([1e4, 0.0, 0.0]))
    trainer.data.train.y.zero_()
    assert "batch_sharpness" not in CurvatureTracker(trainer).measure()


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adam", "track": "sharpness:2"}], ids=["sgd", "adam"]
)
def test_resumed_runs_log_the_same_bits(tiny, tmp_path, monkeypatch, changes):
    given = {"steps": 4, "log_every": 1, **TRACK, **changes}
    whole = train(tiny_runs.options(tiny, tmp_path / "whole", "fb", **given))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        saved = Options(**{**vars(tiny_runs.options(tiny, tmp_path / "part", "fb", **given)),
                           "save_every": 2})  # fmt: skip
        stop_at(patch, 3)
        train(saved)
    resumed = train(Options(resume=tmp_path / "part", threads=1))
    assert logged(resumed.folder) == logged(whole.folder)
    name = "preconditioned_sharpness_2" if changes else "sharpness_3"
    assert name in resumed.folder.read_metrics()[-1]


def stop_at(patch, step):
    """Let a run end like one that is killed before so many steps."""
    take = Trainer.take_step

    def killed(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        take(trainer)

    patch.setattr(Trainer, "take_step", killed)


def tracked_state(tiny, tmp_path):
    """The content of a checkpoint with tracked eigenvectors."""
    options = tiny_runs.options(tiny, tmp_path / "run", "fb", steps=3, every=1, track="sharpness:3")
    return format.read(train(options).folder.path_of(3))


def test_forged_states_are_refused(tiny, tmp_path):
    state = tracked_state(tiny, tmp_path)
    known = state["curvature"]
    assert fault_of_checkpoint(state) is None
    assert fault_of_checkpoint({k: v for k, v in state.items() if k != "curvature"}) is None
    cases = {
        "other entries": {"rows": known["rows"]},
        "its rows has the shape": {**known, "rows": known["rows"][:, 1:]},
        "infinite or undefined": {**known, "ahead": known["ahead"] / 0},
        "it tracks 21 eigenvalues": {**known, "tracked": 21},
        "its curvature is empty": {},
        "its precision": {k: v.double() if isinstance(v, torch.Tensor) else v
                          for k, v in known.items()},
        "parameters, not of": {**known, **{
            k: F.pad(known[k], (0, 1)) for k in ("rows", "before", "chain", "ahead")
        }},
    }  # fmt: skip
    for number, (message, forged) in enumerate(cases.items()):
        path = tmp_path / f"forged-{number}"
        path.write_bytes(format.seal({**state, "curvature": forged}))
        message = message.replace("its precision", "not of the parameters' precision")
        with pytest.raises(CheckpointError, match=message):
            format.read(path)


def test_other_measures_begin_anew(tiny, tmp_path):
    known = tracked_state(tiny, tmp_path)["curvature"]
    for track, kept in (("sharpness:3", True), ("sharpness", False), ("noise", False), ("", False)):
        trainer = tiny_runs.trainer_of(tiny, "fb", track=track)
        assert bool(CurvatureTracker(trainer, known).saved()) == kept
    assert CurvatureTracker(trainer, None).saved() == {}


@pytest.mark.parametrize(
    "track",
    ["sharpness:0", "sharpness:21", "sharpness:two", "sharpness:", "noise:2", "sharpness:²"],
)
def test_bad_counts_are_named(tiny, tmp_path, track):
    with pytest.raises(OptionsError, match="a count is for sharpness alone, from 1 to 20"):
        train(tiny_runs.options(tiny, tmp_path / "run", track=track))
    assert not (tmp_path / "run").exists()


def test_counts_and_spaces():
    options = Options(track=" sharpness : 2 , noise")
    assert options.tracked == ("sharpness", "noise") and options.eigenvalues == 2
    assert Options(track="noise").eigenvalues == Options().eigenvalues == 1
