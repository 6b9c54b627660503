"""The evaluation of a split, alone and shared out to several processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fbopt._distributed import Collectives
from fbopt.train.data.dataset import Split
from fbopt.train.evaluate import evaluate
from fbopt.train.precision import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


class Share(Collectives):
    """One of several processes, whose sums are those of `parts` too."""

    def __init__(self, rank: int, world_size: int, parts: list[torch.Tensor]) -> None:
        super().__init__()
        self.rank, self.world_size, self.parts = rank, world_size, parts

    def all_reduce_(self, tensors) -> None:
        (found,) = tensors
        self.own = found.clone()
        for part in self.parts:
            found += part


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Split]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    return model, Split(torch.randn(101, 3, 4), torch.randint(4, (101,)))


def test_accuracy_and_loss_of_the_whole_split(case):
    model, split = case
    with torch.no_grad():
        output = model.double()(split.x.double())
    accuracy, loss = evaluate(model.float(), split, size=10)
    assert accuracy == (output.argmax(1) == split.y).double().mean()
    assert loss == pytest.approx(cross_entropy(output, split.y).item(), rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 20])  # with 20 some have no pass
def test_any_number_of_processes_finds_the_same_bits(case, world_size):
    model, split = case
    alone = evaluate(model, split, size=10)
    shares = [Share(rank, world_size, []) for rank in range(world_size)]
    for share in shares:
        evaluate(model, split, size=10, processes=share)
    passes = [int(share.own[:, 1].count_nonzero()) for share in shares]
    assert passes == [len(range(rank, 11, world_size)) for rank in range(world_size)]
    others = [share.own for share in shares[1:]]
    assert evaluate(model, split, size=10, processes=Share(0, world_size, others)) == alone
