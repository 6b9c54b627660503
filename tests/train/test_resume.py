"""Resuming runs that were killed, damaged, out of disk space or made with other options."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import nn

from fbopt._random import mix
from fbopt.train import loop, models
from fbopt.train.checkpoint import atomic, format
from fbopt.train.checkpoint.atomic import WriteError
from fbopt.train.checkpoint.digest import fingerprint
from fbopt.train.checkpoint.run_dir import PARTIAL, RunFolder
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.data.dataset import Chunks
from fbopt.train.data.load import load
from fbopt.train.loop import train
from fbopt.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=40, side=8)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def final(folder: RunFolder) -> dict:
    """The fingerprint of the last checkpoint, computed from its tensors."""
    return fingerprint(folder.load())


def history(folder: RunFolder) -> tuple[list, list]:
    """The fingerprints and metrics of a run, without the times."""
    return atomic.read_lines(folder.fingerprints), tiny_runs.metrics(folder)


# --- kill and resume ------------------------------------------------------------------------------


def work(arguments: list[str], log: Path, slow_disk: bool) -> None:
    """Run `fbopt train` in this process, which the test may kill."""
    from fbopt.train.__main__ import main

    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    loop.draw_curves = lambda folder, options: False
    if slow_disk:  # so that a kill lands within the write, however fast the disk is
        sync = os.fsync
        os.fsync = lambda fd: (time.sleep(0.004), sync(fd))
    sys.exit(main(arguments))


class Victim:
    """A run that is started again and again, `--resume auto`, and killed every time but the last.

    Processes are forked from one that has imported torch already.
    """

    def __init__(self, options: Options, log: Path) -> None:
        self.folder, self.log = RunFolder(options.out), log
        self.arguments = [*tiny_runs.command_line(options), "--resume", "auto"]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fbopt.train.loop", "torchvision.models.resnet"])

    def start(self, slow_disk: bool = False) -> multiprocessing.Process:
        process = self.context.Process(target=work, args=(self.arguments, self.log, slow_disk))
        process.start()
        return process

    def kill(self, when: Callable[[], bool], slow_disk: bool) -> bool:
        """Kill a run as soon as `when` says so; return whether it died within a write."""
        process = self.start(slow_disk)
        end = time.monotonic() + 60
        while process.is_alive() and not when() and time.monotonic() < end:
            pass
        process.kill()
        process.join()
        return (self.folder.path / PARTIAL).exists()

    def finish(self) -> None:
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()


def at_random(rng: random.Random, folder: Path) -> Callable[[], bool]:
    """True some time after there is a checkpoint, however busy the machine is."""
    delay, ends = rng.uniform(0.0, 0.15), []

    def now() -> bool:
        if not ends and any(folder.glob("checkpoint-*.pt")):
            ends.append(time.monotonic() + delay)
        time.sleep(0.002)
        return bool(ends) and time.monotonic() > ends[0]

    return now


def in_a_write(rng: random.Random, folder: Path) -> Callable[[], bool]:
    """True shortly after one of the next writes of a checkpoint has begun."""
    partial, writes, delay = folder / PARTIAL, rng.randrange(1, 4), rng.uniform(0, 0.003)
    partial.unlink(missing_ok=True)
    seen = [0, False]  # writes so far, and whether one is under way

    def now() -> bool:
        there = partial.exists()
        seen[:] = seen[0] + (there and not seen[1]), there
        if seen[0] < writes:
            return False
        time.sleep(delay)
        return True

    return now


@pytest.mark.parametrize(
    ("recipe", "kills", "changes"),
    [
        ("fb-penalty", 6, {"steps": 18, "accumulation": "exact"}),
        ("sgd", 4, {"epochs": 5, "batch_size": 10, "max_norm": 0.25}),
    ],
)
def test_killed_runs_end_on_the_same_bits(tiny, tmp_path, recipe, kills, changes):
    """SIGKILL at random moments, half of them within a checkpoint's write."""
    common = {"chunk_size": 20} if recipe != "sgd" else {}
    common |= {"save_every": 2, "eval_every": 24, "cosine": 40, "device": "cpu"}
    whole = train(tiny_runs.with_noise(tiny, tmp_path / "whole", recipe, **common, **changes))
    assert whole.options.dropout and whole.options.max_norm == 0.25
    options = tiny_runs.with_noise(tiny, tmp_path / "part", recipe, **common, **changes)
    victim = Victim(options, tmp_path / "log")
    rng, within = random.Random(kills), 0
    for index in range(kills):
        slow = index % 2 == 0
        when = in_a_write(rng, options.out) if slow else at_random(rng, options.out)
        within += victim.kill(when, slow)
        if victim.folder.checkpoints():
            victim.folder.load()
    victim.finish()
    log = victim.log.read_text()
    assert within >= kills // 4, f"only {within} of {kills} kills hit a write"
    assert "resumed at step" in log and "passed over" not in log, log
    assert final(victim.folder) == final(whole.folder)
    assert history(victim.folder) == history(whole.folder)
    assert len(victim.folder.checkpoints()) == 2
    assert not (options.out / PARTIAL).exists()


