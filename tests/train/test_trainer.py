"""Whole runs of the training program on tiny data: files, output, signals, resuming."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import digest, interrupt_after, metrics, options

from fbopt.train import loop
from fbopt.train.checkpoint import saver
from fbopt.train.checkpoint.run_dir import FILES, RunFolder
from fbopt.train.config import recipes
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.loop import train
from fbopt.train.reporting.progress import Progress
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Diverged, Trainer


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Drawing takes longer than a tiny run: only two tests do it."""
    if not request.node.name.endswith(("[sgd]", "[fb-penalty]")):
        monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


@pytest.mark.parametrize("recipe", recipes.NAMES[:6])
def test_each_recipe_trains_and_leaves_its_files(tiny, tmp_path, recipe, capsys):
    result = train(options(tiny, tmp_path / "run", recipe))
    drawn = recipe in ("sgd", "fb-penalty")
    files = {*FILES, ".lock", f"checkpoint-{60 if recipe == 'sgd' else 12}.pt"}
    files -= set() if drawn else {"curves.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == files
    records = result.folder.read_metrics()
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert [r["pass"] for r in records] == list(range(1, 13))
    for record in records:
        assert {"step", "gradient_evaluations", "train_accuracy", "gradient_norm", "lr", "clip",
                "seconds", "test_accuracy", "test_loss"} <= set(record)  # fmt: skip
        assert 0 < record["clip"] <= 1 and 0 <= record["train_accuracy"] <= 1
    penalised = recipe in ("fb-penalty", "fb-strong")
    assert ("mean_squared_chunk_norm" in records[0]) == penalised
    assert records[-1]["gradient_evaluations"] == (24 if penalised else 12)
    assert records[-1]["step"] == (12 * 5 if recipe == "sgd" else 12)
    saved = json.loads((tmp_path / "run" / "options.json").read_text())
    assert saved["recipe"] == recipe and saved["momentum"] == 0.9 and saved["lr"] == 0.2
    if drawn:
        assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    out = capsys.readouterr().out
    assert f"test accuracy {summary['test_accuracy']:.2%}" in out and "run/ (options.json" in out


def test_checkpoint_holds_plain_types(tiny, tmp_path):
    result = train(options(tiny, tmp_path / "run"))
    state = torch.load(result.folder.path / "checkpoint-12.pt", weights_only=True)
    assert state["step"] == 12 and digest(state["model"]) == digest(result.model)


def test_the_same_command_gives_the_same_run(tiny, tmp_path):
    for recipe in ("sgd", "fb-penalty"):
        results = [train(options(tiny, tmp_path / f"{recipe}{i}", recipe)) for i in range(2)]
        assert digest(results[0].model) == digest(results[1].model)
        other = train(options(tiny, tmp_path / f"{recipe}-seed", recipe, seed=1))
        assert digest(results[0].model) != digest(other.model)


@pytest.mark.parametrize(
    ("recipe", "stop", "changes"),
    [
        ("fb-penalty", 5, {}),
        ("fb-penalty", 5, {"model": "resnet18", "steps": 7}),  # BatchNorm
        ("fb", 11, {}),
        ("sgd", 7, {}),  # in the middle of an epoch
        ("sgd", 10, {}),  # at its end
        ("sgd", 12, {"model": "resnet18", "epochs": 4}),
    ],
)
def test_resumed_is_the_same_bit_for_bit(
    tiny, tmp_path, capsys, monkeypatch, recipe, stop, changes
):
    whole = train(options(tiny, tmp_path / "whole", recipe, **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(Interrupted, match=f"saved at step {stop} of"):
            train(options(tiny, tmp_path / "part", recipe, **changes))
    assert not (tmp_path / "part" / "result.json").exists()
    with pytest.raises(OptionsError, match="interrupted run; go on with `fbopt train --resume"):
        train(options(tiny, tmp_path / "part", recipe, **changes))
    torch.rand(7)  # a resumed run restores its own random state
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)
    assert metrics(resumed.folder) == metrics(whole.folder)
    assert f"resumed at step {stop}" in capsys.readouterr().out


def test_metrics_after_the_checkpoint_are_taken_again(tiny, tmp_path, monkeypatch):
    """A run that is killed between two saves has logged steps that are not in its checkpoint."""
    whole = train(options(tiny, tmp_path / "whole"))
    record = Trainer.record

    def die(trainer, evaluated):
        if trainer.step == 8:
            raise MemoryError
        return record(trainer, evaluated)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(saver, "SAVE_SECONDS", 0)
        patch.setattr(Trainer, "record", die)
        train(options(tiny, tmp_path / "part"))
    with open(tmp_path / "part" / "metrics.jsonl", "a") as file:
        file.write('{"pass": 8, "step": 8}\n{"pass": 9, "st')
    resumed = train(Options(resume=tmp_path / "part"))
    assert digest(resumed.model) == digest(whole.model)
    assert metrics(resumed.folder) == metrics(whole.folder)


def test_a_signal_from_outside(tiny, tmp_path):
    """SIGTERM to a real process: it saves, says how to go on, and exits with 130."""
    arguments = ["--data", tiny, "--out", "run", "--steps", "100000", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fbopt.train", *arguments, "--log-every", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    try:
        end = time.monotonic() + 60
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size > 1000):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "go on with\n  fbopt train --resume run\n" in out
    folder = RunFolder(tmp_path / "run")
    assert folder.read_metrics()[-1]["step"] == folder.checkpoints()[0][0]


def test_a_second_signal_stops_at_once(tiny, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background job
    take_step = Trainer.take_step

    def impatient(trainer):
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(options(tiny, tmp_path / "unsaved"))
    monkeypatch.setattr(saver, "SAVE_SECONDS", 0)
    with pytest.raises(Interrupted, match="back at the last save; go on with"):
        train(options(tiny, tmp_path / "saved"))
    assert signal.getsignal(signal.SIGINT) is before


def test_finished_runs_are_kept(tiny, tmp_path):
    first = train(options(tiny, tmp_path / "run"))
    with pytest.raises(OptionsError, match=r"finished run \(test accuracy .*--overwrite"):
        train(options(tiny, tmp_path / "run", lr=0.01))
    with pytest.raises(OptionsError, match="the run is finished"):
        train(Options(resume=tmp_path / "run"))
    second = train(options(tiny, tmp_path / "run", lr=0.01, overwrite=True))
    assert digest(first.model) != digest(second.model)
    assert len(second.folder.read_metrics()) == 12


def test_resume_refuses_other_data(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        train(options(tiny, tmp_path / "run"))
    path = Path(tiny.partition(":")[2])
    content = path.read_bytes()
    arrays = dict(np.load(path))
    try:
        np.savez(path, **(arrays | {"x_train": arrays["x_train"] + 1}))
        with pytest.raises(ValueError, match="is not the data that the run began with"):
            train(Options(resume=tmp_path / "run"))
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(("recipe", "unit"), [("fb", "step"), ("sgd", "epoch")])
def test_divergence_is_named(tiny, tmp_path, recipe, unit):
    with pytest.raises(Diverged, match=rf"at {unit} \d+: try a smaller --lr \(it is 1e\+30\)"):
        train(options(tiny, tmp_path / "run", recipe, lr=1e30, warmup=0, log_every=5))
    assert not RunFolder(tmp_path / "run").checkpoints()


@pytest.mark.parametrize("recipe", recipes.NAMES[1:6])
def test_full_batch_rows_draw_nothing(tiny, tmp_path, recipe, monkeypatch):
    """After initialisation; with dropout, the counterexample, they do."""
    for draw in ("epoch_order", "replacements"):
        monkeypatch.setattr(f"fbopt.train.data.dataset.{draw}", lambda *a: pytest.fail("drawn"))
    # Seeding would hide what is drawn.
    monkeypatch.setattr("fbopt.train.trainer.seed_generators", lambda *a: None)

    def draws(**changes) -> bool:
        options = resolve(tiny_runs.options(tiny, tmp_path / "run", recipe, **changes))
        trainer = Trainer(options, load(tiny), torch.device("cpu"))
        before = states()
        for _ in range(3):
            trainer.take_step()
        return before != states()

    assert not draws()
    assert draws(dropout=0.3)


def states() -> tuple:
    """The states of torch's, NumPy's and Python's generators."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_sorted_labels_are_warned_about(tmp_path, capsys):
    """Chunks of one class are seldom intended, and nothing else would show them."""
    x, y = np.random.default_rng(0).normal(size=(40, 1, 8, 8)), np.repeat([0, 1], 20)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)

    def printed(name: str, **changes) -> str:
        train(options(f"npz:{tmp_path / 'd.npz'}", tmp_path / name, steps=1, **changes))
        return capsys.readouterr().out

    warning = "warning: the training samples come in the order of their labels"
    assert warning in printed("a", chunk_size=8) and warning in printed("b", augment="random")
    assert warning not in printed("c", chunks="shuffled")
    assert warning not in printed("d", chunk_size=40)


def test_plain_lines_off_a_terminal(tiny, tmp_path, capsys):
    train(options(tiny, tmp_path / "run"))
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    lines = [line for line in out.splitlines() if "/12 " in line]
    assert lines[0].startswith(" 1/12") and lines[-1].startswith("12/12")
    for word in ("left", "loss", "train", "test", "|g|", "lr", "steps/s", "samples/s"):
        assert word in lines[-1]


def test_bar_on_a_terminal():
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    record = {"pass": 2, "step": 2, "loss": 0.5, "train_accuracy": 0.5, "gradient_norm": 0.1,
              "lr": 0.1, "test_accuracy": 0.25}  # fmt: skip
    stream = Terminal()
    progress = Progress(passes=4, done=0, samples=100, stream=stream)
    progress.advance(50)
    progress.report(record)
    progress.close()
    last = stream.getvalue().rpartition("\r")[2]
    assert "50 %" in last and "loss 0.5000" in last and "test 25.0%" in last


def test_only_some_passes_are_logged(tiny, tmp_path):
    result = train(options(tiny, tmp_path / "run", log_every=5, eval_every=4))
    records = result.folder.read_metrics()
    assert [r["pass"] for r in records] == [1, 4, 5, 8, 10, 12]
    assert [r["pass"] for r in records if "test_loss" in r] == [4, 8, 12]


def test_the_network_starts_from_the_seed_alone(tiny, tmp_path):
    torch.manual_seed(99)
    first = train(options(tiny, tmp_path / "a", "fb", steps=1))
    torch.manual_seed(98)
    assert digest(first.model) == digest(train(options(tiny, tmp_path / "b", "fb", steps=1)).model)
