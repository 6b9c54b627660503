"""Checkpoint files: plain types, a checksum, and no way to load one that was damaged."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from conftest import bits

from fbopt.train.checkpoint import atomic, format, run_dir
from fbopt.train.checkpoint.atomic import WriteError
from fbopt.train.checkpoint.format import CheckpointError
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import OptionsError

OPTIONS = {"data": "digits", "seed": 0}


def state(step: int, seed: int = 0, **changes) -> dict:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    model = {f"{i}.weight": torch.randn(7 + i, 5, generator=generator) for i in range(4)}
    momenta = {i: {"momentum_buffer": -t} for i, t in enumerate(model.values())}
    parts = {
        "model": model,
        "parameters": list(model),
        "optimizer": {"state": momenta, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "options": OPTIONS | {"seed": seed},
        "rng": generator.get_state(),
    }
    return tiny_runs.checkpoint(step, **parts) | changes


def folder_with(path: Path, *steps: int, keep: int = 2, seed: int = 0) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    atomic.replace_json(folder.options, OPTIONS | {"seed": seed})
    for step in steps:
        folder.save(state(step, seed), keep)
    return folder


def same(loaded: dict, wanted: dict) -> bool:
    return bits({k: v for k, v in loaded.items() if k != "format"}) == bits(wanted)


def test_torch_loads_it_as_weights_only(tmp_path):
    folder = folder_with(tmp_path, 3)
    loaded = torch.load(folder.path_of(3), weights_only=True)
    assert same(loaded, state(3)) and same(folder.load(), state(3))


def test_the_newest_are_kept(tmp_path):
    folder = folder_with(tmp_path, 5, 9, 10, 100)
    assert [step for step, _ in folder.checkpoints()] == [100, 10]
    assert same(folder.load(), state(100))
    folder.save(state(101), keep=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint-101.pt", "options.json"]


def flip(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 5))):
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(content: bytes, rng: random.Random) -> bytes:
    few = rng.choice((0, 1, 4, 64, 78, len(content) - 1, rng.randrange(len(content))))
    return content[:few] if rng.random() < 0.5 else content[: len(content) - few]


def append(content: bytes, rng: random.Random) -> bytes:
    extra = rng.randbytes(rng.choice((1, 64, 78, 5000)))
    return content + rng.choice((extra, b"\0" * len(extra), content))


def zero(content: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(content)), rng.choice((1, 64, 512, 4096))
    end = min(len(content), start + size)
    return content[:start] + b"\0" * (end - start) + content[end:]


def remove(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 512)) :]


def other_run(content: bytes, rng: random.Random) -> bytes:
    return format.seal(state(20, seed=1 + rng.randrange(5)))


def other_file(content: bytes, rng: random.Random) -> bytes:
    plain = format.seal(state(20))[:-64] + b"0" * 64
    return rng.choice((b"", b"garbage", rng.randbytes(4000), plain))


def unsealed(content: bytes, rng: random.Random) -> bytes:
    """What torch.save writes, with no checksum or with the checksum of another file."""
    body = content[: content.rindex(b"fbopt sha256 ")]
    return rng.choice((body, body + b"fbopt sha256 " + b"ab" * 32))


DAMAGE = (flip, cut, append, zero, remove, other_run, other_file, unsealed)


@pytest.mark.parametrize("block", range(8))
def test_nothing_damaged_loads(tmp_path, capsys, block):
    """200 damaged checkpoints: the older sound one is taken, or a clear error says why not."""
    folder = folder_with(tmp_path, 10, 20)
    sound = {step: folder.path_of(step).read_bytes() for step in (10, 20)}
    for case in range(25 * block, 25 * (block + 1)):
        rng = random.Random(case)
        written = dict(sound)
        if rng.random() < 0.1:
            written = {10: sound[20], 20: sound[10]}  # exchanged
        else:
            for step in rng.choice(((20,), (20,), (10,), (10, 20))):
                written[step] = rng.choice(DAMAGE)(sound[step], rng)
        for step, content in written.items():
            folder.path_of(step).write_bytes(content)
        good = [step for step in (20, 10) if written[step] == sound[step]]
        if good:
            assert same(folder.load(), state(good[0])), case
        else:
            with pytest.raises(OptionsError, match="none of its checkpoints is sound"):
                folder.load()
        warned = capsys.readouterr().err
        bad = [step for step in (20, 10) if step not in good and step > max(good, default=0)]
        for step in bad:
            assert f"warning: {folder.path_of(step)} is passed over: it" in warned, case
        assert warned.count("\n") == len(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "it cannot be read"),
        (lambda p: p.symlink_to("nowhere"), "it cannot be read"),
        (lambda p: p.write_bytes(b""), "cut short, altered"),
        (lambda p: p.write_bytes(format.seal(state(4))[:-1]), "cut short, altered"),
        (lambda p: p.write_bytes(format.seal(state(4))), r"holds step 4: it was renamed"),
        (
            lambda p: p.write_bytes(format.seal(state(30, seed=2))),
            "belongs to another run (--seed 2, not 0)",
        ),
        (
            lambda p: p.write_bytes(format.seal(state(30, format=99))),
            "has format 99, and this version of fbopt reads 3",
        ),
    ],
)
def test_what_is_passed_over_is_named(tmp_path, capsys, make, message):
    folder = folder_with(tmp_path, 10)
    make(folder.path_of(30))
    assert same(folder.load(), state(10))
    error = capsys.readouterr().err
    assert f"warning: {folder.path_of(30)} is passed over: " in error and message in error


def fail(number: int):
    def raising(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return raising


def full_device(folder: RunFolder, monkeypatch) -> None:
    """Have the operating system itself report that there is no space."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (folder.path / run_dir.PARTIAL).symlink_to("/dev/full")


