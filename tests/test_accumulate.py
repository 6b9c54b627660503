"""GradientAccumulator: weighted means over chunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fbopt import GradientAccumulator


def params(*dtypes):
    return [nn.Parameter(torch.randn(3, 4).to(d)) for d in dtypes]


def test_mean_is_weighted():
    ps = params(torch.float64, torch.float64)
    accumulator = GradientAccumulator(ps)
    chunks = [([torch.randn_like(p) for p in ps], n) for n in (8, 8, 3)]
    for grads, n in chunks:
        accumulator.add(grads, n)
    wanted = [sum(n * g[i] for g, n in chunks) / 19 for i in range(2)]
    torch.testing.assert_close(accumulator.mean(), wanted, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(accumulator.mean(), wanted, rtol=1e-14, atol=1e-15)


def test_a_new_sum_begins_after_mean():
    ps = params(torch.float32)
    accumulator = GradientAccumulator(ps)
    accumulator.add([torch.ones(3, 4)], 2)
    accumulator.mean()
    accumulator.add([torch.full((3, 4), 5.0)], 4)
    assert torch.equal(accumulator.mean()[0], torch.full((3, 4), 5.0))


def test_missing_gradients_count_as_zero_and_stay_none_if_never_seen():
    ps = params(*[torch.float32] * 3)
    accumulator = GradientAccumulator(ps)
    accumulator.add([torch.ones(3, 4), None, None])
    accumulator.add([torch.ones(3, 4), torch.ones(3, 4), None])
    mean = accumulator.mean()
    assert torch.equal(mean[0], torch.ones(3, 4))
    assert torch.equal(mean[1], torch.full((3, 4), 0.5))
    assert mean[2] is None


def test_mixed_dtypes_keep_their_own():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    ps = params(*dtypes)
    accumulator = GradientAccumulator(ps)
    for _ in range(1000):
        accumulator.add([torch.full_like(p, 0.001) for p in ps], 1)
    for mean, dtype in zip(accumulator.mean(), dtypes, strict=True):
        assert mean.dtype == dtype
        exact = torch.tensor(0.001, dtype=dtype).double()
        # A thousand additions round in float32; the float64 ones far less.
        rounding = max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 2e-5)
        assert mean.double().sub(exact).abs().max() <= rounding * exact
    assert [s.dtype for s in accumulator._sums.views].count(torch.float32) == 3


def test_gradients_in_any_memory_layout():
    p = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    accumulator = GradientAccumulator([p])
    g = torch.randn(2, 3, 4, 5)
    accumulator.add([g], 1)
    accumulator.add([g.to(memory_format=torch.channels_last)], 1)
    accumulator.add([g[:, :1].expand(2, 3, 4, 5)], 2)
    wanted = (2 * g + 2 * g[:, :1]) / 4
    torch.testing.assert_close(accumulator.mean()[0], wanted)
    assert accumulator.mean()[0].stride() == p.stride()


def test_example_of_the_docstring():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    accumulator = GradientAccumulator(model.parameters())
    for a, b in zip(x.split(4), y.split(4), strict=True):
        loss = nn.functional.mse_loss(model(a), b)
        accumulator.add(torch.autograd.grad(loss, accumulator.params), weight=len(a))
    for p, g in zip(accumulator.params, accumulator.mean(), strict=True):
        p.grad = g
    wanted = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted))


def test_mean_of_nothing():
    with pytest.raises(RuntimeError, match="nothing was added"):
        GradientAccumulator(params(torch.float32)).mean()


def test_ten_thousand_chunks_stay_accurate():
    p = nn.Parameter(torch.zeros(64))
    accumulator = GradientAccumulator([p])
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(64, dtype=torch.float64)
    for _ in range(10_000):
        g = torch.randn(64, generator=generator)
        total += g.double()
        accumulator.add([g])
    error = (accumulator.mean()[0].double() - total / 10_000).abs().max()
    assert error < 1e-6
