"""Pipes that nobody writes to or reads, for files: refused or replaced, never waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from fbopt.train.checkpoint import atomic
from fbopt.train.checkpoint.atomic import WriteError
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.dataspec import DataError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.reading import open_regular
from fbopt.train.data.load import load
from fbopt.train.ladder import tuned
from fbopt.train.reporting import plots

SECONDS = 30  # after which a test hangs


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Interrupt a system call that waits."""

    def fail(*given: object) -> None:
        raise AssertionError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("append", [False, True])
def test_a_pipe_is_no_regular_file(tmp_path, append):
    path = pipe(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is no regular file"):
        open_regular(path, append)
    with pytest.raises(OSError, match=r"no regular file|directory"):
        open_regular(tmp_path, append)
    file = tmp_path / "file"
    with open_regular(file, append=True) as out:
        out.write(b"one ")
    with open_regular(file, append=True) as out:
        out.write(b"two")
    with open_regular(file) as content:
        assert content.read() == b"one two"


def test_records_are_not_written_to_a_pipe(tmp_path):
    folder = RunFolder(tmp_path)
    pipe(folder.metrics)
    with pytest.raises(
        WriteError, match=r"metrics\.jsonl cannot be written .*no regular file.*start again"
    ):
        folder.append(folder.metrics, {"step": 1})


def test_a_pipe_in_the_way_of_a_new_file_is_removed(tmp_path):
    pipe(tmp_path / f".options.json{atomic.PARTIAL}")
    atomic.replace_json(tmp_path / "options.json", {"lr": 1})
    assert (tmp_path / "options.json").read_text() == '{\n  "lr": 1\n}\n'
    page = plots.figure(1, 1)
    plots.save(page, pipe(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_are_pipes_are_refused(tmp_path):
    pytest.importorskip("torchvision")
    listed = pipe(tmp_path / "tiny" / "val" / "val_annotations.txt")
    (tmp_path / "tiny" / "train" / "cat" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{listed}.*no regular file"):
        load(f"tinyimagenet:{tmp_path / 'tiny'}")
    batch = pipe(tmp_path / "cifar-10-batches-py" / "data_batch_2")
    with pytest.raises(DataError, match=f"{batch} is no regular file; remove it"):
        load("cifar10", folder=tmp_path)
    for part in ("train", "test"):
        (own := tmp_path / "images" / part / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(own / "0.png")
    image = pipe(own / "1.png")
    with pytest.raises(DataError, match=f"{image}: not a readable image: .*no regular file"):
        load(f"imagefolder:{tmp_path / 'images'}", 4)
    archive = pipe(tmp_path / "data.npz")
    with pytest.raises(DataError, match=r"not an .npz file of plain arrays: .*no regular file"):
        load(f"npz:{archive}")


def test_tuned_values_in_a_pipe_are_refused(tmp_path):
    with pytest.raises(OptionsError, match=r"cannot be read: .*no regular file"):
        tuned.read(pipe(tmp_path / "tuned.json"), ["fb"])


def test_a_checkpoint_that_is_a_pipe_is_passed_over(tmp_path, capsys):
    import tiny_runs

    folder = RunFolder(tmp_path)
    folder.save(tiny_runs.checkpoint(3, options={}), keep=2)
    pipe(folder.path_of(9))
    assert folder.load()["step"] == 3
    assert "checkpoint-9.pt is passed over: it cannot be read" in capsys.readouterr().err
    pipe(folder.options)
    assert folder.read_options() is None and torch.is_tensor(folder.load()["loss"])
