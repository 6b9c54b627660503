"""The objective J = L + penalty, whose gradient p.grad holds: what a line search has to see."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from test_perturbations import WAYS, Oracle, data, network

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

PENALTIES = {
    "none": None,
    "squared norm": {},
    "norm": {"power": 1},
    "with the full gradient": {"strength": 0.5, "full_strength": 0.75},
    "the full gradient alone": {"strength": 0, "full_strength": 0.5},
}


def make(model, kind, method="central", radius=1e-3, **options):
    given = PENALTIES[kind]
    rule = None
    if given is not None:
        rule = GradientPenalty(coefficient=0.3, method=method, radius=radius, **given)
    return FullBatchClosure(model, F.cross_entropy, data(), penalty=rule, **options)


def by_hand(model, kind):
    oracle = Oracle(model, data())
    loss = oracle.mean([loss(oracle.theta) for loss in oracle.losses])
    squares = [g.square().sum() for g in oracle.grads]
    whole = oracle.whole.square().sum()
    return (
        loss
        + {
            "none": torch.zeros(()),
            "squared norm": 0.15 * oracle.mean(squares),
            "norm": 0.3 * oracle.mean([s.sqrt() for s in squares]),
            "with the full gradient": 0.15 * (oracle.mean(squares) + 1.5 * whole),
            "the full gradient alone": 0.15 * whole,
        }[kind]
    )


def test_where_the_coefficient_is_zero_the_objective_is_the_loss():
    rule = GradientPenalty(coefficient=0)
    closure = FullBatchClosure(
        network(), F.cross_entropy, data(), penalty=rule, returns="objective"
    )
    assert closure() == closure.loss == closure.objective


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("kind", PENALTIES)
def test_objective_is_the_loss_and_the_penalty(kind, ways):
    model = network()
    closure = make(model, kind, **ways)
    assert closure.objective is None and closure.loss is None
    loss = closure()
    assert closure.loss is loss
    expected = by_hand(model, kind)
    assert closure.objective.dtype == torch.float64 and closure.objective.shape == ()
    torch.testing.assert_close(closure.objective, expected, rtol=1e-12, atol=0)
    assert (kind == "none") == (abs(loss - expected) < 1e-12)
    closure.returns = "objective"
    assert torch.equal(closure(), closure.objective)
    for twin in (copy.deepcopy(closure), pickle.loads(pickle.dumps(closure))):
        assert torch.equal(twin.objective, closure.objective)


@pytest.mark.parametrize(("method", "order"), [("forward", 1), ("central", 2)])
@pytest.mark.parametrize("kind", [kind for kind in PENALTIES if kind != "none"])
def test_the_slope_is_that_of_the_objective_to_the_order_of_the_radius(kind, method, order):
    """Along a random direction, by differences of J of fourth order."""
    model = network()
    params = list(model.parameters())
    torch.manual_seed(5)
    direction = [torch.randn_like(p) for p in params]
    theta = [p.detach().clone() for p in params]

    def objective(t):
        with torch.no_grad():
            for p, a, d in zip(params, theta, direction, strict=True):
                p.copy_(a + t * d)
        return by_hand(model, kind).item()

    h = 1e-3
    true = (8 * (objective(h) - objective(-h)) - objective(2 * h) + objective(-2 * h)) / (12 * h)
    objective(0.0)
    errors = []
    for radius in (1e-1, 1e-2):
        make(model, kind, method, radius)()
        slope = sum((p.grad * d).sum() for p, d in zip(params, direction, strict=True))
        errors.append(abs(slope.item() - true))
    assert errors[0] < 0.2 * abs(true) and errors[1] < 10 ** (0.3 - order) * errors[0]


class Valley:
    """Two chunks of different curvature, c x^2 / 2 + cos(3 x) / 9."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.fill_(2.0)
        self.chunks = [torch.tensor([[c]], dtype=torch.float64) for c in (1.0, 3.0)]

    def evaluate(self, model, chunk):
        x = model.weight.sum()
        return (chunk.sum() * x.square() / 2 + torch.cos(3 * x) / 9).sum()

    def closure(self, returns):
        penalty = GradientPenalty(coefficient=2.0, method="exact")
        return FullBatchClosure(
            self.model,
            chunks=self.chunks,
            evaluate=self.evaluate,
            penalty=penalty,
            returns=returns,
        )


