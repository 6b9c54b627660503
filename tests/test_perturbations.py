"""Every rule for second points, against products by torch.func and plain loops, in float64."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from second_points import WAYS, Oracle, data, gradient, network, parameters, relative
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

RADIUS, COEFFICIENT = 1e-4, 0.3


# --- penalties ------------------------------------------------------------------------------------

PENALTIES = {
    "squared norm": ({}, lambda o, c: o.grads[c]),
    "norm": ({"power": 1}, lambda o, c: o.grads[c] / o.grads[c].norm()),
    "with the full gradient": (
        {"strength": 0.5, "full_strength": 0.75},
        lambda o, c: o.grads[c] + 1.5 * o.whole,
    ),
    "the full gradient alone": (
        {"strength": 0, "full_strength": 0.5},
        lambda o, c: o.whole,
    ),
}


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("method", ["forward", "central", "exact"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_equal_products_with_the_hessian(kind, method, ways):
    options, direction = PENALTIES[kind]
    rule = GradientPenalty(radius=RADIUS, coefficient=COEFFICIENT, method=method, **options)
    oracle = Oracle(network(), data())
    products = [oracle.product(c, direction(oracle, c)) for c in range(5)]
    expected = oracle.whole + COEFFICIENT * oracle.mean(products)
    found, closure = gradient(rule, ways)
    assert relative(expected, oracle.whole) > 0.01
    bound = {"forward": 1e-4, "central": 1e-8, "exact": 1e-12}[method]
    assert relative(found, expected) < bound
    square = oracle.mean([g.square().sum() for g in oracle.grads])
    torch.testing.assert_close(closure.mean_sqnorm, square, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_differences_are_what_the_equation_says(kind, method):
    """To rounding, not only to the order of the radius."""
    options, direction = PENALTIES[kind]
    radius = 0.1
    rule = GradientPenalty(radius=radius, coefficient=COEFFICIENT, method=method, **options)
    oracle, found = Oracle(network(), data()), []
    for c, g in enumerate(oracle.grads):
        v = direction(oracle, c)
        shift = radius * v / v.norm()
        k = COEFFICIENT * v.norm() / radius
        if method == "forward":
            found.append(g + k * (oracle.at(c, shift) - g))
        else:
            found.append(g + k / 2 * (oracle.at(c, shift) - oracle.at(c, -shift)))
    expected = oracle.mean(found)
    for ways in WAYS:
        assert relative(gradient(rule, ways)[0], expected) < 1e-12


@pytest.mark.parametrize("ways", [{"vectorize": 2}, {"vectorize": 2, "compile": True}], ids=str)
def test_double_backward_sees_the_gradient_of_all_chunks_of_each_call(ways):
    """It is an input of the passes, and neither it nor its share is part of a function."""
    model = network()
    closure = FullBatchClosure(model, F.cross_entropy, data(), **ways)
    wholes = []
    for full_strength in (1.0, 1.0) if ways.get("compile") else (1.0, 1.0, 3.0, 0.0):
        closure.penalty = GradientPenalty(
            coefficient=0.3, method="exact", strength=1.0, full_strength=full_strength
        )
        closure()
        oracle = Oracle(model, data())
        directions = [g + full_strength * oracle.whole for g in oracle.grads]
        products = [oracle.product(c, v) for c, v in enumerate(directions)]
        expected = oracle.whole + 0.3 * oracle.mean(products)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative(found, expected) < 1e-12
        wholes.append(oracle.whole)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    assert all(relative(*pair) > 0.01 for pair in itertools.pairwise(wholes))


def test_strengths_follow_the_learning_rate():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    cases = [
        ((0.5, 0.0), 0.05, (1.0, 0.0, True)),
        ((0.5, 2.0), 0.05, (1.0, 4.0, True)),
        ((0.0, 2.0), 0.2, (0.0, 1.0, True)),
        ((0.0, 0.0), 0.0, (1.0, 0.0, True)),
    ]
    for (strength, full_strength), coefficient, direction in cases:
        rule = GradientPenalty(strength=strength, full_strength=full_strength)
        assert rule.coefficient_at(0, optimizer) == pytest.approx(coefficient)
        assert rule.direction == (*direction, None)


# --- sharpness-aware minimization -----------------------------------------------------------------


def by_hand(model, chunks, optimizer, rho, scope, alpha, eta=None):
    """A step of SAM, or of ASAM, as papers write it, accumulated over chunks."""
    params = list(model.parameters())
    total = sum(len(x) for x, _ in chunks)

    def grads(x, y):
        return torch.autograd.grad(F.cross_entropy(model(x), y), params)

    def norm(vectors):
        return torch.cat([v.flatten() for v in vectors]).norm()

    whole = [torch.zeros_like(p) for p in params]
    for x, y in chunks:
        for w, g in zip(whole, grads(x, y), strict=True):
            w += len(x) / total * g
    sums = [torch.zeros_like(p) for p in params]
    for x, y in chunks:
        first = grads(x, y)
        v = whole if scope == "full" else first
        before = [p.detach().clone() for p in params]
        scales = [1.0 if eta is None else p.abs() + eta for p in before]
        scaled = [t * d for t, d in zip(scales, v, strict=True)]
        with torch.no_grad():
            for p, t, d in zip(params, scales, scaled, strict=True):
                p += rho * t * d / norm(scaled)
        second = grads(x, y)
        with torch.no_grad():
            for p, b in zip(params, before, strict=True):
                p.copy_(b)
        for s, a, b in zip(sums, first, second, strict=True):
            s += len(x) / total * (a + alpha * (b - a))
    for p, s in zip(params, sums, strict=True):
        p.grad = s
    optimizer.step()


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("scope", ["chunk", "full"])
@pytest.mark.parametrize("eta, alpha", [(None, 1.0), (None, 0.6), (0.01, 1.0), (0.0, 0.6)])
def test_sam_is_the_plain_loop_for_twenty_steps(eta, scope, alpha, ways):
    models = [network(), network()]
    sgd = {"lr": 0.3, "momentum": 0.9}
    adaptive = {} if eta is None else {"adaptive": True, "eta": eta}
    rule = SharpnessAware(rho=0.2, scope=scope, alpha=alpha, **adaptive)
    closure = FullBatchClosure(models[0], F.cross_entropy, data(), penalty=rule, **ways)
    ours = FullBatchGD(models[0].parameters(), **sgd)
    theirs = torch.optim.SGD(models[1].parameters(), **sgd)
    for _ in range(20):
        ours.step(closure)
        by_hand(models[1], data(), theirs, 0.2, scope, alpha, eta)
    assert relative(*map(parameters, models)) < 1e-12


def shifts(oracle, rule):
    """The shift of each chunk's second point, by SAM's or ASAM's equation."""
    found = []
    for g in oracle.grads:
        v = g if rule.scope == "chunk" else oracle.whole
        t = oracle.theta.abs() + rule.eta if rule.adaptive else torch.ones_like(v)
        found.append(rule.rho * t**2 * v / (t * v).norm())
    return found


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_sam_by_central_differences(scope, adaptive):
    rule = SharpnessAware(0.2, adaptive, scope, 0.6, method="central")
    oracle, found = Oracle(network(), data()), []
    for c, (g, shift) in enumerate(zip(oracle.grads, shifts(oracle, rule), strict=True)):
        found.append(g + 0.6 / 2 * (oracle.at(c, shift) - oracle.at(c, -shift)))
    for ways in WAYS:
        assert relative(gradient(rule, ways)[0], oracle.mean(found)) < 1e-12


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_sam_is_a_product_with_the_hessian_to_the_order_of_rho(scope, adaptive, method):
    rule = SharpnessAware(RADIUS, adaptive, scope, method=method)
    oracle = Oracle(network(), data())
    products = [oracle.product(c, shift) for c, shift in enumerate(shifts(oracle, rule))]
    wanted = oracle.mean(products) / RADIUS
    bound = {"forward": 1e-4, "central": 1e-8}[method]
    for ways in WAYS:
        found, closure = gradient(rule, ways)
        assert relative((found - oracle.whole) / RADIUS, wanted) < bound
        square = oracle.mean([g.square().sum() for g in oracle.grads])
        torch.testing.assert_close(closure.mean_sqnorm, square, rtol=1e-12, atol=0)


