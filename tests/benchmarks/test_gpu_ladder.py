"""The ladder at the paper's scale without a GPU: its order, its rehearsal, its refusals."""

from __future__ import annotations

import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import carry, gpu_ladder, ladder_rehearsal, ladder_scales
from benchmarks.ladder_scales import Job, Scale
from fbopt.train.checkpoint import atomic
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.ladder import runner


@pytest.fixture
def job(tmp_path) -> Job:
    """All that is run on a GPU."""
    return Job("cifar10", tmp_path, tmp_path / "carry", "again", 2, gpu_ladder.FAST)


def test_cheap_runs_come_first_and_seeds_last(job):
    order = [(scale, o.recipe, o.seed) for scale, o in job.in_order()]
    assert len(order) == len(set(order)) == 2 * 10
    assert order[:4] == [
        ("width-16-tenth", "sgd-aug", 0), ("width-16-tenth", "fb-clip-aug", 0),
        ("width-16-tenth", "fb-penalty-aug", 0), ("width-64-tenth", "sgd-aug", 0),
    ]  # fmt: skip
    assert order[9] == ("width-64", "fb-strong-aug", 0) and order[10][2] == 1


def test_the_runs_are_the_papers_in_the_fastest_way(job):
    found = {(scale, o.recipe): resolve(o) for scale, o in job.in_order()}
    assert all(o.precision == "bf16" and o.compile and o.channels_last for o in found.values())
    assert all(o.cuda_graph == (o.recipe != "sgd-aug") for o in found.values())
    assert {o.device for o in found.values()} == {"cuda"}
    strong = found["width-64", "fb-strong-aug"]
    assert (strong.model, strong.width, strong.steps, strong.lr) == ("resnet18", 64, 3000, 0.8)
    assert (strong.chunk_size, strong.max_norm, strong.penalty) == (32, 0.25, 0.5)
    assert found["width-64", "sgd-aug"].epochs == 300
    tenth = found["width-16-tenth", "fb-penalty-aug"]
    assert (tenth.width, tenth.steps, tenth.warmup, tenth.cosine) == (16, 300, 40, 400)


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_ladder.main(["--data", "cifar10"]) == 2
    error = capsys.readouterr().err
    assert "No GPU: torch" in error and 'ARGS="--rehearse"' in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["--data", "cifar10", "--minutes", "0"], ["--data", "x"]])
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert gpu_ladder.main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert "--data" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_does_not_stop_the_others(job, monkeypatch):
    trained = []

    def run_all(plan):
        trained.append(plan.last_row_first)
        return int(len(trained) == 1)

    monkeypatch.setattr(ladder_scales, "run_all", run_all)
    assert ladder_scales.climb(job) == 1
    assert [runs for (runs,) in trained] == [o for _, o in job.in_order()]


def test_nothing_is_started_after_the_deadline(job, monkeypatch, capsys):
    monkeypatch.setattr(ladder_scales, "run_all", lambda plan: pytest.fail("a run was started"))
    object.__setattr__(job, "deadline", time.monotonic() - 1)
    assert ladder_scales.climb(job) == 130
    assert capsys.readouterr().out.endswith("go on with\n  again\n")


def test_carried_runs_are_in_the_table_of_their_scale(job, tmp_path, monkeypatch):
    """They are finished, so that nothing else would write it."""
    _, options = next(job.in_order())
    run = job.out / "elsewhere" / options.out.relative_to(job.out)
    run.mkdir(parents=True)
    atomic.replace_json(run / "options.json", resolve(options).as_json())
    found = {"test_accuracy": 0.75, "loss": 0.5, "seconds": 60.0, "step": 11730}
    rest = {"pass": 30, "test_loss": 1.0, "train_accuracy": 0.9, "gradient_evaluations": 30}
    atomic.replace_json(run / "result.json", found | rest)
    logged = dict.fromkeys(("gradient_norm", "clip", "mean_squared_chunk_norm"), 1.0)
    atomic.replace_lines(run / "metrics.jsonl", [found | logged | {"pass": 30}])
    carry.pack(job.out / "elsewhere", job.carried)
    shutil.rmtree(job.out / "elsewhere")
    monkeypatch.setattr(ladder_scales, "run_all", lambda plan: 130)
    object.__setattr__(job, "deadline", time.monotonic() - 1)
    assert ladder_scales.climb(job) == 130
    table = (job.out / "width-16-tenth" / "ladder.md").read_text()
    assert "| `sgd-aug` | 75.00 (1 not finished) | – | 1 |" in table
    assert "| `fb-clip-aug` | – (2 not finished) | – | 0 |" in table


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ladder_scales, "run_all", lambda plan: 0)
    (tmp_path / "file").write_text("in the way")
    words = ["--data", "cifar10", "--out", str(tmp_path / "file")]
    assert gpu_ladder.main(words) == 1
    assert "go on with\n  python -m benchmarks.gpu_ladder --data cifar10" in capsys.readouterr().err


