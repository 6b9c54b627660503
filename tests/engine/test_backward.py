"""FullBatchClosure(backward=True): through loss.backward(), equal to torch.autograd.grad's."""

from __future__ import annotations

import pytest
import torch
from conftest import bits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty

FORWARD = GradientPenalty(coefficient=0.3)
CENTRAL = GradientPenalty(coefficient=0.3, method="central")
GIVEN = {
    "plain": {},
    "exact sums": {"accumulation": "exact"},
    "norms": {"chunk_norms": True},
    "clip": {"chunk_max_norm": 0.1},
    "forward": {"penalty": FORWARD},
    "central": {"penalty": CENTRAL, "chunk_max_norm": 0.1},
    "exact penalty sums": {"penalty": FORWARD, "accumulation": "exact"},
}


class Net(nn.Module):
    """BatchNorm, dropout and a parameter without gradient; `reentrant` checkpoints two layers."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.reentrant = reentrant
        self.double()

    def middle(self, x):
        return torch.tanh(self.second(x)) + self.second(x)

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(self.middle(x)))
        for _ in range(2):
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


def data(sizes=(5, 4, 3)):
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in sizes]
    return [(x, torch.randint(0, 3, (len(x),), generator=generator)) for x in xs]


def train(model, **given):
    torch.manual_seed(5)
    optimizer = FullBatchGD(model.parameters(), lr=0.3, momentum=0.9)
    closure = FullBatchClosure(model, F.cross_entropy, data(), optimizer=optimizer, **given)
    losses = [optimizer.step(closure) for _ in range(2)]
    grads = [p.grad for p in model.parameters()]
    assert grads[-3] is not None and model.unused.grad is None
    return [*losses, closure.mean_sqnorm, *grads, *model.state_dict().values()]


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_same_as_autograd_grad(given):
    assert bits(train(Net(), **given)) == bits(train(Net(), backward=True, **given))


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_reentrant_checkpoints(given):
    plain, reentrant = train(Net(False), **given), train(Net(True), backward=True, **given)
    for a, b in zip(plain, reentrant, strict=True):
        assert a is b or torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-12)


def test_the_error_of_reentrant_checkpoints_names_the_cure():
    with pytest.raises(RuntimeError, match=r"use_reentrant=False.*backward=True"):
        FullBatchClosure(Net(True), F.cross_entropy, data())()


def test_other_gradients_stay_as_they_were():
    model, point = Net(), torch.ones(6, dtype=torch.float64, requires_grad=True)
    coefficient = torch.ones((), dtype=torch.float64, requires_grad=True)
    kept = model.first[0].weight
    kept.grad = old = torch.full_like(kept, 3.0)
    closure = FullBatchClosure(
        model,
        chunks=[(x, y, x.clone().requires_grad_()) for x, y in data()],
        evaluate=lambda m, c: F.cross_entropy(m(c[0] + point + c[2]), c[1]) * coefficient,
        params=model.last.parameters(),
        backward=True,
    )
    closure()
    assert kept.grad is old and bool((old == 3).all())
    assert point.grad is None and coefficient.grad is None and model.second.weight.grad is None
    assert all(chunk[2].grad is None for chunk in closure.chunks)
    assert model.last.weight.grad is not None

    def fail(model, chunk):
        loss = model(chunk[0]).sum()
        loss.register_hook(lambda grad: 1 / 0)
        return loss

    closure.evaluate = fail
    with pytest.raises(ZeroDivisionError):
        closure()
    assert kept.grad is old and model.last.weight.grad is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_what_does_not_go_together():
    given = Net(), F.cross_entropy, data()
    with pytest.raises(ValueError, match=r"method='exact'.*'forward'"):
        FullBatchClosure(*given, penalty=GradientPenalty(method="exact"), backward=True)
    with pytest.raises(ValueError, match="leave cuda_graph out"):
        FullBatchClosure(*given, cuda_graph=True, backward=True)
    with pytest.raises(TypeError, match="backward must be True or False"):
        FullBatchClosure(*given, backward=1)
    closure = FullBatchClosure(*given, backward=True)
    with GradientAccumulator(given[0].parameters()).chunk():
        with pytest.raises(RuntimeError, match="taken already"):
            closure()
        given[0](data()[0][0]).sum().backward()
    closure()
