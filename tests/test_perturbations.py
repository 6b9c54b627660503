"""Every rule for second points, against products by torch.func and plain loops, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import nn
from torch.func import functional_call, grad, jvp

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

RADIUS, COEFFICIENT = 1e-4, 0.3
WAYS = [{}, {"vectorize": 2}, {"accumulation": "exact"}, {"vectorize": 3, "accumulation": "exact"}]


def data():
    """Five chunks, the last of them ragged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(18, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (18,), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double()


class Oracle:
    """Gradients and Hessian-vector products of each chunk, and of all, as flat vectors."""

    def __init__(self, model, chunks):
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        self.theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        total = sum(len(x) for x, _ in chunks)
        self.weights = [len(x) / total for x, _ in chunks]
        self.losses = [
            lambda theta, x=x, y=y: F.cross_entropy(functional_call(model, self.part(theta), x), y)
            for x, y in chunks
        ]
        self.grads = [grad(loss)(self.theta) for loss in self.losses]
        self.whole = self.mean(self.grads)

    def part(self, theta):
        pieces = theta.split([s.numel() for s in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def mean(self, vectors):
        return sum(w * v for w, v in zip(self.weights, vectors, strict=True))

    def product(self, c, v):
        return jvp(grad(self.losses[c]), (self.theta,), (v,))[1]

    def at(self, c, shift):
        return grad(self.losses[c])(self.theta + shift)


def gradient(rule, ways, model=None, chunks=None):
    model, chunks = model or network(), chunks or data()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=rule, **ways)
    closure()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), closure


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


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


def by_hand(model, chunks, optimizer, rho, scope, alpha):
    """A step of SAM as papers write it, accumulated over chunks."""
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
        with torch.no_grad():
            for p, d in zip(params, v, strict=True):
                p += rho * d / norm(v)
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
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_sam_is_the_plain_loop_for_twenty_steps(scope, alpha, ways):
    models = [network(), network()]
    sgd = {"lr": 0.3, "momentum": 0.9}
    rule = SharpnessAware(rho=0.2, scope=scope, alpha=alpha)
    closure = FullBatchClosure(models[0], F.cross_entropy, data(), penalty=rule, **ways)
    ours = FullBatchGD(models[0].parameters(), **sgd)
    theirs = torch.optim.SGD(models[1].parameters(), **sgd)
    for _ in range(20):
        ours.step(closure)
        by_hand(models[1], data(), theirs, 0.2, scope, alpha)
    mine, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert relative(mine, other) < 1e-12


@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_sam_by_central_differences(scope):
    oracle, found = Oracle(network(), data()), []
    for c, g in enumerate(oracle.grads):
        v = g if scope == "chunk" else oracle.whole
        shift = 0.2 * v / v.norm()
        found.append(g + 0.6 / 2 * (oracle.at(c, shift) - oracle.at(c, -shift)))
    rule = SharpnessAware(rho=0.2, scope=scope, alpha=0.6, method="central")
    for ways in WAYS:
        assert relative(gradient(rule, ways)[0], oracle.mean(found)) < 1e-12


@pytest.mark.parametrize(
    "ways",
    [{"backward": True}, {"flatten_parameters": True}, {"chunk_max_norm": 1e9}, {"compile": True}],
    ids=str,
)
@pytest.mark.parametrize("scope", ["chunk", "full"])
def test_sam_is_the_same_in_other_settings(scope, ways):
    rule = SharpnessAware(rho=0.2, scope=scope)
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
    "sam": SharpnessAware(),
    "full sam": SharpnessAware(scope="full"),
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
            rule = SharpnessAware(rho=1e-8, scope=rule.scope)
        elif rule is not None:
            options = {**vars(rule), "coefficient": 1e-6}
            rule = GradientPenalty(**options)
        model = network(nn.Dropout(0.3))
        torch.manual_seed(3)
        FullBatchClosure(model, F.cross_entropy, data(), penalty=rule, vectorize=count)()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("kind", RULES)
def test_a_loss_that_raises_in_any_pass_changes_nothing(kind):
    at, calls = [0], [0]

    def loss_fn(output, target):
        calls[0] += 1
        if calls[0] == at[0]:
            raise Boom
        return F.cross_entropy(output, target)

    model = network(nn.BatchNorm1d(6), nn.Dropout(0.3))
    closure = FullBatchClosure(model, loss_fn, data(), penalty=RULES[kind])
    copy.deepcopy(closure)()
    kept = copy.deepcopy(closure)
    kept()
    passes = calls[0] // 2
    calls[0] = 0
    before = [bits(t) for t in (*model.parameters(), *model.buffers())]
    for at[0] in range(1, passes + 1):
        calls[0] = 0
        with pytest.raises(Boom):
            closure()
        assert [bits(t) for t in (*model.parameters(), *model.buffers())] == before
        assert closure.step == 0
    at[0] = 0
    closure()
    assert closure.step == 1


@pytest.mark.parametrize("kind", ["full", "full sam"])
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
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_rule_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="penalty must be a GradientPenalty, a SharpnessAware"):
        FullBatchClosure(network(), F.cross_entropy, data(), penalty=0.5)
