"""FullBatchClosure(vectorize=K): K chunks at once give what they give one by one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbopt import FullBatchClosure, GradientPenalty

SAMPLES, CHUNK = 50, 6  # eight chunks, and a ragged one of two samples


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)


def batchnorm():
    layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers), (5,)


def convolutions():
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3)), (3, 8, 8)


def deep():
    """Many small tensors, which are packed."""
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(12)]
    return nn.Sequential(*layers, nn.Linear(5, 3)), (5,)


NETWORKS = {f.__name__: f for f in (mlp, batchnorm, convolutions, deep)}


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def task(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    x, y = torch.randn(SAMPLES, *shape), torch.randint(3, (SAMPLES,))
    return model, list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))


def results(model, chunks, calls=2, **options):
    """Loss, mean_sqnorm, gradients, buffers, and what was observed in the last call."""
    model, seen = copy.deepcopy(model), []
    closure = FullBatchClosure(
        model,
        F.cross_entropy,
        chunks,
        observe=lambda *shown: seen.append(shown),
        on_pass_start=seen.clear,
        **options,
    )
    for _ in range(calls):
        loss = closure()
    shown = [t.double() for pair in seen for t in pair]
    norms = [] if closure.mean_sqnorm is None else [closure.mean_sqnorm]
    grads = [p.grad for p in model.parameters()]
    return [loss, *norms], grads, [b.double() for b in model.buffers()], shown


def require_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        a, b = (torch.cat([t.reshape(-1) for t in ts] or [torch.zeros(0)]) for ts in (ours, theirs))
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.norm()) if len(b) else 0))


@pytest.mark.parametrize("count", [2, 3, 8, 100])
@pytest.mark.parametrize("method", [None, "forward", "central", "exact"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_one_by_one(name, method, count):
    model, chunks = task(name)
    penalty = method and GradientPenalty(coefficient=0.1, method=method)
    for accumulation, bound in itertools.product(("float32", "exact"), (None, 0.3)):
        options = {"penalty": penalty, "accumulation": accumulation, "chunk_max_norm": bound}
        one_by_one = results(model, chunks, **options)
        require_equal(results(model, chunks, vectorize=count, **options), one_by_one)