def searched(returns):
    """The slope after L-BFGS with a strong-Wolfe search, and how often it was evaluated."""
    task = Valley()
    closure, calls = task.closure(returns), [0]

    def counted():
        calls[0] += 1
        return closure()

    optimizer = torch.optim.LBFGS(
        task.model.parameters(), lr=1, max_iter=15, line_search_fn="strong_wolfe"
    )
    optimizer.step(counted)
    final = task.closure("objective")
    final()
    return task.model.weight.grad.abs().item(), calls[0]


def test_a_line_search_by_the_objective_ends_at_a_stationary_point():
    """By the loss, whose slope is another, the search cannot fulfil its conditions."""
    slope, calls = searched("objective")
    slope_by_loss, calls_by_loss = searched("loss")
    assert slope < 1e-6
    assert slope_by_loss > 0.1 and calls_by_loss > calls


def test_an_optimizer_s_step_returns_the_objective():
    model = network()
    closure = make(model, "squared norm", returns="objective")
    optimizer = FullBatchGD(model.parameters(), lr=0.1)
    expected = by_hand(model, "squared norm")
    torch.testing.assert_close(optimizer.step(closure), expected, rtol=1e-12, atol=0)


def test_without_a_function_there_is_no_objective():
    model = network()
    closure = FullBatchClosure(model, F.cross_entropy, data(), penalty=SharpnessAware())
    closure()
    assert closure.objective is None
    closure.penalty, closure.chunk_max_norm = None, 0.1
    closure()
    assert closure.objective is None
    closure.returns = "objective"
    with pytest.raises(ValueError, match="leave chunk_max_norm out"):
        closure()
    closure.penalty, closure.chunk_max_norm = SharpnessAware(), None
    with pytest.raises(ValueError, match="pass a GradientPenalty"):
        closure()
    with pytest.raises(ValueError, match="returns must be one of"):
        make(model, "none", returns="both")


# --- the loss alone -------------------------------------------------------------------------------


def noisy():
    return network(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3))


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_loss_only_is_the_loss_of_the_next_call_and_leaves_no_trace(ways):
    """Masks are those of the next call one by one; at once others are drawn."""
    model, seen = noisy(), []
    closure = make(model, "squared norm", observe=lambda *shown: seen.append(1), **ways)
    torch.manual_seed(3)
    closure()

    def everything():
        grads = (p.grad for p in model.parameters())
        return [bits(t) for t in (*model.state_dict().values(), *grads)]

    before = everything()
    state, count, step = torch.get_rng_state(), len(seen), closure.step
    loss = closure.loss_only()
    assert everything() == before and len(seen) == count and closure.step == step
    assert torch.equal(torch.get_rng_state(), state) and not loss.requires_grad
    if "vectorize" not in ways:
        assert torch.equal(loss, closure())


def test_loss_only_of_a_loss_that_differentiates_by_its_input():
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    points = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]

    def evaluate(model, chunk):
        x = chunk[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - x).square().mean()

    chunks = [(p,) for p in points.split(3)]
    closure = FullBatchClosure(model, chunks=chunks, evaluate=evaluate, autocast=None)
    assert torch.equal(closure.loss_only(), closure())


def test_what_loss_only_cannot_do():
    closure = FullBatchClosure(network(), F.cross_entropy, [])
    with pytest.raises(ValueError, match="chunks is empty"):
        closure.loss_only()
    inner = make(network(), "none")
    inner.loss_fn = lambda output, target: inner.loss_only() + F.cross_entropy(output, target)
    with pytest.raises(RuntimeError, match="while it is at work"):
        inner.loss_only()
    inner.loss_fn = lambda output, target: F.cross_entropy(output, target, reduction="none")
    with pytest.raises(ValueError, match="return the mean loss"):
        inner.loss_only()
