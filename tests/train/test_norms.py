"""Normalisation layers in runs: statistics over chunks, chunks at once, resumed runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch

from fbopt.train import loop
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.data.load import load
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=75, side=8)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def options_of(tiny: str, out: Path, recipe: str, norm: str, **changes) -> Options:
    network = {"model": "resnet20", "width": 2, "norm": norm}
    if norm == "ghost":
        network["ghost_size"] = 10
    return tiny_runs.options(tiny, out, recipe, **network, **changes)


def trainer_of(tiny: str, recipe: str, norm: str, **changes) -> Trainer:
    options = options_of(tiny, Path("never written"), recipe, norm, **changes)
    return Trainer(resolve(options), load(tiny), torch.device("cpu"))


@pytest.mark.parametrize("vectorize", [1, 2])
def test_ghost_statistics_are_the_mean_over_chunks(tiny, vectorize):
    """After a step they are Σ n_c/N of what each chunk records by itself, shifted passes apart."""
    changes = {"chunk_size": 25, "vectorize": vectorize}
    trainer = trainer_of(tiny, "fb-penalty", "ghost", **changes)
    model, mean, var = copy.deepcopy(trainer.model), 0.0, 0.0
    model.norm.momentum = 1.0
    for x, _ in trainer.chunks:
        model(x)
        mean, var = mean + model.norm.running_mean / 3, var + model.norm.running_var / 3
    trainer.take_step()
    torch.testing.assert_close(trainer.model.norm.running_mean, mean)
    torch.testing.assert_close(trainer.model.norm.running_var, var)


@pytest.mark.parametrize("norm", ["ghost", "group", "skipinit"])
def test_chunks_at_once(tiny, norm):
    found = []
    for vectorize in (1, 3):
        trainer = trainer_of(tiny, "fb-penalty", norm, vectorize=vectorize, chunk_size=25)
        trainer.take_step()
        found.append(trainer.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["ghost", "group", "skipinit"])
@pytest.mark.parametrize("recipe", ["sgd", "fb-penalty"])
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, recipe, norm):
    passes = {"epochs": 1, "batch_size": 25} if recipe == "sgd" else {"steps": 3}
    options = options_of(tiny, tmp_path / "whole", recipe, norm, **passes)
    whole = train(options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 2)
        train(replace(options, out=tmp_path / "part"))
    resumed = train(Options(resume=tmp_path / "part"))
    assert tiny_runs.digest(resumed.model) == tiny_runs.digest(whole.model)
    assert all(p.isfinite().all() for p in whole.model.parameters())


def test_ghosts_differ_from_batchnorm(tiny):
    """In a chunk larger than a sub-batch, and in none that is not."""
    for size, same in ((15, True), (75, False)):
        found = []
        for norm in ("batch", "ghost"):
            trainer = trainer_of(tiny, "fb", norm, chunk_size=size)
            trainer.take_step()
            found.append(tiny_runs.digest(trainer.model))
        assert (found[0] == found[1]) == same
