"""Lightning's accumulation with right weights: each step is that of one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from benchmarks.tiny_language import distance
from benchmarks.trainer_lightning import quiet_trainer
from fbopt.integrations.lightning import WeightedAccumulation
from fbopt.integrations.lightning.surroundings import check

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (4, 4, 3, 4, 1, 4, 2, 4)  # samples in the batches
LR = 0.5


class Classifier(LightningModule):
    """`skips` are batches for which training_step returns None."""

    def __init__(self, skips: tuple[int, ...] = (), make: Any = torch.optim.SGD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.skips, self.make, self.before_clip = skips, make, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx in self.skips:
            return None
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, -1))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.before_clip.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=LR)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 5, generator=draw, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (n,), generator=draw),
        )
        for n in SIZES
    ]


def fit(
    module: LightningModule,
    data: Any = None,
    *callbacks: Callback,
    ckpt: Any = None,
    **arguments: Any,
) -> Trainer:
    defaults = {"precision": "64-true", "accumulate_grad_batches": 3, "max_epochs": 1}
    callbacks = callbacks or (WeightedAccumulation(),)
    trainer = quiet_trainer(callbacks=list(callbacks), **(defaults | arguments))
    loader = DataLoader(batches() if data is None else data, batch_size=None)
    trainer.fit(
        module, loader, loader if "limit_val_batches" in arguments else None, ckpt_path=ckpt
    )
    return trainer


def one_batch(windows: list[list[int]], max_norm: float | None = None) -> nn.Module:
    """Train on one batch for each window, in float64."""
    module, data = Classifier().double(), batches()
    optimizer = module.configure_optimizers()
    for window in windows:
        x, y = (torch.cat([data[i][k] for i in window]) for k in (0, 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.network(x), y).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
    return module


THREES = [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_clipping_validation_and_hooks_see_the_weighted_mean():
    module = Classifier()
    trainer = fit(module, gradient_clip_val=0.1, val_check_interval=2, limit_val_batches=2)
    assert distance(module, one_batch(THREES, max_norm=0.1)) < 1e-14
    assert trainer.global_step == 3 and "val" in trainer.callback_metrics
    first = Classifier().double()
    x, y = (torch.cat([b[k] for b in batches()[:3]]) for k in (0, 1))
    nn.functional.cross_entropy(first.network(x), y).backward()
    for seen, p in zip(module.before_clip[0], first.parameters(), strict=True):
        torch.testing.assert_close(seen, p.grad, rtol=0, atol=1e-14)


def test_the_window_may_change_between_epochs():
    module = Classifier()
    schedule = GradientAccumulationScheduler({0: 3, 1: 4})
    arguments = {"accumulate_grad_batches": 1, "max_epochs": 2}
    fit(module, None, WeightedAccumulation(), schedule, **arguments)
    assert distance(module, one_batch([*THREES, [0, 1, 2, 3], [4, 5, 6, 7]])) < 1e-14


def test_every_batch_may_be_a_step():
    module = Classifier()
    fit(module, accumulate_grad_batches=1)
    assert distance(module, one_batch([[i] for i in range(8)])) < 1e-14


@pytest.mark.parametrize("skips", [(1,), (2,), (0, 7)])
def test_batches_without_a_loss_do_not_count(skips):
    module = Classifier(skips)
    fit(module)
    expected = one_batch([[i for i in window if i not in skips] for window in THREES])
    assert distance(module, expected) < 1e-14


def test_batches_of_weight_zero_do_not_count():
    data = batches()
    data[1] = (data[1][0] * torch.nan, data[1][1])
    module = Classifier()
    weigh = WeightedAccumulation(lambda b: 0 if b[0].isnan().any() else torch.tensor(len(b[0])))
    fit(module, data, weigh)
    assert distance(module, one_batch([[0, 2], [3, 4, 5], [6, 7]])) < 1e-14


def test_parameters_that_the_optimizer_gets_later_are_weighed_too():
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Classifier) -> None:
            first = module.network[0].requires_grad_(trainer.current_epoch > 0)
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": list(first.parameters())})

    def last(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(params)[2:], lr=lr)

    ours, theirs = Classifier(make=last), Classifier(make=last)
    even = [(torch.cat([b[k], b[k]])[:4] for k in (0, 1)) for b in batches() if len(b[0]) > 1]
    even = [tuple(b) for b in even][:6]
    for module, more in ((ours, [WeightedAccumulation()]), (theirs, [])):
        module.on_before_optimizer_step = lambda optimizer: None
        fit(module, even, Unfreeze(), *more, max_epochs=2)
    assert distance(ours, theirs) < 1e-14
    assert distance(ours, Classifier().double()) > 0.01


def accumulated(dtype: torch.dtype, scale: float) -> nn.Module:
    """Train under autocast by a plain loop with the weights written out."""
    module, data = Classifier(), batches(torch.float32)
    optimizer = module.configure_optimizers()
    for window in THREES:
        total = sum(SIZES[i] for i in window)
        sums = [torch.zeros_like(p) for p in module.parameters()]
        for i in window:
            with torch.autocast("cpu", dtype=dtype):
                loss = module.training_step(data[i], i)
            grads = torch.autograd.grad(loss * scale, list(module.parameters()))
            sums = [s + g * (SIZES[i] / total / scale) for s, g in zip(sums, grads, strict=True)]
        for p, s in zip(module.parameters(), sums, strict=True):
            p.grad = s
        optimizer.step()
    return module


def test_autocast_and_loss_scale():
    module = Classifier()
    fit(module, batches(torch.float32), precision="bf16-mixed")
    assert distance(module, accumulated(torch.bfloat16, 1.0)) < 1e-6
    module = Classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, batches(torch.float32), precision=None, plugins=plugin)
    assert distance(module, accumulated(torch.float16, 2.0**10)) < 1e-6
    module = Classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # gradients overflow
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, batches(torch.float32), precision=None, plugins=plugin)
    assert distance(module, Classifier()) == 0 and scaler.get_scale() == 2.0**27


def test_what_cannot_be_weighed_is_refused():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic optimization"):
        fit(module, accumulate_grad_batches=1)
    with pytest.raises(RuntimeError, match="closure more than once"):
        fit(Classifier(make=torch.optim.LBFGS))
    with pytest.raises(ValueError, match="accumulate_grad_batches=257 has no exact value"):
        fit(Classifier(), precision="bf16-true", accumulate_grad_batches=257)

    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(RuntimeError, match="dataloader_iter"):
        fit(Iterating())
    trainer = type("T", (), {"strategy": type("FSDPStrategy", (), {})()})()
    with pytest.raises(RuntimeError, match="not with FSDPStrategy"):
        check("WeightedAccumulation", trainer, Classifier())


def test_an_exception_in_backward_leaves_nothing_open():
    class Failing(Classifier):
        fails = True

        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            if self.fails:
                raise OSError

    module, weighted = Failing(), WeightedAccumulation()
    with pytest.raises(OSError):
        fit(module, None, weighted)
    module.fails = False
    fit(module, None, weighted)
    assert distance(module, one_batch(THREES)) < 1e-14


class Resumable:
    """A loader that goes on where its checkpoint was saved, as torchdata's does."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        for position in range(self.position, len(SIZES)):
            self.position = position
            yield batches()[position]
        self.position = 0

    def __len__(self) -> int:
        return len(SIZES)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.position + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["next"]