# --- random draws ---------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A model that remembers the masks of its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(64, 12), nn.BatchNorm1d(12)
        self.drop, self.outer = nn.Dropout(0.4), nn.Linear(12, 3)
        self.masks = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.inner(x.flatten(1)))
        dropped = self.drop(hidden)
        if self.training:
            self.masks.append(dropped.ne(0))
        return self.outer(dropped)


ORDERS = [None, [4, 3, 2, 1, 0], *([*range(5)] for _ in range(3))]
for seed, order in enumerate(ORDERS[2:]):
    random.Random(seed).shuffle(order)


def masks(tiny, monkeypatch, order, method: str = "forward", **changes) -> tuple[list, nn.Module]:
    """The masks of 4 steps by (step, chunk), and the model after them."""
    monkeypatch.setattr(models, "build", lambda *shape: Noisy())
    defaults = {"steps": 4, "chunk_size": 8, "dropout": 0.4, "method": method}
    options = tiny_runs.options(tiny, Path("never written"), **(defaults | changes))
    trainer = Trainer(resolve(options), load(tiny), torch.device("cpu"))
    trainer.closure.chunks = Chunks(trainer.data.train, 8, order, trainer.chunks.before_chunk)
    found = {}
    for step in range(4):
        torch.rand(step)  # other draws change nothing
        trainer.model.masks.clear()
        trainer.take_step()
        passes = len(trainer.model.masks) // 5
        for place, chunk in enumerate(order or range(5)):
            found[step, chunk] = trainer.model.masks[place * passes : (place + 1) * passes]
    return found, trainer.model


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize(("method", "passes"), [("forward", 2), ("central", 3)])
def test_masks_depend_on_seed_step_and_chunk(tiny, monkeypatch, order, method, passes):
    natural, wanted = masks(tiny, monkeypatch, None, method)
    found, model = masks(tiny, monkeypatch, order, method)
    assert natural.keys() == found.keys() and len(found) == 20
    for key, drawn in natural.items():
        assert len(drawn) == passes and all(torch.equal(drawn[0], m) for m in drawn[1:])
        assert torch.equal(drawn[0], found[key][0])
    first = [drawn[0] for drawn in natural.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # float32 sums in another order
    other, _ = masks(tiny, monkeypatch, None, method, seed=1)
    assert not torch.equal(other[0, 0][0], natural[0, 0][0])


def test_seeds_are_mixed():
    keys = ((1,), (0, 1), (0, 1, 1), (0, 0, 1), (3, 1))
    seeds = [mix(seed, *key) for seed in (0, 1, 2**31) for key in keys]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds) and max(seeds) < 2**63
    assert mix(7, 3, 2) == 4461778081680116900  # in every later version too


# --- which run is resumed -------------------------------------------------------------------------


def stopped(tiny: str, out: Path, monkeypatch, step: int = 5, **changes) -> Options:
    """The options of a small run that died after `step` steps, checkpoints at every second one."""
    options = tiny_runs.options(tiny, out, steps=8, save_every=2, **changes)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        tiny_runs.die_before(patch, step)
        train(options)
    return options


def automatic(options: Options, **changes) -> Options:
    return Options(**{**vars(options), "resume": "auto", **changes})


