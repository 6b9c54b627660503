"""What a run needs is held against what there is, before it is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fbopt.train import memory
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.memory import available, check_fits

CPU = torch.device("cpu")


def group(folder: Path, **files: str) -> Path:
    """The files of a control group."""
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)
    return folder


def test_the_cache_of_files_counts_as_free(tmp_path: Path) -> None:
    stat = "anon 300\nfile 500\nshmem 100\n"
    held = group(tmp_path, max="1000\n", current="900\n", stat=stat)
    assert memory._left_of_group(held) == 1000 - 900 + 400
    group(tmp_path, max="max\n")
    with pytest.raises(ValueError, match="max"):
        memory._left_of_group(held)


def test_what_there_is_is_less_than_the_machine_has() -> None:
    assert 0 < available(CPU) < 2**50


@pytest.mark.parametrize(
    ("changes", "room", "message"),
    [
        ({}, 4 * 4 * 5210 - 1, "would have 5,210 parameters, which take 0 MB with their gradients"),
        ({"chunk_size": 1000}, 10**6, "--chunk-size: 1,000 samples at once take 7 MB"),
        ({"chunk_size": 100, "vectorize": 10}, 10**6, "--chunk-size: 1,000 samples at once"),
        ({"optimizer": "lbfgs", "history": 1000}, 10**6, "--history 1000 of them"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, changes, room: int, message: str) -> None:
    from fbopt.train import models

    monkeypatch.setattr(memory, "available", lambda device: room)
    options = resolve(Options(**changes))
    with torch.device("meta"):
        model = models.build("cnn", (1, 40), 10)
    samples = options.chunk_size * (options.vectorize or 1)
    with pytest.raises(OptionsError, match=message):
        check_fits(options, model, (1, 40), samples, CPU)
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    check_fits(options, model, (1, 40), samples, CPU)
