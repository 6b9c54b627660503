"""`fbopt fingerprint`: its table, the first difference of two runs, and its errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch

from fbopt import cli
from fbopt.train import loop
from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.digest import GROUPS, fingerprint, groups, sha256
from fbopt.train.checkpoint.provenance import changed
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.loop import train
from fbopt.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
KEPT = {"steps": 6, "chunk_size": 20, "eval_every": 6, "save_every": 3, "keep": 9}
KEPT |= {"accumulation": "float32"}  # whose bits depend on more


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=40, side=8)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory) -> Path:
    """A finished run that keeps every step, with checkpoints at 3 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda folder, options: False)
        out = tmp_path_factory.mktemp("runs") / "first"
        train(tiny_runs.with_noise(tiny, out, **KEPT))
    return out


def run(*arguments) -> int:
    return cli.main(["fingerprint", *map(str, arguments)])


def test_a_run_is_printed_step_by_step(first, capsys):
    assert run(first, "--full") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", *GROUPS] and [int(x.split()[0]) for x in lines] == [*range(7)]
    assert [line.endswith("(checkpoint)") for line in lines] == [s in (3, 6) for s in range(7)]
    folder = RunFolder(first)
    for step in (3, 6):
        wanted = fingerprint(folder.read_checkpoint(step))
        assert lines[step].split()[1:4] == [wanted[group] for group in GROUPS]
        assert atomic.read_lines(folder.fingerprints)[step] == wanted
    assert run(first) == 0
    assert lines[6].split()[1][:16] == capsys.readouterr().out.splitlines()[-1].split()[1]


def test_only_checkpoints_unless_asked(tiny, tmp_path, capsys):
    for every, kept in ((0, [3, 6]), (4, [0, 3, 4, 6])):
        out = tmp_path / str(every)
        train(tiny_runs.options(tiny, out, fingerprint_every=every, **KEPT))
        records = atomic.read_lines(RunFolder(out).fingerprints)
        assert [record["step"] for record in records] == kept
    assert run(out) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[3] == "none"  # no BatchNorm, no buffers


def test_the_digest_is_of_type_shape_and_values():
    x = torch.arange(6.0).reshape(2, 3)
    by_hand = hashlib.sha256(b"(torch.float32, (2, 3))" + x.numpy().tobytes()).hexdigest()
    assert sha256(x) == by_hand == sha256(x.t().contiguous().t())
    others = (x.t(), x.double(), x.reshape(3, 2), x + 1e-6, x.to(torch.bfloat16), x[0, 0], x[:0])
    assert len({by_hand, *map(sha256, others)}) == 8


def nudge(monkeypatch, step: int, name: str, by: float) -> None:
    """Move the last elements of a parameter or buffer after a step."""
    take_step = Trainer.take_step

    def nudged(trainer):
        take_step(trainer)
        if trainer.step == step:
            with torch.no_grad():
                trainer.model.state_dict()[name][..., -1] += by

    monkeypatch.setattr(Trainer, "take_step", nudged)


@pytest.mark.parametrize(
    ("step", "name", "group"),
    [
        (3, "stage2.0.conv1.weight", "parameters"),
        (4, "linear.bias", "parameters"),
        (6, "norm.running_mean", "buffers"),
    ],
)
def test_one_nudged_tensor_is_found(tiny, tmp_path, first, monkeypatch, capsys, step, name, group):
    nudge(monkeypatch, step, name, 0.25)
    train(tiny_runs.with_noise(tiny, tmp_path / "second", **KEPT))
    assert run(first, tmp_path / "second") == 1
    out = capsys.readouterr().out
    assert f"differ first at step {step} (the same up to step {step - 1})" in out
    assert f"  1 of 184 tensors, in the model's order:\n    {group}: {name}\n  largest" in out
    if step in (3, 6):
        assert f"largest difference at step {step}: 0.25 in {group}: {name}\n" in out
    else:
        assert "largest difference at step 6: 0." in out
    assert "no option or recorded fact differs: another machine, or changed data or code" in out
    assert "float32 accumulation" in out


