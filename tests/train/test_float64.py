"""`--precision fp64`: data, model, sums, update and checkpoints in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from fbopt.train import loop
from fbopt.train.begin import build_trainer
from fbopt.train.checkpoint.run_dir import RunFolder
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.distributed import DistributedContext
from fbopt.train.loop import train
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Images of integers, so that normalising them is computed too."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (75, 3, 8, 8)).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=x, y_train=np.arange(75) % 3, x_test=x[:30], y_test=np.arange(30) % 3)
    return f"npz:{path}"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def trainer_of(tiny: str, recipe: str, **changes) -> Trainer:
    options = tiny_runs.options(tiny, Path("never written"), recipe, precision="fp64", **changes)
    return build_trainer(resolve(options), DistributedContext())[0]


@pytest.mark.parametrize("accumulation", ["exact", "float32"])
@pytest.mark.parametrize("model", ["cnn", "resnet20"])
def test_steps_against_plain_torch(tiny, model, accumulation):
    """Five steps of torch.optim.SGD on the mean over all samples, to float64's rounding."""
    trainer = trainer_of(
        tiny, "fb", model=model, chunk_size=25, accumulation=accumulation, augment="random"
    )
    twin = trainer_of(tiny, "fb", model=model, chunk_size=25, augment="random").model
    rule = {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(twin.parameters(), **rule)
    for step in range(5):
        x, y = trainer.chunks.split.batch(slice(None), step)
        assert x.dtype == torch.float64
        optimizer.param_groups[0]["lr"] = 0.2 * (0.5 + 0.1 * step)
        trainer.optimizer.param_groups[0]["lr"] = 0.2 * (0.5 + 0.1 * step)
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(twin(x[i : i + 25]), y[i : i + 25]) / 3 for i in (0, 25, 50))
        loss.backward()
        optimizer.step()
        trainer.take_step()
        assert trainer.loss.dtype == torch.float64
        assert float(trainer.loss) == pytest.approx(loss.item(), rel=1e-12)
    for p, expected in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("recipe", ["sgd", "fb-penalty"])
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, recipe):
    passes = {"epochs": 2} if recipe == "sgd" else {"steps": 4}
    options = tiny_runs.options(
        tiny, tmp_path / "whole", recipe, precision="fp64", tta="flip", ema=0.5, model="resnet20",
        **{"width": 2} | passes,
    )  # fmt: skip
    whole = train(options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 2)
        train(replace(options, out=tmp_path / "part"))
    resumed = train(Options(resume=tmp_path / "part"))
    assert tiny_runs.digest(resumed.model) == tiny_runs.digest(whole.model)
    state = RunFolder(tmp_path / "part").load()
    for part in ("model", "average"):
        dtypes = {t.dtype for t in state[part].values() if isinstance(t, torch.Tensor)}
        assert dtypes == {torch.float64, torch.int64}
    buffers = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    assert {b.dtype for b in buffers} == {torch.float64}
    float32 = train(replace(options, out=tmp_path / "other", precision="fp32"))
    metrics = [tiny_runs.metrics(run.folder)[-1]["loss"] for run in (whole, float32)]
    assert metrics[0] != metrics[1] and metrics[0] == pytest.approx(metrics[1], rel=1e-3)


def test_measured_in_float64(tiny):
    """`--track` and `fbopt analyze` measure the same model and data."""
    from fbopt.train.curvature import training_loss

    trainer = trainer_of(tiny, "fb")
    x, y = trainer.data.train.batch(slice(None))
    expected = F.cross_entropy(trainer.model(x), y).item()
    assert training_loss(trainer).loss() == pytest.approx(expected, rel=1e-13)
