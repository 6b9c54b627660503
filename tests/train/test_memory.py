"""What a run needs is held against what there is, before it is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fbopt.train import memory
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import resolve
from fbopt.train.memory import available, check_fits
from fbopt.train.outcome import status_of

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
        ({"chunk_size": 1000}, 10**6, "--chunk-size: 1,000 samples at once take 4 MB"),
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


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet20", "vgg11", "densenet121"])
def test_the_estimate_is_what_autograd_keeps(name: str) -> None:
    from fbopt.train import models

    shape, width = (3, 32, 32), {"cnn": 4, "densenet121": 8}.get(name, 2)
    model, kept = models.build(name, shape, 10, width), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(torch.zeros(3, *shape))
    found = sum(count for _, count in kept.values())
    assert output.shape == (3, 10)
    assert found > 0
    estimate = memory._kept(model.to("meta"), (3, *shape))
    assert 0.9 * found < estimate <= found


def test_memory_that_runs_out_is_told(capsys) -> None:
    def allocate() -> int:
        return torch.empty(2**60, dtype=torch.uint8).numel()

    def on_a_gpu() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    def otherwise() -> int:
        raise RuntimeError("a fault of fbopt's own")

    for work in (allocate, on_a_gpu):
        assert status_of(work) == 1
        said = capsys.readouterr().err
        assert said.startswith("fbopt train: out of memory (")
        assert said.count("\n") == 1
        assert "give a smaller --chunk-size" in said
    with pytest.raises(RuntimeError, match="of fbopt's own"):
        status_of(otherwise)