CAUSES = {
    "seed": ({"seed": 5}, 0, "  --seed 0 and 5\n"),
    "options": (
        {"lr": 0.3, "dropout": 0.0}, 1, "  --dropout 0.3 and 0.0\n|  --lr 0.2 and 0.3\n",
    ),
    "penalty": ({"penalty": 0.0}, 1, "  --penalty 0.5 and none\n|  --radius 0.01 and none\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSES)
def test_options_that_differ_are_named(tiny, tmp_path, first, capsys, case):
    changes, step, lines = CAUSES[case]
    train(tiny_runs.with_noise(tiny, tmp_path / "second", **(KEPT | changes)))
    assert run(first, tmp_path / "second") == 1
    out = capsys.readouterr().out + "\n"
    assert f"differ first at step {step} " in out
    for line in lines.split("|"):
        assert line in out
    assert "no option or recorded fact" not in out


FACTS = {
    "torch": ("2.1.0", "versions may round"),
    "fbopt": ("0.0.9", "versions may round"),
    "threads": (7, "torch splits some sums by the number of threads"),
    "device": ("NVIDIA H100", "another device"),
    "precision": ("matmul tf32, convolution tf32", "products are rounded"),
    "data": ("ab" * 32, "other samples or labels"),
    "chunk_order": ([1, 0], "float32 sums depend on the order of the chunks"),
    "accumulation": ("exact", "sums over the chunks"),
    "processes": (2, "float32 sums depend on how the chunks are spread"),
    "processor": ("aarch64 DEFAULT", "other instructions"),
}


def altered(first: Path, second: Path, step: int, **facts) -> None:
    """Make a copy of a run whose parameters differ from `step` on, with another environment."""
    shutil.copytree(first, second)
    folder = RunFolder(second)
    records = atomic.read_lines(folder.fingerprints)
    for record in records:
        if record["step"] >= step:
            record["parameters"] = "0" * 64
            record["tensors"]["parameters"]["stem.weight"] = "0" * 16
    atomic.replace_lines(folder.fingerprints, records)
    now = atomic.read_lines(folder.environment)[0]
    atomic.replace_lines(folder.environment, [now, now | facts | {"step": 3}])


@pytest.mark.parametrize("fact", FACTS)
def test_environments_that_differ_are_named(first, tmp_path, capsys, fact):
    """The environment that counts is that of the first different step; here one run was resumed."""
    value, why = FACTS[fact]
    altered(first, tmp_path / "late", 4, **{fact: value})
    assert run(first, tmp_path / "late") == 1
    out = capsys.readouterr().out
    assert f"likely causes:\n  {fact} " in out and why in out
    assert "parameters: stem.weight" in out
    altered(first, tmp_path / "early", 3, **{fact: value})
    assert run(first, tmp_path / "early") == 1
    assert f"  {fact} " not in capsys.readouterr().out


def test_exact_sums_do_not_depend_on_how_chunks_are_spread():
    made = {"accumulation": "exact", "threads": 1, "processes": 1, "chunk_order": "natural"}
    now = {"accumulation": "exact", "threads": 2, "processes": 3, "chunk_order": [1, 0]}
    assert changed(made, now) == [("threads", 1, 2)]
    float32 = {"accumulation": "float32"}
    assert [name for name, *_ in changed(made | float32, now | float32)] == [*now][1:]


def test_the_same_runs_are_the_same(tiny, tmp_path, first, capsys):
    shutil.copytree(first, tmp_path / "copy")
    assert run(first, tmp_path / "copy") == 0
    assert "are the same at all 7 steps that both keep (0 to 6)" in capsys.readouterr().out
    train(tiny_runs.with_noise(tiny, tmp_path / "rare", **(KEPT | {"fingerprint_every": 0})))
    assert run(first, tmp_path / "rare") == 0
    assert "are the same at all 2 steps that both keep (3 to 6)" in capsys.readouterr().out


def test_unfinished_and_damaged_runs(tiny, tmp_path, first, capsys):
    """A run that died has no result, perhaps half a line, perhaps a damaged checkpoint."""
    second = tmp_path / "second"
    altered(first, second, 3)
    (second / "result.json").unlink()
    (second / "metrics.jsonl").unlink()
    with open(second / "fingerprints.jsonl", "a") as file:
        file.write('{"step": 7, "param')
    for step in (3, 6):
        (second / f"checkpoint-{step}.pt").write_bytes(b"garbage")
    assert run(second) == 0
    assert run(first, second) == 1
    out = capsys.readouterr().out
    assert "differ first at step 3" in out
    assert "largest difference unknown: no checkpoint of step 3 or later is in both" in out


def no_options(folder: Path) -> None:
    (folder / "options.json").unlink()


def bad_options(folder: Path) -> None:
    (folder / "options.json").write_text("[")


def no_steps(folder: Path) -> None:
    (folder / "fingerprints.jsonl").unlink()


def other_steps(folder: Path) -> None:
    path = folder / "fingerprints.jsonl"
    records = [record | {"step": 50 + record["step"]} for record in atomic.read_lines(path)]
    atomic.replace_lines(path, records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "copy: is no folder; give the folder of a run"),
        (no_options, "copy: is no run's folder, as it has no readable options.json"),
        (bad_options, "copy: is no run's folder, as it has no readable options.json"),
        (no_steps, "copy: no step is kept yet; wait for a checkpoint, or train with"),
        (other_steps, "no step in common: they keep 0, 1, 2, 3, … 6, and 50, 51, 52, 53, … 56"),
    ],
)
def test_errors_are_clear(tmp_path, first, capsys, change, message):
    shutil.copytree(first, tmp_path / "copy")
    change(tmp_path / "copy")
    assert run(first, tmp_path / "copy") == 2
    error = capsys.readouterr().err
    assert error.startswith("fbopt fingerprint: ") and message in error


def test_help_and_bad_arguments(capsys):
    for arguments, status in ((["--help"], 0), ([], 2), (["a", "b", "c"], 2)):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == status
    assert "usage: fbopt fingerprint" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0 and "  fingerprint " in capsys.readouterr().out


def test_resumed_runs_keep_every_step_once(tiny, tmp_path, first, monkeypatch):
    options = tiny_runs.with_noise(tiny, tmp_path / "second", **KEPT)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        tiny_runs.die_before(patch, 5)
        train(options)
    train(Options(resume=tmp_path / "second"))
    assert run(first, tmp_path / "second") == 0
    folder = RunFolder(tmp_path / "second")
    assert [r["step"] for r in atomic.read_lines(folder.fingerprints)] == [*range(7)]
    assert [r["step"] for r in atomic.read_lines(folder.environment)] == [0, 3]
    assert json.loads((tmp_path / "second" / "options.json").read_text())["resume"] is None


def test_momenta_keep_their_names(tiny):
    """Two parameter groups number the parameters in another order than the model."""
    options = tiny_runs.with_noise(tiny, Path("never written"), "fb", decay="weights")
    trainer = Trainer(resolve(options), load(tiny), torch.device("cpu"))
    trainer.take_step()
    found = groups(trainer.state_dict())
    state = trainer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(found["momentum"][name], state[parameter]["momentum_buffer"]), name
