"""Flows of RMSProp: ODE solutions, what holds the edge to first order, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_flow import dense_loss, small
from torch import nn

from fbopt.analysis import Flow
from fbopt.analysis.flow_edge import Edge, hold
from fbopt.analysis.flow_rules import RMSProp, rule_of

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr, alpha=0.9, eps=1e-3),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.0, 0.9), eps=1e-3),
}


def after(name: str, steps: int, lr: float = 0.01):
    """A small case and its optimizer, after so many steps."""
    case = small()
    optimizer = RULES[name](case.model.parameters(), lr)
    gradient = torch.func.grad(dense_loss(case))
    for _ in range(steps):
        found = gradient(case.objective().theta())
        for p, part in zip(case.model.parameters(), case.objective().unflatten(found), strict=True):
            p.grad = part.clone()
        optimizer.step()
    return case, optimizer


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [0, 3])
def test_nu_is_that_of_the_next_step(name, steps):
    case, optimizer = after(name, steps)
    rule = rule_of(case.objective(), optimizer)
    case, optimizer = after(name, steps + 1)
    key = "exp_avg_sq" if name == "adam" else "square_avg"
    state = [optimizer.state[p][key].flatten() for p in case.model.parameters()]
    bias = 1 - 0.9 ** (steps + 1) if name == "adam" else 1.0
    torch.testing.assert_close(rule.nu, torch.cat(state) / bias)
    torch.testing.assert_close(rule.scale(rule.nu), (torch.cat(state) / bias).sqrt() + 1e-3)


@pytest.mark.parametrize("name", RULES)
def test_the_gradient_flow_solves_the_differential_equation(name):
    from scipy.integrate import solve_ivp

    case, optimizer = after(name, 3)
    target, size = case.objective(), case.objective().size
    slope = torch.func.grad(dense_loss(case))
    flow = Flow(target, optimizer, substeps=4)
    kappa = 0.1 / 0.9

    def ode(t, state):
        theta, nu = torch.from_numpy(state).split(size)
        g, weight = slope(theta), 1 - 0.9**4 * math.exp(-kappa * t) if name == "adam" else 1.0
        moved = -0.01 * g / (nu.sqrt() + 1e-3), kappa / weight * (g * g - nu)
        return torch.cat(moved).numpy()

    start = torch.cat([target.theta(), rule_of(target, optimizer).nu]).numpy()
    exact = solve_ivp(ode, (0, 6), start, rtol=1e-11, atol=1e-13).y[:size, -1]
    before = target.theta().numpy()
    flow.advance(6)
    assert np.linalg.norm(target.theta().numpy() - exact) < 1e-5
    assert np.linalg.norm(exact - before) > 0.05


@pytest.mark.parametrize("name", RULES)
def test_what_holds_the_edge_is_right_to_first_order(name):
    """After a short sub-step ``u.((2/lr P - H) u)`` is h S, with terms of P', H' and Sigma."""
    case, optimizer = after(name, 4)
    target = case.objective()
    hessian, theta = torch.func.hessian(dense_loss(case)), target.theta()
    root = rule_of(target, optimizer).scale(rule_of(target, optimizer).nu).rsqrt()
    values, found = torch.linalg.eigh(root[:, None] * hessian(theta) * root)
    lr = float(2 / values[-1])
    for group in optimizer.param_groups:
        group["lr"] = lr
    rule, limit = rule_of(target, optimizer), 2 / lr
    basis = (found[:, -3:].flip(1).T * root).contiguous()
    # As if all three were at the edge, and nothing of the length to spare.
    edge = Edge.without_oscillation(np.full(3, limit), basis)
    errors = []
    for length in (1e-3, 5e-4):
        held = hold(target, rule, edge, 0.0, length)
        gradient = target.gradient()
        step = -lr * (gradient + held.drift) / rule.scale(rule.nu)
        nu = rule.nu + length * rule.slope(gradient**2 + held.squares, 0.0, rule.nu)
        change = basis @ (
            limit * torch.diag(rule.scale(nu) - rule.scale(rule.nu))
            - (hessian(theta + length * step) - hessian(theta))
        ) @ basis.T  # fmt: skip
        assert np.abs(held.edge.covariance).max() > 0
        errors.append(float((change / length - torch.from_numpy(held.edge.slack)).norm()))
        size = float(change.norm()) / length
    assert errors[0] < 0.05 * size and errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("name", RULES)
def test_the_central_flow_holds_the_edge(name):
    """At a rate at which the gradient flow passes it."""
    ends = {}
    for kind in ("gradient", "central"):
        case, optimizer = after(name, 20)
        target = case.objective()
        for group in optimizer.param_groups:
            group["lr"] = 2 / (1.02 * Flow(target, optimizer).sharpness)
        flow = Flow(target, optimizer, kind, substeps=4)
        flow.advance(25)
        ends[kind] = flow.sharpness / flow.limit
        if kind == "central":
            assert flow.edge.excess_loss > 0
    assert ends["gradient"] > 1.02 and ends["central"] < 1.001, ends


def test_the_stable_flow_stands_still_along_what_is_unstable():
    case, optimizer = after("rmsprop", 4, lr=0.01)
    flow = Flow(case.objective(), optimizer, "stable")
    for group in optimizer.param_groups:
        group["lr"] = 2.2 / flow.sharpness
    target = case.objective()
    flow = Flow(target, optimizer, "stable")
    assert flow.sharpness > flow.limit
    rule, before = rule_of(target, optimizer), target.theta()
    flow._substep(0.0, 1e-3)
    moved = target.theta() - before
    along = flow.edge.vectors @ (rule.scale(rule.nu) * moved)
    free = rule.lr * 1e-3 * (flow.edge.vectors @ Flow(case.objective(), 0.1).objective.gradient())
    assert abs(along).max() < 1e-2 * abs(free).max() and moved.norm() > 0


REFUSED = {
    "momentum": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "centered": lambda p: torch.optim.RMSprop(p, centered=True),
    r"betas\[0\]": lambda p: torch.optim.Adam(p),
    "weight_decay": lambda p: torch.optim.AdamW(p, betas=(0.0, 0.9)),
    "amsgrad": lambda p: torch.optim.Adam(p, betas=(0.0, 0.9), amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "has to have all parameters": lambda p: torch.optim.SGD(list(p)[:1], lr=0.1),
    "needs one above 0": lambda p: torch.optim.RMSprop(p, alpha=0.0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_steps_are_refused(words):
    case = small()
    with pytest.raises(ValueError, match=words):
        Flow(case.objective(), REFUSED[words](case.model.parameters()))


def test_other_optimizers_and_plain_ones():
    case = small()
    with pytest.raises(TypeError, match="Adagrad"):
        Flow(case.objective(), torch.optim.Adagrad(case.model.parameters()))
    paths = []
    for lr in (0.1, "optimizer"):
        case = small()
        given = torch.optim.SGD(case.model.parameters(), lr=0.1) if lr == "optimizer" else lr
        target = case.objective()
        Flow(target, given).advance(3)
        paths.append(target.theta())
    assert torch.equal(*paths)


def test_zero_gradients_keep_a_finite_flow():
    """Weights of an input that is always zero have nu = 0."""
    case = small()
    case.chunks = [(x * torch.tensor([1.0, 0.0, 1.0]).double(), y) for x, y in case.chunks]
    optimizer = RULES["adam"](case.model.parameters(), 1e-3)
    target = case.objective()
    rule = RMSProp(target, optimizer)
    assert (rule.nu == 0).sum() == 4
    flow = Flow(target, optimizer)
    flow.advance(2)
    weight = next(m for m in case.model if isinstance(m, nn.Linear)).weight
    assert torch.equal(weight[:, 1], small().model[0].weight[:, 1])
    assert target.theta().isfinite().all()
