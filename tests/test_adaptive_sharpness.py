"""ASAM where it differs from SAM: parameters of several dtypes, in flat buffers, frozen, unused and
zero; a layer that is scaled.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from second_points import WAYS, Oracle, data, gradient, network, parameters, relative
from torch import nn

from fbopt import FullBatchClosure, SharpnessAware
from fbopt.sharpness import ETA


def grads(model):
    return [p.grad.double() for p in model.parameters()]


def by_hand(model, chunks, rule, scale=lambda p: p.abs() + ETA):
    """The gradients of alpha = 1 and the chunks' scope, in the model's own dtypes; points are
    computed in float64.
    """
    params = list(model.parameters())
    total, found = sum(len(x) for x, _ in chunks), [torch.zeros_like(p).double() for p in params]
    for x, y in chunks:
        own = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        before = [p.detach().clone() for p in params]
        scales = [scale(p.double()) for p in before]
        scaled = [t * g.double() for t, g in zip(scales, own, strict=True)]
        norm = torch.cat([v.flatten() for v in scaled]).norm()
        with torch.no_grad():
            for p, b, t, v in zip(params, before, scales, scaled, strict=True):
                p.copy_(b.double() + rule.rho * t * v / norm)
        second = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        with torch.no_grad():
            for p, b, f, g in zip(params, before, found, second, strict=True):
                p.copy_(b)
                f += len(x) / total * g.double()
    return found


class Mixed(nn.Module):
    """Half of the parameters in float64, the others in float32."""

    def __init__(self):
        super().__init__()
        self.first, self.second = network().float(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.second(self.first(x.float()).double())


def many():
    """More small tensors than the kernels take one by one."""
    return network(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(12)))


MODELS = {
    "two dtypes": (Mixed, 1e-5),
    "many small tensors": (many, 1e-12),
    "float32": (lambda: network().float(), 1e-5),
    "bfloat16": (lambda: network().bfloat16(), 3e-2),
    "float16": (lambda: network().half(), 3e-3),
}


@pytest.mark.parametrize("ways", [*WAYS[:3], {"flatten_parameters": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_parameters(name, ways):
    make, bound = MODELS[name]
    torch.manual_seed(0)
    model = make()
    dtype = next(model.parameters()).dtype
    chunks = [(x.to(dtype), y) for x, y in data()]
    rule = SharpnessAware(rho=0.5, adaptive=True)
    expected = by_hand(model, chunks, rule)
    before = bits(model)
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=rule, **ways)
    closure()
    found, wanted = (torch.cat([g.flatten() for g in all_]) for all_ in (grads(model), expected))
    assert relative(found, wanted) < bound
    assert bits(model) == before
    plain = by_hand(model, chunks, SharpnessAware(rho=1e-300), scale=torch.zeros_like)
    assert not relative(torch.cat([g.flatten() for g in plain]), wanted) < 2 * bound


@pytest.mark.parametrize("ways", [*WAYS, {"chunk_max_norm": 0.5}], ids=str)
def test_both_back_ends_agree(backend, ways):
    """Kernels, and plain torch where there is no compiler."""
    for scope in ("chunk", "full"):
        rule = SharpnessAware(0.5, True, scope, 0.7, method="central")
        oracle, wanted = Oracle(network(), data()), []
        t, bound = oracle.theta.abs() + ETA, ways.get("chunk_max_norm", float("inf"))
        for c, g in enumerate(oracle.grads):
            v = g if scope == "chunk" else oracle.whole
            shift = 0.5 * t**2 * v / (t * v).norm()
            change = 0.35 * (oracle.at(c, shift) - oracle.at(c, -shift))
            wanted.append((g + change) * min(1, bound / ((g + change).norm() + 1e-6)))
        assert relative(gradient(rule, ways)[0], oracle.mean(wanted)) < 1e-12


def test_a_layer_that_is_scaled_before_batchnorm_gets_the_same_gradient():
    """With eta = 0: of W -> a W the loss is the same, and its gradient g / a. SAM's is another."""

    def scaled(a, **rule):
        model = network(nn.BatchNorm1d(6, eps=1e-14))
        nn.init.zeros_(model[0].bias)
        with torch.no_grad():
            model[0].weight *= a
        closure = FullBatchClosure(
            model, F.cross_entropy, data(), penalty=SharpnessAware(0.3, **rule)
        )
        closure()
        return a * model[0].weight.grad

    for scope in ("chunk", "full"):
        found = [scaled(a, scope=scope, adaptive=True, eta=0) for a in (1.0, 8.0)]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)
        sam = [scaled(a, scope=scope) for a in (1.0, 8.0)]
        assert relative(*sam) > 1e-2


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("ways", [*WAYS, {"backward": True}], ids=str)
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_parameters_of_zero_give_no_perturbation(scope, ways, method):
    """With eta = 0 there is no direction where T g = 0; -0 is zero."""
    model = network()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(-0.0 if i % 2 else 0.0)
    rule = SharpnessAware(0.5, True, scope, method=method, eta=0)
    expected = gradient(None, ways, model)[0]
    found = gradient(rule, ways, model)[0]
    assert found.isfinite().all() and expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_no_gradient_gives_no_perturbation():
    model = network()
    rule = SharpnessAware(0.5, adaptive=True)
    closure = FullBatchClosure(
        model,
        chunks=data(),
        evaluate=lambda model, chunk: 0 * F.cross_entropy(model(chunk[0]), chunk[1]),
        penalty=rule,
    )
    assert closure().item() == 0 and not any(g.any() for g in grads(model))


