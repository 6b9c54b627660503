"""The examples: each runs as a reader would run it, and does in small what its docstring claims."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOST_LINES = {"mnist1d": 70, "tune": 220}
PROGRAM = {"tune": {"fbopt.train", "fbopt.train.ladder"}}  # of which all names are public


def example(name: str) -> ModuleType:
    """An example as a module: its file is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads():
    """Let an example choose its number of threads, and choose again after it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_public_names_only(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert "fbopt._" not in text
    program = set(re.findall(r"^(?:from|import) (fbopt\.train\S*)", text, re.MULTILINE))
    assert program == PROGRAM.get(name, set())
    assert text.count("\n") <= MOST_LINES.get(name, 160)


def test_mnist1d_is_fbopt_train_bit_for_bit(tmp_path):
    pytest.importorskip("mnist1d")
    from fbopt.train.config.options import Options
    from fbopt.train.loop import train

    losses, accuracy = example("mnist1d").main(["--steps", "20"])
    schedule = {"steps": 20, "warmup": 100, "cosine": 1300}
    run = train(Options(recipe="fb-penalty", **schedule, log_every=1, out=tmp_path / "run"))
    assert losses == [record["loss"] for record in run.folder.read_metrics()]
    assert accuracy == pytest.approx(run.summary["test_accuracy"])
    assert len(losses) == 20 and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Forty images of ten colours to train on and twenty to test, in an ImageFolder's layout."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    for part, count in (("train", 4), ("test", 2)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for i in range(count):
                color = (25 * label, 255 - 25 * label, 20 * i)
                image.new("RGB", (32, 32), color).save(folder / part / str(label) / f"{i}.png")
    return folder


@pytest.mark.parametrize("row", ["sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong"])
def test_cifar10(row, images):
    share = 0.02 if row in ("sgd", "fb") else 0.002
    losses, accuracy = example("cifar10").main(
        [str(images), "--row", row, "--width", "4", "--share", str(share)]
    )
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] and 0 <= accuracy <= 1


def test_cifar10_network_and_rows_are_the_papers():
    from fbopt.train.config.options import Options
    from fbopt.train.config.resolve import resolve

    module = example("cifar10")
    assert sum(p.numel() for p in module.resnet18(64).parameters()) == 11_173_962
    for name, row in module.LADDER.items():
        ours = resolve(Options(data="cifar10", recipe=name, device="cpu"))
        size = ours.batch_size if name == "sgd" else ours.chunk_size
        assert (row["lr"], row["chunk"]) == (ours.lr, size), name
        assert row["schedule"] == (ours.passes, ours.warmup, ours.cosine), name
        assert row.get("max_norm") == ours.max_norm and row.get("penalty") == ours.penalty, name


def test_pinn_lbfgs_approaches_the_solution():
    _, before = example("pinn_lbfgs").main(["--steps", "0", "--points", "300"])
    losses, error = example("pinn_lbfgs").main(["--steps", "12", "--points", "300"])
    assert losses[-1] < 0.05 * losses[0] and error < 0.1 < before


def test_accumulated_tokens_are_one_large_batch():
    difference, losses = example("accumulate_llm").main(["--steps", "12", "--sequences", "30"])
    assert difference < 1e-5  # of float32 gradients
    assert losses[-1] < losses[0] - 1


def test_edge_of_stability(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "edge.png"
    words = ["--steps", "240", "--every", "60", "--rates", "0.3", "--out", str(out)]
    found = example("edge_of_stability").main(words)[0.3]
    assert found["loss"] == sorted(found["loss"], reverse=True)
    assert found["sharpness"][-1] > 2 * found["sharpness"][0]  # on its way to 2/lr
    assert out.stat().st_size > 10_000 and out.with_suffix(".json").exists()


def test_tuning_is_equal_resumable_and_never_looks_at_the_test_set(tmp_path):
    """Two rows, their recipes first; the same command goes on; the ladder takes the result."""
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    from fbopt.train import Options, resolve
    from fbopt.train.ladder.__main__ import main as ladder

    given = ["--data", "digits", "--samples", "200", "--rows", "sgd", "fb-penalty"]
    words = [*given, "--share", "0.01", "--out", str(tmp_path)]
    program = [sys.executable, str(EXAMPLES / "tune.py"), *words, "--trials"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    for trials in ("1", "3"):
        subprocess.run([*program, trials], env=environment, check=True)
    rows = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert [len(row["trials"]) for row in rows.values()] == [3, 3]
    for name, row in rows.items():
        first, *others = row["trials"]
        recipe = resolve(Options(data="digits", recipe=name))
        for option, value in first.items():
            if option not in ("state", "validation_accuracy"):
                assert value == pytest.approx(getattr(recipe, option)), option
        assert all(trial["lr"] != first["lr"] for trial in others)
        complete = [trial for trial in row["trials"] if trial["state"] == "complete"]
        best = max(complete, key=lambda trial: trial["validation_accuracy"])
        assert row["options"] == {option: best[option] for option in row["options"]}
        assert row["validation_accuracy"] == best["validation_accuracy"]
        for trial in range(3):
            result = tmp_path / name / f"trial-{trial}" / "result.json"
            if result.exists():  # not of those that were pruned
                assert "test_accuracy" not in json.loads(result.read_text())
            metrics = (result.parent / "metrics.jsonl").read_text()
            assert "validation_accuracy" in metrics and "test_" not in metrics
    tuned = ["--tuned", str(tmp_path / "tuned.json"), "--out", str(tmp_path / "ladder")]
    tuned += ["--validation", "0.1", "--first-seed", "1", "--share", "0.01", "--seeds", "1"]
    assert ladder([*given, *tuned]) == 0
    made = json.loads((tmp_path / "ladder" / "fb-penalty-s1" / "options.json").read_text())
    assert {k: made[k] for k in rows["fb-penalty"]["options"]} == rows["fb-penalty"]["options"]
    refusals = {
        "--test always": "never on the test set", "--width 8": "holds trials of other options",
        f"--samples 100000 --out {tmp_path}/new": "--samples 100000",
        "--keep 3": "--keep are set for every trial",
    }  # fmt: skip
    for words, message in refusals.items():
        command = [*program[:-1], *words.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, (words, done.stderr)
