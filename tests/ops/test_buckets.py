"""Packing many small tensors changes the cost of a call, and no bit of its result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty
from fbopt._ops import buckets
from fbopt._ops.buckets import FlatBuckets


class Many(nn.Module):
    """Small parameters of several shapes, and dtypes if asked for; some get strided gradients."""

    def __init__(self, mixed):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 4), (4,), (), (0,), (2, 3, 2)] * 8
        dtypes = [torch.float32, torch.float64 if mixed else torch.float32]
        self.parts = nn.ParameterList(
            torch.randn(shape, generator=generator).to(dtypes[i % 2])
            for i, shape in enumerate(shapes)
        )

    def forward(self, x):
        total = x.new_zeros(())
        for p in self.parts:
            total = (
                total
                + (x.mean() * p.transpose(0, -1) if p.dim() == 3 else x.sum() * p).tanh().sum()
            )
        return total + self.parts[0].expand(5, 3, 4).square().mean()


def run(method, mixed, monkeypatch, count):
    monkeypatch.setattr(buckets, "PACK_COUNT", count)
    model = Many(mixed)
    optimizer = FullBatchGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
    penalty = method and GradientPenalty(coefficient=0.1, method=method)
    chunks = torch.linspace(-1, 1, 10).split(4)
    closure = FullBatchClosure(
        model, chunks=chunks, evaluate=lambda m, x: m(x).square(), penalty=penalty
    )
    losses = [optimizer.step(closure) for _ in range(3)]
    parts = closure.sums.buckets.gather([p.detach() for p in model.parts], "x")
    packed = [len(part) == 1 for part in parts]
    return losses, [p.detach() for p in model.parts], [p.grad for p in model.parts], packed


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", [None, "forward", "central", "exact"])
def test_packed_and_listed_give_the_same(method, mixed, monkeypatch):
    *packed, packs = run(method, mixed, monkeypatch, 16)
    *listed, lists = run(method, mixed, monkeypatch, 1000)
    assert all(packs) and not any(lists)
    torch.testing.assert_close(packed, listed, rtol=1e-6, atol=1e-7)


def test_what_is_packed():
    small = [torch.zeros(16) for _ in range(20)]
    assert FlatBuckets(small).gather(small, "x")[0][0].numel() == 320
    for others in (small[:10], [*small, torch.zeros(100_000)]):
        assert len(FlatBuckets(others).gather(others, "x")[0]) == len(others)
    transposed = [*small, torch.zeros(3, 4).T]
    assert len(FlatBuckets(transposed).gather(transposed, "x")[0]) == 21


def test_slots_do_not_share_memory():
    params = [nn.Parameter(torch.zeros(4)) for _ in range(20)]
    groups = FlatBuckets(params)
    ones, twos = ([torch.full((4,), v) for _ in params] for v in (1.0, 2.0))
    (first,), (second,) = groups.gather(ones, "a")[0], groups.gather(twos, "b")[0]
    assert torch.equal(first, torch.ones(80))
    assert torch.equal(second, torch.full((80,), 2.0))


def test_accumulator_with_many_small_parameters():
    params = [nn.Parameter(torch.zeros(2, 3)) for _ in range(30)]
    accumulator = GradientAccumulator(params)
    grads = [torch.full((3, 2), float(i)).T for i in range(30)]
    accumulator.add([None, *grads[1:]], 3)
    accumulator.add(grads, 1)
    for i, mean in enumerate(accumulator.mean()):
        assert torch.equal(mean, torch.full((2, 3), float(i)))