@pytest.mark.parametrize("ways", [{}, {"vectorize": 2}], ids=str)
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_frozen_parameters_are_neither_moved_nor_counted(scope, ways):
    """Large ones would take most of the length if they were."""
    rule, model = SharpnessAware(0.5, True, scope), network()
    with torch.no_grad():
        model[2].weight *= 100
    model[2].requires_grad_(False)
    before = bits(model)
    FullBatchClosure(model, F.cross_entropy, data(), penalty=rule, **ways)()
    assert model[2].weight.grad is None and bits(model) == before
    oracle, params = Oracle(model, data()), [p.numel() for p in model[0].parameters()]
    count, wanted = sum(params), []
    for c, g in enumerate(oracle.grads):
        v, shift = (g if scope == "chunk" else oracle.whole)[:count], torch.zeros_like(g)
        t = oracle.theta[:count].abs() + ETA
        shift[:count] = 0.5 * t**2 * v / (t * v).norm()
        wanted.append(oracle.at(c, shift)[:count])
    found = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    assert relative(found, oracle.mean(wanted)) < 1e-12


@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_a_parameter_that_is_not_finite_shows(scope):
    """In the gradients, as it would without a perturbation; and nothing else is spoiled."""
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    before = bits(model)
    closure = FullBatchClosure(
        model, F.cross_entropy, data(), penalty=SharpnessAware(0.5, True, scope)
    )
    assert closure().isnan() and bits(model) == before
    assert any(g.isnan().any() for g in grads(model))


def test_the_rule_may_change_between_calls():
    """Also its eta alone, with and without chunks at once."""
    for ways in WAYS:
        model = network()
        closure = FullBatchClosure(model, F.cross_entropy, data(), **ways)
        found = []
        for rule in (
            SharpnessAware(0.5, True),
            SharpnessAware(0.5, True, eta=0.3),
            SharpnessAware(0.5),
            SharpnessAware(0.5, True, "full"),
        ):
            closure.penalty = rule
            closure()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            assert relative(found[-1], gradient(rule, {}, network())[0]) < 1e-12
        assert all(relative(a, b) > 1e-4 for a, b in itertools.pairwise(found))
    assert torch.equal(parameters(model), parameters(network()))


def test_the_defaults_are_those_of_the_papers_and_names_are_asked_for():
    assert SharpnessAware() == SharpnessAware(0.05, False, "chunk", 1.0, method="forward", eta=0.01)
    with pytest.raises(TypeError, match="positional"):
        SharpnessAware(0.05, False, "chunk", 1.0, "central")
