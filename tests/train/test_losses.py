"""The losses of training beside plain cross-entropy: their equations, weights and resumed runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from fbopt.train import loop
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.curvature import training_loss
from fbopt.train.data.augment import Augmented
from fbopt.train.data.load import load
from fbopt.train.evaluate import evaluate
from fbopt.train.loop import train
from fbopt.train.losses import build_loss, build_sample_losses, sample_mean
from fbopt.train.signals import Interrupted
from fbopt.train.trainer import Trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return tiny_runs.data(tmp_path_factory.mktemp("data"), count=75, side=8)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", lambda folder, options: False)


def trainer_of(tiny: str, recipe: str = "fb", **changes) -> Trainer:
    options = tiny_runs.options(tiny, Path("never written"), recipe, **changes)
    data = load(tiny)
    if options.precision == "fp64":
        data = data.to("cpu", dtype=torch.float64)
    return Trainer(resolve(options), data, torch.device("cpu"))


def logits(samples: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    output = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return output.requires_grad_(), torch.arange(samples) % classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_the_wrong_ones_count(smoothing):
    """1/n of the sum over wrongly classified samples, and no gradient from the others."""
    output, target = logits(20)
    wrong = output.argmax(1) != target
    assert 0 < wrong.sum() < 20
    loss = sample_mean(output, target, smoothing, kind="misclassified")
    alone = F.cross_entropy(output[wrong], target[wrong], label_smoothing=smoothing)
    torch.testing.assert_close(loss, alone * wrong.sum() / 20)
    (grad,) = torch.autograd.grad(loss, output)
    assert not grad[~wrong].any() and grad[wrong].any(1).all()


def test_no_wrong_sample_is_no_loss():
    output = (10 * torch.eye(4)).requires_grad_()
    loss = sample_mean(output, torch.arange(4), kind="misclassified")
    assert loss == 0 and not torch.autograd.grad(loss, output)[0].any()
    undefined = torch.full((4, 4), torch.nan)
    assert sample_mean(undefined, torch.arange(4), kind="misclassified").isnan()
    assert sample_mean(undefined, torch.zeros(4, dtype=torch.int64), kind="misclassified").isnan()


def test_the_worst_view_counts():
    output, target = logits(18)
    target = target[:6].repeat_interleave(3)
    losses = F.cross_entropy(output, target, reduction="none").view(6, 3)
    loss = sample_mean(output, target, views=3)
    torch.testing.assert_close(loss, losses.max(1).values.mean())
    (grad,) = torch.autograd.grad(loss, output)
    worst = F.one_hot(losses.argmax(1), 3).bool().flatten()
    assert not grad[~worst].any() and grad[worst].any(1).all()


def test_the_plain_loss_is_torchs():
    output, target = logits(9)
    loss = build_loss(resolve(Options(label_smoothing=0.2)))(output, target)
    assert torch.equal(loss, F.cross_entropy(output, target, label_smoothing=0.2))


@pytest.mark.parametrize("smoothing, over", [(0.0, "all"), (0.3, "all"), (0.3, "others")])
def test_the_squared_loss_is_half_the_squared_distance(smoothing, over):
    """From the vector that the cross-entropy with label smoothing has its minimum at."""
    output, target = logits(9)
    options = resolve(Options(loss="squared", label_smoothing=smoothing, smoothing=over))
    loss = build_loss(options)
    spread = smoothing / (4 if over == "all" else 3)
    wanted = torch.full((9, 4), spread, dtype=torch.float64)
    wanted[range(9), target] = 1 - smoothing + (spread if over == "all" else 0)
    torch.testing.assert_close(wanted.sum(1), torch.ones(9, dtype=torch.float64))
    assert loss(output, target).item() == pytest.approx(((output - wanted).norm() ** 2 / 18).item())
    stacked = build_sample_losses(options)(output.T[None], target[None])
    torch.testing.assert_close(stacked[0], (output - wanted).square().sum(1) / 2)
    assert loss(output.bfloat16(), target).dtype == torch.float32


def test_the_squared_loss_is_evaluated(tiny):
    """Of the mean outputs of images and mirror images with `flip`."""
    trainer = trainer_of(tiny, loss="squared", precision="fp64")
    x, y = trainer.data.test.batch(slice(None))
    trainer.model.eval()
    error = build_loss(trainer.options)
    for flip in (False, True):
        output = (trainer.model(x) + trainer.model(x.flip(-1))) / 2 if flip else trainer.model(x)
        _, loss = evaluate(trainer.model, trainer.data.test, flip=flip, squared=True)
        assert loss == pytest.approx(error(output, y).item())


@pytest.mark.parametrize("chunk_size", [32, 75])
def test_a_step_on_the_wrong_samples(tiny, chunk_size):
    """G = Σ n_c/N g_c with ragged chunks is the gradient of the whole set's loss."""
    trainer = trainer_of(tiny, loss="misclassified", chunk_size=chunk_size, precision="fp64")
    x, y = trainer.data.train.batch(slice(None))
    output = trainer.model(x)
    wrong = output.argmax(1) != y
    assert 0 < wrong.sum() < len(y)
    expected = (F.cross_entropy(output, y, reduction="none") * wrong).sum() / len(y)
    grads = torch.autograd.grad(expected, list(trainer.model.parameters()))
    torch.testing.assert_close(trainer.closure(), expected.detach())
    for p, grad in zip(trainer.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recipe", ["sgd", "fb-clip", "fb-penalty"])
def test_a_step_with_nothing_wrong_stands_still(tiny, recipe):
    """A gradient of 0 is no NaN, neither by clipping nor by the penalty."""
    trainer = trainer_of(tiny, recipe, loss="misclassified", weight_decay=0.0)
    with torch.no_grad():
        trainer.data.train.y.copy_(trainer.model(trainer.data.train.x).argmax(1))
    before = tiny_runs.digest(trainer.model)
    while not trainer.position[0]:
        trainer.take_step()
    record = trainer.record()
    assert record["loss"] == record["gradient_norm"] == 0 and record["train_accuracy"] == 1
    assert tiny_runs.digest(trainer.model) == before


def test_views_of_a_pass(tiny):
    """Each view has draws of its own, which are those of single views in other passes."""
    view = trainer_of(tiny, augment="random", max_up=3).chunks.split
    assert isinstance(view, Augmented) and len(view) == 75
    single = replace(view, views=1)
    index = torch.tensor([7, 2, 70])
    x, y = view.batch(index, 5)
    assert y.tolist() == [label for label in single.batch(index)[1].tolist() for _ in range(3)]
    for k in range(3):
        assert torch.equal(x[k::3], single.batch(index, 15 + k)[0])
    assert torch.equal(view.batch(slice(2, 4), 5)[0], view.batch(torch.tensor([2, 3]), 5)[0])


def test_a_step_of_max_up(tiny):
    """The mean over samples of the worst of three views; accuracy is over all views."""
    trainer = trainer_of(tiny, augment="random", max_up=3, precision="fp64")
    x, y = trainer.chunks.split.batch(slice(None), 0)
    output = trainer.model(x)
    losses = F.cross_entropy(output, y, reduction="none").view(75, 3)
    expected = losses.max(1).values.mean()
    grads = torch.autograd.grad(expected, list(trainer.model.parameters()))
    torch.testing.assert_close(trainer.closure(), expected.detach())
    for p, grad in zip(trainer.model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
    right = (output.argmax(1) == y).double().mean().item()
    trainer.take_step()
    assert trainer.record()["train_accuracy"] == pytest.approx(right)


def test_curvature_is_of_single_views(tiny):
    """--track and `fbopt analyze` measure without augmentation, so without its views."""
    trainer = trainer_of(tiny, augment="random", max_up=3)
    x, y = trainer.data.train.batch(slice(None))
    expected = F.cross_entropy(trainer.model(x), y)
    assert training_loss(trainer).loss() == pytest.approx(expected.item(), rel=1e-5)


RUNS = {
    "misclassified": ("fb-penalty", {"loss": "misclassified"}),
    "squared": ("fb-penalty", {"loss": "squared"}),
    "max-up": ("fb-penalty", {"augment": "random", "max_up": 2}),
    "max-up, sgd": ("sgd", {"augment": "random", "max_up": 2, "loss": "misclassified"}),
}


@pytest.mark.parametrize("case", RUNS)
def test_resumed_is_the_same_bit_for_bit(tiny, tmp_path, monkeypatch, case):
    recipe, changes = RUNS[case]
    passes = {"epochs": 3} if recipe == "sgd" else {"steps": 4}
    options = tiny_runs.options(tiny, tmp_path / "whole", recipe, **passes, **changes)
    whole = train(options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        tiny_runs.interrupt_after(patch, 2)
        train(replace(options, out=tmp_path / "part"))
    resumed = train(Options(resume=tmp_path / "part"))
    assert tiny_runs.digest(resumed.model) == tiny_runs.digest(whole.model)
    plain = {name: getattr(Options, name) for name in changes if name != "augment"}
    other = train(replace(options, out=tmp_path / "other", **plain))
    assert tiny_runs.digest(other.model) != tiny_runs.digest(whole.model)


def test_chunks_at_once(tiny):
    """K chunks at a time, with either loss, is the step of one at a time."""
    for changes in ({"loss": "misclassified"}, {"augment": "random", "max_up": 2}):
        found = []
        for vectorize in (1, 2):
            trainer = trainer_of(tiny, "fb-penalty", vectorize=vectorize, chunk_size=25, **changes)
            trainer.take_step()
            found.append([p.detach() for p in trainer.model.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