def test_the_rehearsal_stops_carries_and_resumes(tmp_path, monkeypatch, capsys):
    """The time is over for the first machine as soon as its run has taken some steps."""

    def now() -> float:
        lines = [p.read_text().count("\n") for p in tmp_path.glob("*/first-0/*/*/metrics.jsonl")]
        return math.inf if any(n > 25 for n in lines) else time.monotonic()

    clock = SimpleNamespace(sleep=time.sleep, monotonic=now)
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(ladder_rehearsal.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ladder_scales, "GRACE_SECONDS", math.inf)
    monkeypatch.setattr(ladder_rehearsal, "BUDGETS", (100.0,))
    scales = [Scale("width-4", 4, 0.05, ("fb-penalty-aug",))]
    assert ladder_rehearsal.rehearse(scales=scales) == 0
    out = capsys.readouterr().out
    facts = out.partition("# What the rehearsal shows\n")[2].splitlines()
    assert len(facts) == 8 and all(fact.startswith("ok ") for fact in facts)
    assert "the time is over" in out and "is altered; bring it again" in out
    assert "images/s with 2 gradients of each" in out
    assert (
        "whole/width-4/fb-penalty-aug-s0 and second/width-4/fb-penalty-aug-s0 are the same" in out
    )
    assert "| `fb-penalty-aug` | " in out.partition("# The ladder at scale")[2]
    assert not list(tmp_path.glob("gpu-ladder-*"))


def test_a_rehearsal_in_which_runs_fail_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder_rehearsal.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ladder_rehearsal, "climb", lambda job: 1)
    assert ladder_rehearsal.rehearse() == 1
    assert capsys.readouterr().out.count("FAILED") == 2


def test_results_name_the_device_and_the_runs(job, tmp_path):
    """Of a run that has begun; the others are not there."""
    scale, options = next(job.in_order())
    options.out.mkdir(parents=True)
    lines = [{"pass": p, "step": 391 * p, "gradient_evaluations": p, "sample_passes": 50_000 * p,
              "seconds": 2.0 * p, "loss": 1} for p in (1, 2, 3)]  # fmt: skip
    for name, content in (("metrics", lines), ("environment", [{"step": 0, "device": "a GPU"}])):
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in content))
    stem = tmp_path / "results" / "gpu-ladder-a-gpu"
    ladder_scales.write_results(job, stem, {"device": "a GPU"})
    content = json.loads((tmp_path / "results" / "gpu-ladder-a-gpu.json").read_text())
    first, *others = content["scales"]
    (found,) = first["runs"]
    assert first["folder"] == scale and not any(other["runs"] for other in others)
    assert (found["row"], found["images_per_s"], found["devices"]) == ("sgd-aug", 25_000, ["a GPU"])
    assert not found["finished"] and found["options"]["precision"] == "bf16"
    assert str(tmp_path) not in json.dumps(content)


def test_images_are_cut_from_a_data_set(tmp_path):
    first = ladder_rehearsal.write_images(tmp_path / "first", None)
    (first / "train" / "3" / "zzz.png").write_bytes((first / "train/3/6.png").read_bytes())
    cut = load(
        f"imagefolder:{ladder_rehearsal.write_images(tmp_path / 'cut', f'imagefolder:{first}')}"
    )
    made = load(f"imagefolder:{first}")
    assert len(made.train) == 21 and len(cut.train) == len(cut.test) == 20
    assert cut.train.y.bincount().tolist() == [2] * 10
    kept = {bytes(image.numpy()) for image in made.train.x}
    assert {bytes(image.numpy()) for image in cut.train.x} <= kept
    with pytest.raises(DataError, match="--data digits: --rehearse cuts coloured"):
        ladder_rehearsal.write_images(tmp_path / "digits", "digits")


@pytest.mark.parametrize("words", [("--width", "8"), ("--share=0.5",), ("--rows", "fb")])
def test_what_the_scales_set_is_not_given(tmp_path, words):
    with pytest.raises(OptionsError, match="is set for every scale; leave it out"):
        ladder_scales.Job("digits", tmp_path, tmp_path / "carry", "again", words=words)