SETTINGS = [
    (scope, adaptive, ways)
    for scope in ("chunk", "full")
    for adaptive in (False, True)
    for ways in ({"backward": True}, {"flatten_parameters": True}, {"chunk_max_norm": 1e9})
]
SETTINGS += [("chunk", False, {"compile": True}), ("full", True, {"compile": True, "vectorize": 2})]


@pytest.mark.parametrize("scope, adaptive, ways", SETTINGS, ids=str)
def test_sam_is_the_same_in_other_settings(scope, adaptive, ways):
    rule = SharpnessAware(0.2, adaptive, scope)
    assert relative(gradient(rule, ways)[0], gradient(rule, {})[0]) < 1e-12


@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_a_layer_that_is_frozen_between_calls_has_no_share_of_the_direction(scope):
    models = [network(), network()]
    rule = SharpnessAware(rho=0.2, scope=scope)
    closures = [FullBatchClosure(m, F.cross_entropy, data(), penalty=rule) for m in models]
    closures[0]()
    for model in models:
        model[0].requires_grad_(False)
    for closure in closures:
        closure()
    assert models[0][0].weight.grad is None
    assert torch.equal(models[0][2].weight.grad, models[1][2].weight.grad)


# --- what stays as it was -------------------------------------------------------------------------

RULES = {
    "norm": GradientPenalty(coefficient=0.3, power=1),
    "full": GradientPenalty(coefficient=0.3, full_strength=1.0),
    "full central": GradientPenalty(coefficient=0.3, full_strength=1.0, method="central"),
    "full exact": GradientPenalty(coefficient=0.3, full_strength=1.0, method="exact"),
    "sam": SharpnessAware(),
    "full sam": SharpnessAware(scope="full"),
    "asam": SharpnessAware(0.5, adaptive=True),
    "full central asam": SharpnessAware(0.5, adaptive=True, scope="full", method="central"),
}


