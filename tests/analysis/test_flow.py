"""Flows against ODE solutions, quadratics and dense derivatives; the complementarity problem."""

from __future__ import annotations

import analysis_cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fbopt.analysis import Flow, Objective, third_derivative
from fbopt.analysis import complementarity as problem
from fbopt.analysis.third_derivatives import curvature_gradients, triangle

pytestmark = pytest.mark.usefixtures("one_thread")


class Point(nn.Module):
    """Parameters of which the loss is a function: ``loss(theta)`` for any input."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), -1)


def objective(theta: list[float], loss) -> Objective:
    chunk = (torch.zeros(1, 1), torch.zeros(1))
    return Objective(Point(theta), lambda output, target: loss(output[0]), [chunk])


def small() -> analysis_cases.Case:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(11, 3), torch.randn(11, 2)
    case = analysis_cases.Case(model.double(), nn.functional.mse_loss, [])
    case.chunks = [(x[:4].double(), y[:4].double()), (x[4:].double(), y[4:].double())]
    return case


def dense_loss(case):
    x, y = (torch.cat(parts) for parts in zip(*case.chunks, strict=True))
    shapes = [(n, p.shape) for n, p in case.model.named_parameters()]

    def loss(theta):
        parts = torch.split(theta, [s.numel() for _, s in shapes])
        values = {n: v.view(s) for (n, s), v in zip(shapes, parts, strict=True)}
        return case.loss_fn(torch.func.functional_call(case.model, values, (x,)), y)

    return loss


def test_third_derivatives_of_the_dense_tensor():
    case = small()
    target = case.objective()
    hessian = torch.func.hessian(dense_loss(case))
    tensor = torch.func.jacrev(hessian)(target.theta())
    torch.manual_seed(0)
    u, v = torch.randn(2, target.size, dtype=torch.float64)
    expected = torch.einsum("bca,b,c->a", tensor, u, v)
    found = third_derivative(target, u, v)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))
    basis = torch.linalg.qr(torch.stack([u, v]).T)[0].T
    rows = curvature_gradients(target, basis)
    mixed = torch.randn(2, 2, dtype=torch.float64)
    mixed = mixed + mixed.T
    weights = torch.from_numpy(problem.entries_of(mixed.numpy()))
    expected = torch.einsum("bca,ib,jc,ij->a", tensor, basis, basis, mixed)
    torch.testing.assert_close(weights @ rows, expected, rtol=1e-8, atol=1e-10)


def test_third_derivatives_of_a_quadratic_and_bad_vectors():
    target = objective([1.0, 2.0], lambda t: (t * t).sum())
    u = torch.ones(2, dtype=torch.float64)
    assert torch.equal(third_derivative(target, u, u), torch.zeros_like(u))
    with pytest.raises(ValueError, match=r"right must have the shape \(2,\)"):
        third_derivative(target, u, u[:1])


def test_gradient_flow_solves_the_differential_equation():
    from scipy.integrate import solve_ivp

    case, lr = small(), 0.1
    target = case.objective()
    slope = torch.func.grad(dense_loss(case))
    exact = solve_ivp(
        lambda t, theta: -lr * slope(torch.from_numpy(theta)).numpy(),
        (0, 20), target.theta().numpy(), rtol=1e-11, atol=1e-12,
    ).y[:, -1]  # fmt: skip
    flow = Flow(target, lr)
    flow.advance(20)
    assert flow.time == 20
    error = np.linalg.norm(target.theta().numpy() - exact)
    assert error < 1e-6
    assert np.linalg.norm(exact - small().objective().theta().numpy()) > 0.1  # it did move


CURVATURES = torch.tensor([5.0, 3.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(("kind", "stays"), [("gradient", []), ("stable", [0]), ("central", [])])
def test_quadratics(kind, stays):
    """theta_i(t) = theta_i(0) exp(-lr a_i t), but what is unstable stays in a stable flow."""
    lr = 0.5 if kind == "stable" else 0.3
    target = objective([1.0, -2.0, 3.0], lambda t: (CURVATURES * t * t).sum() / 2)
    start = target.theta()
    flow = Flow(target, lr, kind, substeps=10)
    flow.advance(2)
    expected = start * torch.exp(-lr * CURVATURES * 2)
    expected[stays] = start[stays]
    torch.testing.assert_close(target.theta(), expected, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(flow.pairs.values[0], 5, rtol=1e-6)


def valley(t):
    """L = (2 + z) x^2 / 2 + (1 - z): descending along z sharpens x without end."""
    return (2 + t[1]) * t[0] ** 2 / 2 - t[1] + 1


def test_central_flow_stops_at_the_edge():
    """H = diag(2 + z, 0) at x = 0: z' = lr until 2 + z = 2/lr, then Sigma = 2 holds it there.

    There grad<H, Sigma>/2 = Sigma/2 along z, and balances -grad L = 1.
    """
    target = objective([0.0, 0.0], valley)
    flow = Flow(target, 0.5, "central")  # the edge: 4, so z = 2 after 4 units of time
    flow.advance(3)
    torch.testing.assert_close(target.theta()[1], torch.tensor(1.5).double(), rtol=0, atol=1e-6)
    assert abs(flow.edge.covariance).sum() == 0
    flow.advance(5)
    torch.testing.assert_close(target.theta()[1], torch.tensor(2.0).double(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(flow.edge.covariance, [[2.0]], rtol=1e-5)
    assert flow.edge.excess_loss == pytest.approx(4.0, rel=1e-5)
    free = objective([0.0, 0.0], valley)
    Flow(free, 0.5, "gradient").advance(8)
    assert float(free.theta()[1]) == pytest.approx(4.0)


def test_the_complementarity_problem():
    rng = np.random.default_rng(0)
    entries = len(triangle(3))
    half = rng.normal(size=(entries, 20))
    constant = problem.entries_of(np.diag([-1.0, -0.3, 2.0]) + 0.1)
    x, s = problem.solve(constant, half @ half.T)
    assert np.linalg.eigvalsh(x).min() > -1e-9 and np.linalg.eigvalsh(s).min() > -1e-8
    assert abs((x * s).sum()) < 1e-8 and np.trace(x) > 1e-3
    expected = constant + half @ half.T @ problem.entries_of(x)
    np.testing.assert_allclose(problem.entries_of(s), expected, atol=1e-12)
    np.testing.assert_allclose(problem.matrix(problem.entries_of(x), 3), x, rtol=1e-15)
    far, room = problem.solve(problem.entries_of(np.eye(2)), np.eye(3))
    np.testing.assert_allclose(far, 0, atol=1e-9)
    np.testing.assert_allclose(room, np.eye(2), atol=1e-9)


def test_what_no_covariance_can_hold():
    with pytest.raises(RuntimeError, match="no solution"):
        problem.solve(np.array([-1.0]), np.array([[0.0]]))


def test_a_network_at_the_edge_keeps_its_curvature():
    """Two eigenvalues of a network reach 2/lr: none rises above, Sigma >= 0 and <S, Sigma> = 0."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    target = Objective(model, lambda o, t: (o - t).square().sum(1).mean() / 2, [(x, y)])
    lr = 2 / (1.02 * Flow(target, 0.1).sharpness)
    flow, most = Flow(target, lr, "central"), 0.0
    for _ in range(15):
        flow.advance()
        edge = flow.edge
        most = max(most, edge.excess_loss)
        if len(edge.values):
            assert np.linalg.eigvalsh(edge.covariance).min() > -1e-9
            assert abs((edge.covariance * edge.slack).sum()) < 1e-6
        assert flow.sharpness <= flow.limit * 1.01
    assert most > 1e-4  # it was at the edge


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "sharp"}, "kind must be one of"),
        ({"lr": 0.0}, "lr must"),
        ({"substeps": 0}, "substeps must"),
        ({"margin": 1.0}, "margin must be below 1"),
        ({"kind": "central", "lr": 0.5}, "begin at an earlier step, or with an lr below 0.4"),
    ],
)
def test_arguments(changes, words):
    target = objective([1.0, -2.0, 3.0], lambda t: (CURVATURES * t * t).sum() / 2)
    with pytest.raises(ValueError, match=words):
        Flow(target, **({"lr": 0.1} | changes))
    assert target.theta().tolist() == [1, -2, 3]


def test_a_random_loss_is_refused():
    target = objective([1.0], lambda t: (t * torch.rand(1, dtype=torch.float64)).sum())
    with pytest.raises(RuntimeError, match="not deterministic"):
        Flow(target, 0.1)


def test_without_the_solver(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "clarabel", None)
    target = objective([1.0], lambda t: (t * t).sum())
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fbopt\[flow\]'"):
        Flow(target, 0.1, "central")
    Flow(target, 0.1, "gradient").advance()
