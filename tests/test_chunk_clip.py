"""chunk_max_norm, chunk_norms and on_pass_start of FullBatchClosure, against eager torch.

sum_c (n_c/N) g'_c min(1, max_norm / (||g'_c|| + 1e-6)),   g'_c = g_c + lambda H_c g_c
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, GradientPenalty

COEFFICIENT, SAMPLES = 0.4, 11
METHODS = [None, "forward", "central", "exact"]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def chunks(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(2, (SAMPLES,), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def closure_of(model, method=None, data=None, **given):
    penalty = method and GradientPenalty(coefficient=COEFFICIENT, method=method, radius=1e-4)
    data = chunks() if data is None else data
    return FullBatchClosure(model, F.cross_entropy, data, penalty=penalty, **given)


def eager(model, penalised, max_norm):
    """The clipped mean gradient and the mean squared norm, by double backward."""
    params = [p for p in model.parameters() if p.requires_grad]
    mean, mean_sqnorm = [torch.zeros_like(p) for p in params], 0.0
    for x, y in chunks():
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
        square = sum(g.square().sum() for g in grads)
        if penalised:
            products = torch.autograd.grad(COEFFICIENT / 2 * square, params)
            grads = [g + h for g, h in zip(grads, products, strict=True)]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        share = len(y) / SAMPLES
        mean_sqnorm += share * square.detach()
        for m, g in zip(mean, grads, strict=True):
            m += share * (max_norm / (norm + 1e-6)).clamp(max=1.0).detach() * g.detach()
    return mean, mean_sqnorm


def grads_of(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_norm", [0.05, 0.5, 1e6])  # clips all chunks, some, none
def test_each_chunk_is_clipped(method, accumulation, max_norm):
    model = network()
    closure = closure_of(model, method, accumulation=accumulation, chunk_max_norm=max_norm)
    closure()
    expected, mean_sqnorm = eager(model, method is not None, max_norm)
    tolerance = 1e-12 if method in (None, "exact") else 1e-4
    torch.testing.assert_close(grads_of(model), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(closure.mean_sqnorm, mean_sqnorm, rtol=1e-12, atol=0)


def test_those_bounds_clip_all_chunks_some_and_none():
    norms = [float(chunk_norm(chunk)) for chunk in chunks()]
    assert 0.05 < min(norms) < 0.5 < max(norms)


def chunk_norm(chunk):
    model = network()
    loss = F.cross_entropy(model(chunk[0]), chunk[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]).norm()


@pytest.mark.parametrize("method", [None, "forward", "exact"])
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_the_clip_stays_when_parameters_are_frozen_and_freed(method, accumulation):
    model = network()
    closure = closure_of(model, method, accumulation=accumulation, chunk_max_norm=0.1)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        model.zero_grad()
        closure()
        found = grads_of(model)
        model.zero_grad()
        closure_of(model, method, accumulation=accumulation, chunk_max_norm=0.1)()
        torch.testing.assert_close(found, grads_of(model), rtol=1e-12, atol=1e-14)
        assert torch.cat([g.flatten() for g in found]).norm() <= 0.1


def test_norms_are_noted_without_a_penalty_and_change_no_bit():
    results = []
    for noted in (True, False):
        model = network()
        closure = closure_of(model, chunk_norms=noted)
        results.append(bits(closure(), grads_of(model)))
        assert (closure.mean_sqnorm is not None) == noted
        if noted:
            expected = eager(model, False, 1e6)[1]
            torch.testing.assert_close(closure.mean_sqnorm, expected, rtol=1e-12, atol=0)
    assert results[0] == results[1]


def test_exact_sums_of_clipped_chunks_know_no_order():
    found = set()
    for order in itertools.permutations(chunks(torch.float32)):
        model = network(torch.float32)
        closure = closure_of(
            model, "forward", order, accumulation="exact", chunk_max_norm=0.1, chunk_norms=True
        )
        found.add(repr(bits(closure(), grads_of(model), closure.mean_sqnorm)))
    assert len(found) == 1


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_a_pass_starts_before_its_first_chunk_and_again_where_chunks_are_visited_again(
    accumulation,
):
    events = []
    tiny = [(x * 2.0**-60, y) for x, y in chunks()]  # the first units are too coarse for these
    closure = closure_of(
        network(),
        data=tiny,
        accumulation=accumulation,
        observe=lambda output, target: events.append(len(target)),
        on_pass_start=lambda: events.append("start"),
    )
    closure()
    visits = 2 if accumulation == "exact" else 1
    assert events == ["start", 4, 4, 3] * visits
    events.clear()
    closure()
    assert events == ["start", 4, 4, 3]