class Boom(Exception):
    pass


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", RULES)
def test_nothing_but_the_gradient_changes(kind, count):
    """BatchNorm's statistics and the draws are those of the same call without second points."""
    chunks, found = data(), []
    for rule in (None, RULES[kind]):
        model = network(nn.BatchNorm1d(6), nn.Dropout(0.3))
        before = [p.clone() for p in model.parameters()]
        torch.manual_seed(3)
        closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=rule, vectorize=count)
        loss = closure()
        assert all(map(torch.equal, before, model.parameters()))
        state = torch.get_rng_state()
        found.append([bits(loss), bits(state), *(bits(b) for b in model.buffers())])
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", RULES)
def test_masks_are_the_same_in_all_passes(kind, count):
    """With rho near 0, or a coefficient near 0, other masks would make noise, not the gradient."""
    grads = []
    for rule in (None, RULES[kind]):
        if isinstance(rule, SharpnessAware):
            rule = replace(rule, rho=1e-8)
        elif rule is not None:
            rule = replace(rule, coefficient=1e-6)
        model = network(nn.Dropout(0.3))
        torch.manual_seed(3)
        FullBatchClosure(model, F.cross_entropy, data(), penalty=rule, vectorize=count)()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", RULES)
def test_a_loss_that_raises_in_any_pass_changes_nothing(kind, count):
    """The passes of a visit for G, the first and the further ones over each chunk."""
    at, calls = [0], [0]

    def loss_fn(output, target):
        calls[0] += 1
        if calls[0] == at[0]:
            raise Boom
        return F.cross_entropy(output, target)

    model = network(nn.BatchNorm1d(6), nn.Dropout(0.3))

    def made(model):
        return FullBatchClosure(model, loss_fn, data(), penalty=RULES[kind], vectorize=count)

    made(copy.deepcopy(model))()
    passes = calls[0]
    held = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in held]
    before, memory = bits(held), [t.data_ptr() for t in held]
    start = torch.get_rng_state()
    drawn = [start, *states_after_first_passes(model)]
    for at[0] in range(1, passes + 1, 1 if count == 1 else 3):
        calls[0] = 0
        torch.set_rng_state(start)
        closure = made(model)
        with pytest.raises(Boom):
            closure()
        assert bits(held) == before and [t.data_ptr() for t in held] == memory
        assert closure.step == 0
        assert count > 1 or any(torch.equal(torch.get_rng_state(), state) for state in drawn)
        calls[0] = passes
        closure()
        assert closure.step == 1
        for t, kept in zip(held, values, strict=True):
            t.data.copy_(kept)