def test_auto_begins_goes_on_and_ends(tiny, tmp_path, monkeypatch, capsys):
    whole = train(tiny_runs.options(tiny, tmp_path / "whole", steps=8))
    options = stopped(tiny, tmp_path / "part", monkeypatch, step=1)
    first = train(automatic(options, steps=8, out=tmp_path / "new"))
    assert f"no checkpoint in {tmp_path}/new/, so from the beginning" in capsys.readouterr().out
    stopped(tiny, tmp_path / "part", monkeypatch)
    second = train(automatic(options))
    out = capsys.readouterr().out
    assert f"resumed at step 4 of 8: {tmp_path}/part/checkpoint-4.pt" in out
    for result in (first, second):
        assert final(result.folder) == final(whole.folder)
    monkeypatch.setattr(Trainer, "take_step", lambda run: pytest.fail("took a step"))
    third = train(automatic(options))
    assert f"{tmp_path}/part/ is finished: test accuracy" in capsys.readouterr().out
    assert third.summary == second.summary
    assert tiny_runs.digest(third.model) == tiny_runs.digest(whole.model)
    with pytest.raises(OptionsError, match="the run is finished"):
        train(Options(resume=tmp_path / "part"))


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, monkeypatch, capsys):
    whole = train(tiny_runs.options(tiny, tmp_path / "whole", steps=8))
    options = stopped(tiny, tmp_path / "part", monkeypatch)
    newest = tmp_path / "part" / "checkpoint-4.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    result = train(automatic(options))
    said = capsys.readouterr()
    assert f"warning: {newest} is passed over: it is cut short" in said.err
    assert "resumed at step 2 of 8" in said.out
    assert final(result.folder) == final(whole.folder)
    assert [step for step, _ in result.folder.checkpoints()] == [8, 6]
    assert (tmp_path / "part" / "checkpoint-4.pt.unsound").exists()


def test_a_finished_run_with_a_damaged_end_goes_on(tiny, tmp_path):
    options = tiny_runs.options(tiny, tmp_path / "run", steps=8, save_every=3)
    first = train(options)
    wanted = final(first.folder)
    (tmp_path / "run" / "checkpoint-8.pt").write_bytes(b"")
    again = train(automatic(options))
    assert final(again.folder) == wanted and again.folder.result.exists()


