"""Lightning's DDP with right weights: two processes do what one does."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("lightning")
import test_lightning_accumulation as accumulation
import test_lightning_full_batch as full_batch
import trainer_ranks
from conftest import bits
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trainer_lightning import quiet_trainer
from fbopt.integrations.lightning import FullBatchLoop, WeightedAccumulation

pytestmark = pytest.mark.usefixtures("one_thread")
DDP = {"strategy": "ddp", "devices": trainer_ranks.WORLD}
SHARES = ([0, 2, 4, 6], [1, 3, 5, 7])  # batches of each rank; windows of two are four batches
WINDOWS = [[0, 2, 1, 3], [4, 6, 5, 7]]
OPTIONS = full_batch.OPTIONS["penalty"]


class Normalised(accumulation.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.network.append(nn.BatchNorm1d(3))


def work(rank: int, folder: Path) -> dict[str, Any]:
    """Return what each test looks at."""
    own = [accumulation.batches()[i] for i in SHARES[rank]]
    window = {"accumulate_grad_batches": 2, "use_distributed_sampler": False, **DDP}
    weighted, alone, normalised = accumulation.Classifier(), accumulation.Classifier(), Normalised()
    accumulation.fit(
        weighted, own, WeightedAccumulation(), accumulation.Save(folder / "open.ckpt", 2), **window
    )
    accumulation.fit(alone, own, Callback(), **window)
    accumulation.fit(normalised, own[:2], **window, gradient_clip_val=0.1, limit_val_batches=1)
    resumed = error(
        lambda: accumulation.fit(
            accumulation.Classifier(), own, ckpt=folder / "open.ckpt", **window
        )
    )
    dealt, sampled = full_batch.Classifier(), full_batch.Classifier()
    sampled.network = accumulation.Classifier().network
    full_batch.fit(dealt, FullBatchLoop(**OPTIONS), **DDP, use_distributed_sampler=False)
    full_batch.fit(sampled, FullBatchLoop(), **DDP)
    return {
        "weighted": weighted.network,
        "by itself": alone.network,
        "normalised": bits(normalised),
        "resumed": resumed,
        "dealt": (bits(dealt.network), dealt.losses),
        "sampled": sampled.network,
        "padded": error(lambda: full_loop(21)),
        "shuffled": error(lambda: full_loop(22, shuffle=True)),
    }


def full_loop(count: int, shuffle: bool = False) -> None:
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[FullBatchLoop()], **DDP, use_distributed_sampler=not shuffle
    )
    data = TensorDataset(*(part[:count] for part in full_batch.samples()))
    trainer.fit(full_batch.Classifier(), DataLoader(data, batch_size=4, shuffle=shuffle))


def error(call: Any) -> str:
    with contextlib.suppress(SystemExit):
        try:
            call()
        except RuntimeError as raised:
            return str(raised)
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trainer_ranks.together(work, tmp_path_factory.mktemp("ranks"))


def test_windows_are_weighed_over_all_processes(found):
    expected = accumulation.one_batch(WINDOWS).network
    for rank in found:
        assert accumulation.distance(rank["weighted"], expected) < 1e-14
        assert accumulation.distance(rank["by itself"], expected) > 0.01


def test_buffers_are_those_of_the_first_process(found):
    assert found[0]["normalised"] == found[1]["normalised"]


def test_a_checkpoint_from_the_middle_of_a_window_is_refused(found):
    assert all("saved between two optimizer steps" in rank["resumed"] for rank in found)


def test_dealt_batches_are_those_of_one_process(found):
    model, losses = full_batch.by_hand(**OPTIONS)
    assert all(rank["dealt"] == (bits(model), losses) for rank in found)


def test_samples_of_a_distributed_sampler(found):
    module = full_batch.Classifier()
    module.network = accumulation.Classifier().network
    full_batch.fit(module, FullBatchLoop())
    for rank in found:
        assert accumulation.distance(rank["sampled"], module.network) < 1e-6


def test_samples_that_would_count_twice_are_refused(found):
    for rank in found:
        assert "repeats some of 21 samples" in rank["padded"]
        assert "visit every sample once" in rank["shuffled"]