class Save(Callback):
    """Saves a checkpoint after a batch."""

    def __init__(self, path: Path, last: int) -> None:
        self.path, self.last = path, last

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if arguments[-1] == self.last:
            trainer.save_checkpoint(self.path)


def resumable(module: Classifier, *more: Callback, ckpt: Path | None = None) -> Classifier:
    """Train for an epoch in windows of three."""
    arguments = {"precision": "64-true", "accumulate_grad_batches": 3, "max_epochs": 1}
    trainer = quiet_trainer(callbacks=[WeightedAccumulation(), *more], **arguments)
    trainer.fit(module.double(), Resumable(), ckpt_path=ckpt)  # Lightning loads before it converts
    return module


@pytest.mark.parametrize("last", [2, 4, 6])
def test_resumed_also_in_the_middle_of_a_window(last, tmp_path):
    straight = resumable(Classifier(), Save(tmp_path / "a.ckpt", last))
    assert distance(straight, one_batch(THREES)) < 1e-14
    assert distance(straight, resumable(Classifier(), ckpt=tmp_path / "a.ckpt")) == 0


def test_a_window_is_not_resumed_with_other_parameters(tmp_path):
    resumable(Classifier(), Save(tmp_path / "a.ckpt", 4))
    module = Classifier()
    module.network[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="open sums of 4 parameters, and 2 are trained now"):
        resumable(module, ckpt=tmp_path / "a.ckpt")
