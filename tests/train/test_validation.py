"""The validation split: what is held out, and when the test set is looked at."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_runs
import torch

from fbopt.train import loop, trainer
from fbopt.train.checkpoint import format
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.dataset import from_arrays
from fbopt.train.data.load import load
from fbopt.train.data.validation import hold_out
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_samples_are_kept_or_held_out(share):
    kept, held = hold_out(200, share, None, "these")
    assert len(held) == round(share * 200)
    assert sorted([*kept, *held]) == list(range(200))
    assert list(kept) == sorted(kept) and list(held) == sorted(held)
    again, _ = hold_out(200, share, 50, "these")
    assert list(again) == list(kept[:50])  # and none of those held out instead


def test_the_same_samples_are_held_out_for_ever():
    _, held = hold_out(20, 0.2, None, "these")
    assert list(held) == [3, 6, 10, 16]


def test_splits_of_a_data_set():
    """Samples are in one of the splits, and normalised by those that are trained on."""
    x = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * np.ones((1, 1, 4, 4), np.uint8)
    y = np.arange(40) % 2
    data = from_arrays(x, y, x[:4], y[:4], "these", validation=0.25, samples=20)
    kept, held = hold_out(40, 0.25, 20, "these")
    assert torch.equal(data.train.x[:, 0, 0, 0].int(), torch.from_numpy(kept).int())
    assert torch.equal(data.validation.x[:, 0, 0, 0].int(), torch.from_numpy(held).int())
    assert torch.equal(data.validation.y, torch.from_numpy(y[held]))
    for split in (data.train, data.test, data.validation):
        assert split.mean.item() == pytest.approx(kept.mean())
    whole = from_arrays(x, y, x[:4], y[:4], "these")
    assert whole.validation is None and whole.sha256() != data.sha256()
    moved = data.to("cpu", dtype=torch.float64)
    assert len(moved.validation) == 10 and moved.validation.mean.dtype == torch.float64


def test_the_last_class_may_be_held_out_whole():
    y = np.zeros(10, np.int64)
    y[hold_out(10, 0.1, None, "these")[1]] = 1
    data = from_arrays(np.zeros((10, 3)), y, np.zeros((2, 3)), [0, 1], "these", validation=0.1)
    assert data.classes == 2


def test_shares_that_leave_nothing_are_refused(tiny):
    for share in (0.001, 0.999):
        with pytest.raises(DataError, match=f"--validation {share}: .* holds out (0|75) of 75"):
            load(tiny, validation=share)
    with pytest.raises(DataError, match="only 60 training samples beside those of --validation"):
        load(tiny, samples=61, validation=0.2)
    for share in (-0.1, 1.0):
        with pytest.raises(OptionsError, match="--validation"):
            resolve(tiny_runs.options(tiny, "never written", validation=share))
    with pytest.raises(OptionsError, match="--test never: nothing would be evaluated"):
        resolve(tiny_runs.options(tiny, "never written", test="never"))


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """The numbers of samples of the splits that a run evaluates; 30 are the test set's."""
    found, evaluate = [], trainer.evaluate

    def noting(model, split, **more):
        found.append(len(split))
        return evaluate(model, split, **more)

    monkeypatch.setattr(trainer, "evaluate", noting)
    return found


WHEN = {  # of 12 steps with an evaluation every 4: validation's 15 samples, the test set's 30
    ("always", 0.0): [30] * 3,
    ("last", 0.0): [30],
    (None, 0.0): [30] * 3,
    (None, 0.2): [15, 15, 15, 30],
    ("always", 0.2): [15, 30] * 3,
    ("never", 0.2): [15] * 3,
}


@pytest.mark.parametrize("recipe", ["sgd", "fb-clip"])
@pytest.mark.parametrize("case", WHEN)
def test_when_the_test_set_is_looked_at(tiny, tmp_path, looks, capsys, recipe, case):
    test, share = case
    given = {"test": test, "validation": share, "eval_every": 4}
    run = train(tiny_runs.options(tiny, tmp_path, recipe, **given))
    assert looks == WHEN[case]
    assert ("test_accuracy" in run.summary) == (test != "never")
    assert ("validation_accuracy" in run.summary) == (share > 0)
    shown = capsys.readouterr().out.splitlines()[-2]
    for name in ("test", "validation"):
        assert (f"{name} accuracy" in shown) == (f"{name}_accuracy" in run.summary)


def test_a_run_without_held_out_samples_is_another(tiny, tmp_path):
    """It resumes on the same bits, and not with other samples."""
    options = tiny_runs.options(tiny, tmp_path / "whole", validation=0.2)
    whole = train(options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 5)
        train(tiny_runs.options(tiny, tmp_path / "parts", validation=0.2))
    with pytest.raises(OptionsError, match=r"--validation 0\.2, now 0\.0"):
        train(tiny_runs.options(tiny, tmp_path / "parts", resume="auto"))
    parts = train(tiny_runs.options(tiny, tmp_path / "parts", validation=0.2, resume="auto"))
    assert tiny_runs.metrics(parts.folder) == tiny_runs.metrics(whole.folder)
    assert tiny_runs.digest(parts.model) == tiny_runs.digest(whole.model)


def test_runs_of_earlier_versions_resume(tiny, tmp_path):
    """Their options know nothing of validation; the test set was always looked at."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 5)
        train(tiny_runs.options(tiny, tmp_path))
    folder = RunFolder(tmp_path)
    made, state = folder.read_options(), folder.load()
    for options in (made, state["options"]):
        del options["validation"], options["test"]
    folder.options.write_text(json.dumps(made))
    state.pop("format")
    folder.path_of(5).write_bytes(format.seal(state))
    for step in (7, 9):  # interrupted again, twice
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            tiny_runs.interrupt_after(patch, step)
            train(tiny_runs.options(tiny, tmp_path, resume="auto"))
    run = train(tiny_runs.options(tiny, tmp_path, resume="auto"))
    assert "test_accuracy" in run.summary


def test_curves_show_what_was_evaluated(tiny, tmp_path, monkeypatch):
    from fbopt.train.reporting import plots

    pages, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *size: pages.append(figure(*size)) or pages[-1])
    given = {"validation": 0.2, "eval_every": 4}
    run = train(tiny_runs.options(tiny, tmp_path / "run", **given))
    plots.draw_curves(run.folder, run.options)
    labels = [line.get_label() for line in pages[-1].axes[1].lines]
    assert labels == ["train", "validation", "test"]
    reached = run.summary
    expected = f"validation accuracy {reached['validation_accuracy']:.2%}, test accuracy"
    assert expected in pages[-1].get_suptitle()