def states_after_first_passes(model):
    """Where the random generator stands after the first pass over each chunk."""
    found = []

    def loss_fn(output, target):
        found.append(torch.get_rng_state())
        return F.cross_entropy(output, target)

    FullBatchClosure(copy.deepcopy(model), loss_fn, data())()
    return found


@pytest.mark.parametrize("kind", [kind for kind in RULES if kind != "full exact"])
def test_draws_after_a_pass_that_raises_are_those_of_the_passes_at_theta(kind):
    """Neither those of the visit for G count, nor those of further passes."""
    rule = RULES[kind]
    per_chunk = 3 if rule.method == "central" else 2
    at, calls = [0], [0]

    def loss_fn(output, target):
        calls[0] += 1
        if calls[0] == at[0]:
            raise Boom
        return F.cross_entropy(output, target)

    model = network(nn.Dropout(0.3))
    closure = FullBatchClosure(model, loss_fn, data(), penalty=rule)
    closure()  # checks of the first call run passes of their own
    torch.manual_seed(3)
    start = torch.get_rng_state()
    states = states_after_first_passes(model)
    visit = 5 if rule.direction.whole else 0
    for at[0] in range(1, visit + 5 * per_chunk + 1):
        calls[0] = 0
        torch.set_rng_state(start)
        with pytest.raises(Boom):
            closure()
        k = at[0] - visit - 1
        assert torch.equal(torch.get_rng_state(), start if k < 0 else states[k // per_chunk])


@pytest.mark.parametrize("kind", ["full", "full exact", "full sam", "full central asam"])
def test_resumed_and_copied_closures_give_the_same_bits(kind):
    for ways in WAYS:
        models = [network(), network()]
        options = {"penalty": RULES[kind], **ways}
        closures = [FullBatchClosure(m, F.cross_entropy, data(), **options) for m in models]
        optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
        for _ in range(3):
            optimizer.step(closures[0])
        models[1].load_state_dict(models[0].state_dict())
        closures[1].load_state_dict(closures[0].state_dict())
        twin = copy.deepcopy(closures[0])
        for closure in (*closures, twin):
            closure()
        grads = [[bits(p.grad) for p in m.parameters()] for m in (*models, twin.model)]
        assert grads[0] == grads[1] == grads[2]


@pytest.mark.parametrize("kind", RULES)
def test_parameters_that_are_not_used_have_no_gradient(kind):
    model = nn.ModuleDict({"used": network(), "unused": nn.Linear(2, 2)})

    def evaluate(model, chunk):
        return F.cross_entropy(model["used"](chunk[0]), chunk[1])

    FullBatchClosure(model, chunks=data(), evaluate=evaluate, penalty=RULES[kind])()
    assert model["unused"].weight.grad is None and model["used"][0].weight.grad is not None


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GradientPenalty(power=3), ValueError, "power must be 1"),
        (lambda: GradientPenalty(power=True), ValueError, "power must be 1"),
        (lambda: GradientPenalty(full_strength=-1), ValueError, "full_strength must be"),
        (lambda: GradientPenalty(full_strength="1"), TypeError, "full_strength must be"),
        (lambda: GradientPenalty(power=1, full_strength=1), ValueError, "pass power=2"),
        (lambda: SharpnessAware(rho=0), ValueError, "rho must be"),
        (lambda: SharpnessAware(rho=float("nan")), ValueError, "rho must be"),
        (lambda: SharpnessAware(alpha=-1), ValueError, "alpha must be"),
        (lambda: SharpnessAware(scope="all"), ValueError, "scope must be one of"),
        (lambda: SharpnessAware(method="exact"), ValueError, "method must be one of"),
        (lambda: SharpnessAware(adaptive=1), TypeError, "adaptive must be True or False"),
        (lambda: SharpnessAware(adaptive=True, eta=-1), ValueError, "eta must be at least 0"),
        (lambda: SharpnessAware(adaptive=True, eta="1"), TypeError, "eta must be a number"),
        (lambda: SharpnessAware(eta=0.1), ValueError, "pass adaptive=True"),
        (lambda: SharpnessAware(0.05, False, "chunk", 1.0, "central"), TypeError, "positional"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_rule_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="penalty must be a GradientPenalty, a SharpnessAware"):
        FullBatchClosure(network(), F.cross_entropy, data(), penalty=0.5)