def patched(name: str, number: int):
    return lambda folder, monkeypatch: monkeypatch.setattr(atomic.os, name, fail(number))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (full_device, "No space left on device\\): free some space"),
        (patched("fsync", errno.ENOSPC), "No space left on device\\): free some space"),
        (patched("fsync", errno.EDQUOT), r"[\w ]+\): free some space"),
        (patched("fsync", errno.EIO), "Input/output error\\): check the disk"),
        (patched("replace", errno.EROFS), "Read-only file system\\): make the folder writable"),
        (patched("replace", errno.EACCES), "Permission denied\\): make the folder writable"),
    ],
)
def test_a_write_that_fails_loses_nothing(tmp_path, monkeypatch, break_it, message):
    folder = folder_with(tmp_path, 10, 20)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    break_it(folder, monkeypatch)
    with pytest.raises(WriteError, match=rf"checkpoint-30.pt cannot be written \({message}") as e:
        folder.save(state(30), 2)
    assert f"then go on from step 20 with\n  fbopt train --resume {tmp_path}" in str(e.value)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert same(folder.load(), state(20))
    folder.save(state(30), 2)
    assert [step for step, _ in folder.checkpoints()] == [30, 20]


def test_the_folder_is_synced_after_the_file(tmp_path, monkeypatch):
    """Only in this order is a checkpoint on the disk once it has its name."""
    folder, done = folder_with(tmp_path, 1), []
    kinds = {True: "sync folder", False: "sync file"}
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        atomic.os, "fsync", lambda fd: (done.append(kinds[_is_folder(fd)]), sync(fd))
    )
    monkeypatch.setattr(atomic.os, "replace", lambda *a: (done.append("rename"), rename(*a)))
    folder.save(state(2), 2)
    assert done == ["sync file", "rename", "sync folder"]


def _is_folder(fd: int) -> bool:
    import stat

    return stat.S_ISDIR(os.fstat(fd).st_mode)


WRITER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_checkpoint import RunFolder, state
folder, step = RunFolder(Path(sys.argv[1])), 20
while True:
    step += 1
    folder.save(state(step), 2)
    print(step, flush=True)
"""


def test_killed_while_it_writes_all_the_time(tmp_path):
    """SIGKILL to a process that saves all the time: the two newest checkpoints are whole."""
    folder = folder_with(tmp_path, 10, 20)
    script = WRITER.format(
        path=[p or os.getcwd() for p in (str(Path(__file__).parents[1]), *sys.path)]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        said = [int(process.stdout.readline()) for _ in range(random.Random(0).randrange(20, 60))]
    finally:
        process.kill()
        said += [int(line) for line in process.communicate()[0].splitlines()]
    steps = [step for step, _ in folder.checkpoints()]
    assert steps[0] - said[-1] in (0, 1) and steps[1] == steps[0] - 1 and len(steps) in (2, 3)
    for step in steps[:2]:
        assert same(format.read(folder.path_of(step)), state(step))


def test_what_is_no_checkpoint_is_told_so():
    for content in (b"", b"x" * 63, b"x" * 100):
        with pytest.raises(CheckpointError, match="cut short, altered"):
            format.unseal(content)
