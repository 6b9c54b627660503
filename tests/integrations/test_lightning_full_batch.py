"""FullBatchLoop: Lightning's epochs are the steps of a FullBatchClosure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
from conftest import bits
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from benchmarks.trainer_lightning import quiet_trainer
from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.integrations.lightning import FullBatchLoop

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES, SIZE, STEPS = 22, 8, 4
OPTIONS = {
    "plain": {},
    "penalty": {"penalty": GradientPenalty(), "accumulation": "exact"},
    "backward": {"backward": True},
    "clip": {"chunk_max_norm": 0.1, "chunk_norms": True},
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def samples() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(SAMPLES, 5, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)


def chunks() -> list[tuple[Tensor, Tensor]]:
    x, y = samples()
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=SIZE, **options)


class Classifier(LightningModule):
    """`fails` lets training_step raise."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.network = network()
        self.make = make or (lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9))
        self.counted, self.totals = SumMetric(), MetricCollection({"mean": MeanMetric()})
        self.losses: list[float] = []
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        if self.fails and batch_idx == 1:
            raise OSError
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        self.counted(len(batch[0]))
        self.totals(loss.detach(), weight=len(batch[0]))
        self.log("counted", self.counted)
        self.log_dict(self.totals)
        return {"loss": loss}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def validation_step(self, batch: Any) -> None:
        self.log("val", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(
    module: LightningModule, loop: FullBatchLoop, *more: Any, ckpt: Any = None, **arguments: Any
) -> Trainer:
    trainer = quiet_trainer(**({"max_epochs": STEPS} | arguments), callbacks=[loop, *more])
    data = loader()
    trainer.fit(module, data, data if arguments.get("limit_val_batches") else None, ckpt_path=ckpt)
    return trainer


def by_hand(
    steps: int = STEPS, make: Any = None, max_norm: float = 0.0, visited: int = 3, **options: Any
) -> tuple[nn.Module, list[float]]:
    model, losses = network(), []
    optimizer = (make or Classifier().make)(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    loss_fn = nn.functional.cross_entropy
    closure = FullBatchClosure(model, loss_fn, chunks()[:visited], optimizer=optimizer, **options)

    def clipped() -> Tensor:
        loss = closure()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return loss

    for _ in range(steps):
        losses.append(float(optimizer.step(clipped)))
        schedule.step()
    return model, losses


@pytest.mark.parametrize("name", OPTIONS)
def test_epochs_are_the_closures_steps(name):
    module, loop = Classifier(), FullBatchLoop(**OPTIONS[name])
    trainer = fit(module, loop, gradient_clip_val=0.1, limit_val_batches=1.0)
    model, losses = by_hand(max_norm=0.1, **OPTIONS[name])
    assert bits(module.network) == bits(model)
    assert module.losses == losses
    assert trainer.global_step == loop.closure.step == trainer.current_epoch == STEPS
    assert trainer.limit_train_batches == 1.0 and "training_step" not in vars(module)
    if name == "clip":
        assert loop.closure.mean_sqnorm > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_logs_and_metrics_count_every_sample_once(name):
    logged = fit(Classifier(), FullBatchLoop(**OPTIONS[name]), max_epochs=1).callback_metrics
    _, (loss,) = by_hand(1, **OPTIONS[name])
    assert logged["counted"] == SAMPLES
    for key in ("loss", "mean", "full_batch_loss"):
        torch.testing.assert_close(logged[key].item(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda params: FullBatchGD(params, lr=0.5)])
def test_other_optimizers(make):
    module = Classifier(make)
    fit(module, FullBatchLoop(), max_epochs=2)
    model, _ = by_hand(2, make)
    assert bits(module.network) == bits(model)


@pytest.mark.parametrize(("limit", "visited"), [(2, 2), (0.7, 2), (1.0, 3)])
def test_the_limit_of_train_batches_limits_the_chunks(limit, visited):
    module = Classifier()
    trainer = fit(module, FullBatchLoop(), limit_train_batches=limit)
    assert bits(module.network) == bits(by_hand(visited=visited)[0])
    assert trainer.limit_train_batches == limit


def test_resumed_bit_for_bit(tmp_path):
    options = {"penalty": GradientPenalty(), "accumulation": "exact"}
    best = ModelCheckpoint(tmp_path, monitor="full_batch_loss", save_last=True)
    fit(Classifier(), FullBatchLoop(**options), best, max_epochs=2, enable_checkpointing=True)
    module, loop = Classifier(), FullBatchLoop(**options)
    fit(module, loop, ckpt=tmp_path / "last.ckpt")
    model, losses = by_hand(**options)
    assert bits(module.network) == bits(model) and loop.closure.step == STEPS
    assert module.losses == losses[2:] and best.best_model_score.item() in losses


def test_autocast_is_the_closures_own():
    module, options = Classifier(), OPTIONS["penalty"]
    fit(module, FullBatchLoop(**options), precision="bf16-mixed")
    assert bits(module.network) == bits(by_hand(autocast=torch.bfloat16, **options)[0])


def test_an_exception_leaves_module_and_trainer_as_they_were():
    module, loop = Classifier(), FullBatchLoop()
    module.fails = True
    before = bits(module.network)
    with pytest.raises(OSError):
        fit(module, loop)
    assert bits(module.network) == before
    changed = {"training_step", "log", "require_backward_grad_sync"}  # the last is DDP's
    assert not changed & vars(module).keys()
    module.fails = False
    fit(module, loop)
    assert bits(module.network) == bits(by_hand()[0])


def test_what_a_full_batch_step_cannot_be_is_refused():
    with pytest.raises(TypeError, match="on to its closure, not penalties"):
        FullBatchLoop(penalties=None)
    with pytest.raises(RuntimeError, match="leave out accumulate_grad_batches"):
        fit(Classifier(), FullBatchLoop(), accumulate_grad_batches=2)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="bf16-mixed"):
        fit(Classifier(), FullBatchLoop(), plugins=plugin)
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic optimization"):
        fit(module, FullBatchLoop())
    trainer = quiet_trainer(max_epochs=1, callbacks=[FullBatchLoop()])
    with pytest.raises(RuntimeError, match="one train dataloader"):
        trainer.fit(Classifier(), [loader(), loader()])