def test_none_sound_is_an_error(tiny, tmp_path, monkeypatch):
    options = stopped(tiny, tmp_path / "run", monkeypatch)
    for step in (2, 4):
        (tmp_path / "run" / f"checkpoint-{step}.pt").write_bytes(b"garbage")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for again in (automatic(options), Options(resume=tmp_path / "run")):
        with pytest.raises(OptionsError, match=r"none .* is sound \(checkpoint-4.pt, checkpoint-2"):
            train(again)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change what both checkpoints hold, as another version of the program would write it."""
    for step, path in RunFolder(folder).checkpoints():
        state = format.read(path)
        change(state)
        path.write_bytes(format.seal({**state, "step": step}))


def other_model(state: dict) -> None:
    weight = state["model"].pop("0.weight")
    state["model"] |= {"kernel": weight, "2.bias": torch.zeros(9)}


def test_resume_ignores_nothing_that_it_is_given(tiny, tmp_path, monkeypatch):
    stopped(tiny, tmp_path / "run", monkeypatch)
    result = train(Options(resume=tmp_path / "run", save_every=1, keep=4, fingerprint_every=2))
    assert [step for step, _ in result.folder.checkpoints()] == [8, 7, 6, 5]
    assert result.options.lr == 0.2 and result.options.keep == 4


MISMATCHES = {
    "lr": ({"lr": 0.3}, None, "--lr 0.2, now 0.3"),
    "steps": ({"steps": 9}, None, "--steps 8, now 9"),
    "two": ({"seed": 1, "chunk_size": 16}, None, "--chunk-size 32, now 16; --seed 0, now 1"),
    "no penalty": ({"penalty": 0.0}, None, "--penalty 0.5, now none; --radius 0.01, now none"),
    "dropout": ({"dropout": 0.1}, None, "--dropout 0.0, now 0.1"),
    "at once": ({"vectorize": 2}, None, "--vectorize none, now 2"),
    "model option": ({"model": "resnet18"}, None, "--model cnn, now resnet18"),
    "data option": ({"data": "digits"}, None, "--data npz:.*tiny.npz, now digits"),
    "unknown option": (
        {}, lambda s: s["options"].update(colour="red"), "--colour red, now none",
    ),
    "data": ({}, lambda s: s.update(data="ab" * 32),
             r"is not the data that the run began with \(SHA-256 abababababab…, now [0-9a-f]{12}…"),
    "model": ({}, other_model,
              r"2.bias float32 \[9\], now float32 \[4\]; "
              r"kernel float32 \[4, 1, 5, 5\], now absent; 0.weight absent, now float32 "),
    "format": ({}, lambda s: s.update(format=99), "none of its checkpoints is sound"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatch_is_refused_with_the_difference(tiny, tmp_path, monkeypatch, case):
    changes, change, message = MISMATCHES[case]
    options = stopped(tiny, tmp_path / "run", monkeypatch, step=3)
    if change is not None:
        rewrite(tmp_path / "run", change)
    if case == "unknown option":
        (tmp_path / "run" / "options.json").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(OptionsError, match=message):
        train(automatic(options, **changes))
    if case == "unknown option":
        with pytest.raises(OptionsError, match=r"made by fbopt .* which has other options.*colour"):
            train(Options(resume=tmp_path / "run"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_other_versions_are_noted(tiny, tmp_path, monkeypatch, capsys):
    options = stopped(tiny, tmp_path / "run", monkeypatch, step=3)
    rewrite(tmp_path / "run", lambda state: state["environment"].update(torch="2.1", threads=64))
    train(automatic(options))
    out = capsys.readouterr().out
    assert f"note: torch 2.1 before, {torch.__version__} now: versions may round" in out
    assert "note: threads 64 before, 1 now: " in out


def test_a_run_keeps_its_kind_of_sums(tiny, tmp_path, monkeypatch):
    """Float32 was the default before exact was, and older runs have it in their options."""
    options = stopped(tiny, tmp_path / "run", monkeypatch, step=3, accumulation="float32")
    today = Options(**{**vars(options), "accumulation": None})
    with pytest.raises(OptionsError, match="--accumulation float32, now exact"):
        train(automatic(today, accumulation="exact"))
    assert train(automatic(today)).options.accumulation == "float32"
    fresh = Options(**{**vars(today), "out": tmp_path / "new"})
    assert train(fresh).options.accumulation == "exact"


def test_a_folder_that_is_called_auto(tiny, tmp_path, monkeypatch, capsys):
    """`--resume ./auto` is a folder; `--resume auto` is not."""
    from fbopt.train.__main__ import main

    monkeypatch.chdir(tmp_path)
    stopped(tiny, Path("auto"), monkeypatch, step=3)
    assert main(["--resume", "./auto"]) == 0
    assert "resumed at step 2 of 8: auto/checkpoint-2.pt" in capsys.readouterr().out


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that mounts it again with other settings."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(settings: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system here")

    mount("size=300k")
    yield disk, lambda settings: mount(f"remount,{settings}")
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_and_a_read_only_disk(tiny, tmp_path, small_disk, capsys):
    """A real disk runs full, is emptied, becomes read-only and writable again: nothing is lost."""
    disk, remount = small_disk
    whole = train(tiny_runs.options(tiny, tmp_path / "whole", steps=20, width=8))
    options = tiny_runs.options(
        tiny, disk / "run", steps=20, width=8, save_every=1, keep=99, resume="auto"
    )
    folder = RunFolder(disk / "run")
    with pytest.raises(WriteError, match=r"No space left on device.*free some space, then go on"):
        train(options)
    kept = folder.checkpoints()[0][0]
    assert 0 < kept < 20 and format.read(folder.path_of(kept))
    with pytest.raises(WriteError, match="No space left on device"):
        train(options)
    assert folder.checkpoints()[0][0] == kept and format.read(folder.path_of(kept))
    remount("ro")
    with pytest.raises(WriteError, match=r"Read-only file system\): make the folder writable"):
        train(options)
    with pytest.raises(OptionsError, match=r"Read-only file system\); make the folder writable"):
        train(tiny_runs.options(tiny, disk / "new"))
    remount("rw,size=8m")
    result = train(options)
    assert f"resumed at step {kept} of 20" in capsys.readouterr().out
    assert final(result.folder) == final(whole.folder)


def test_the_command_says_it_in_a_line(tiny, tmp_path, capsys, monkeypatch):
    from fbopt.train.__main__ import main

    options = stopped(tiny, tmp_path / "run", monkeypatch)

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        assert main(["--resume", str(options.out)]) == 1
    error = capsys.readouterr().err
    assert re.match(r"fbopt train: \S+ cannot be written \(No space left on device\): ", error)
    assert "then go on from step 4 with" in error and "Traceback" not in error
    assert main(["--resume", str(options.out), "--threads", "1"]) == 0
