"""Rows of metrics for callbacks and TensorBoard: the numbers of metrics.jsonl, every step once."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import interrupt_after, metrics, options

from fbopt.train import loop
from fbopt.train.__main__ import main
from fbopt.train.checkpoint import saver
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer

PLACE = {"pass", "step", "seconds"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


@pytest.fixture
def board():
    """What TensorBoard itself reads from a folder: (step, value) by name."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        # With purging, as TensorBoard reads, or without: events that are there twice would show.
        found = EventAccumulator(str(folder), purge_orphaned_data=False)
        found.Reload()
        names = found.Tags()["scalars"]
        return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}

    return read


def scalars(rows: list[dict]) -> dict[str, list]:
    """The same from rows; event files hold float32."""
    names = dict.fromkeys(name for row in rows for name in row if name not in PLACE)
    return {
        name: [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows if name in r]
        for name in names
    }


def test_callbacks_get_the_rows_of_metrics(tiny, tmp_path):
    rows, others = [], []
    result = train(options(tiny, tmp_path / "run"), callbacks=[rows.append, others.append])
    assert rows == others == result.folder.read_metrics() and len(rows) == 12
    assert all(a is not b for a, b in zip(rows, others, strict=True))  # nobody's changes show


def test_a_callback_that_changes_its_row_changes_nothing_else(tiny, tmp_path):
    result = train(options(tiny, tmp_path / "run"), callbacks=[dict.clear])
    assert result.summary == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.summary["step"] == 12


def test_a_resumed_run_hands_over_the_rows_that_were_missing(tiny, tmp_path, monkeypatch):
    rows: list[dict] = []
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "run"), [rows.append])
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    result = train(Options(resume=tmp_path / "run"), [rows.append])
    assert rows == result.folder.read_metrics()
    train_again = dataclasses.replace(options(tiny, tmp_path / "run"), resume="auto")
    train(train_again, [rows.append])  # is finished
    assert len(rows) == 12


def test_an_error_of_a_callback_stops_the_run_which_can_go_on(tiny, tmp_path):
    def fail(row):
        if row["step"] == 5:
            raise LookupError("a logger")

    with pytest.raises(LookupError, match="a logger"):
        train(options(tiny, tmp_path / "run", save_every=2), [fail])
    result = train(Options(resume=tmp_path / "run"))
    assert [r["step"] for r in result.folder.read_metrics()] == list(range(1, 13))


@pytest.mark.parametrize("recipe", ["fb-penalty", "sgd"])
def test_tensorboard_shows_the_metrics(tiny, tmp_path, board, recipe):
    changes = {"epochs": 4} if recipe == "sgd" else {"steps": 4}
    result = train(options(tiny, tmp_path / "run", recipe, log="tensorboard", **changes))
    rows, found = result.folder.read_metrics(), board(tmp_path / "run")
    assert found == scalars(rows) and len(rows) == 4
    names = {"loss", "train_accuracy", "test_loss", "test_accuracy", "gradient_norm", "clip", "lr"}
    assert names <= set(found)
    assert ("mean_squared_chunk_norm" in found) == (recipe == "fb-penalty")


def test_tensorboard_of_an_interrupted_run(tiny, tmp_path, board, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "run", log="tensorboard"))
    assert [step for step, _ in board(tmp_path / "run")["loss"]] == [1, 2, 3, 4, 5]
    result = train(Options(resume=tmp_path / "run"))
    rows = result.folder.read_metrics()
    assert board(tmp_path / "run") == scalars(rows) and len(rows) == 12
    assert len(list((tmp_path / "run").glob("events*"))) == 1


def test_tensorboard_of_a_killed_run(tiny, tmp_path, board, monkeypatch):
    """Steps 5 to 7 were logged after the checkpoint, and nothing was flushed."""
    record = Trainer.record

    def die(trainer, evaluated):
        if trainer.step == 8:
            raise MemoryError
        return record(trainer, evaluated)

    whole = train(options(tiny, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(saver, "SAVE_SECONDS", math.inf)
        patch.setattr(Trainer, "record", die)
        patch.setattr("fbopt.train.reporting.tensorboard.TensorBoard.close", lambda self: None)
        train(options(tiny, tmp_path / "run", log="tensorboard", save_every=4))
    result = train(Options(resume=tmp_path / "run"))
    assert metrics(result.folder) == metrics(whole.folder)
    assert board(tmp_path / "run") == scalars(result.folder.read_metrics())


def test_tensorboard_can_begin_when_a_run_is_resumed(tiny, tmp_path, board, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("events*"))
    result = train(Options(resume=tmp_path / "run", log="tensorboard"))
    assert board(tmp_path / "run") == scalars(result.folder.read_metrics())


def test_the_numbers_are_those_without_it_and_overwrite_removes_its_files(tiny, tmp_path, board):
    plain = train(options(tiny, tmp_path / "plain"))
    logged = train(options(tiny, tmp_path / "run", log="tensorboard"))
    assert tiny_runs.digest(plain.model) == tiny_runs.digest(logged.model)
    assert metrics(plain.folder) == metrics(logged.folder)
    train(options(tiny, tmp_path / "run", steps=2, overwrite=True))
    assert not list((tmp_path / "run").glob("events*"))


def test_without_tensorboard_an_error_says_how_to_install_it(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(options(tiny, tmp_path / "old"))
    for name in ("torch.utils.tensorboard", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    chosen = options(tiny, tmp_path / "run", log="tensorboard")
    with pytest.raises(OptionsError, match=r"--log tensorboard.*pip install tensorboard"):
        train(chosen)
    assert main(tiny_runs.command_line(chosen)) == 2
    assert not (tmp_path / "run").exists()
    assert "pip install tensorboard" in capsys.readouterr().err
    before = (tmp_path / "old" / "metrics.jsonl").read_bytes()
    with pytest.raises(OptionsError, match="pip install tensorboard"):
        train(Options(resume=tmp_path / "old", log="tensorboard"))
    assert (tmp_path / "old" / "metrics.jsonl").read_bytes() == before


def test_help_and_mistyped_loggers(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--log tensorboard" in capsys.readouterr().out
    with pytest.raises(OptionsError, match="--log wandb: choose tensorboard"):
        train(options(tiny, tmp_path / "run", log="wandb"))
