"""Gauss-Newton products against dense Jacobians, curvlinops and SciPy."""

from __future__ import annotations

import analysis_cases
import curvlinops
import numpy as np
import pytest
import torch
from curvature_cases import (
    CLOSE,
    dense_gauss_newton,
    matrix,
    small,
)
from torch import nn

from fbopt.analysis import (
    Fisher,
    GaussNewton,
    Hessian,
    eigenpairs,
    fisher_trace,
    hessian_trace,
)

pytestmark = pytest.mark.usefixtures("one_thread")


LOSSES = {
    "cross_entropy": nn.functional.cross_entropy,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "mse": nn.functional.mse_loss,
    "own": lambda z, y: ((z - y) ** 4).sum(1).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_is_the_dense_matrix(name):
    case = small(LOSSES[name])
    found = matrix(GaussNewton(case.objective()))
    torch.testing.assert_close(found, dense_gauss_newton(case), **CLOSE)
    assert (found - analysis_cases.dense_hessian(case)).norm() > 1e-2 * found.norm()


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    case = small()
    case.model = nn.Linear(4, 3).double()
    torch.testing.assert_close(
        matrix(GaussNewton(case.objective())), analysis_cases.dense_hessian(case), **CLOSE
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_curvlinops_agrees(name):
    case = small(LOSSES[name])
    loss = nn.CrossEntropyLoss() if name == "cross_entropy" else nn.MSELoss()
    params = [p for p in case.model.parameters() if p.requires_grad]
    pairs = [
        (Hessian, curvlinops.HessianLinearOperator),
        (GaussNewton, curvlinops.GGNLinearOperator),
    ]
    if name == "cross_entropy":  # its squared error is the mean over elements, too
        pairs.append((Fisher, curvlinops.EFLinearOperator))
    vectors = torch.randn(2, sum(p.numel() for p in params), dtype=torch.float64)
    for ours, theirs in pairs:
        oracle = theirs(case.model, loss, params, case.chunks, check_deterministic=False)
        operator = ours(case.objective())
        for vector in vectors:
            torch.testing.assert_close(operator(vector), (oracle @ vector).detach(), **CLOSE)


def test_eigenpairs_traces_and_costs():
    case = small()
    objective = case.objective()
    dense = dense_gauss_newton(case)
    operator = GaussNewton(objective)
    values = torch.linalg.eigvalsh(dense).flip(0)
    found = eigenpairs(operator, 3)
    np.testing.assert_allclose(found.values, values[:3], rtol=1e-8)
    estimate = hessian_trace(operator, 100)
    assert abs(estimate.value - float(dense.trace())) < 3 * estimate.error
    before = objective.cost.copy()
    operator(torch.ones(objective.size, dtype=torch.float64))
    spent = objective.cost.since(before)
    assert (spent.losses, spent.gradients, spent.second_backwards) == (0, 1, 2)
    before = objective.cost.copy()
    fisher_trace(objective, samples=5)
    spent = objective.cost.since(before)
    assert (spent.losses, spent.gradients, spent.second_backwards) == (0, 1, 4)


@pytest.mark.parametrize("kind", [GaussNewton, Fisher])
def test_a_stale_point_is_refused(kind):
    case = small()
    operator, vector = kind(case.objective()), torch.ones(43, dtype=torch.float64)
    with torch.no_grad():
        case.model[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"0\.weight has changed.*operator\.refresh\(\)"):
        operator(vector)
    assert operator.products == 0
    operator.refresh()
    assert torch.equal(operator(vector), kind(case.objective())(vector))


def test_scipy_finds_the_same_eigenvalues():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = GaussNewton(small().objective())
    found = linalg.eigsh(operator.as_scipy(), 3, which="LA", return_eigenvectors=False)[::-1]
    np.testing.assert_allclose(found, eigenpairs(operator, 3).values, rtol=1e-8)
    narrow = Hessian(analysis_cases.mlp(torch.float32).objective()).as_scipy()
    assert narrow.dtype == np.float32 and narrow.shape == (1654, 1654)
    assert (narrow @ np.ones((1654, 2), np.float32)).shape == (1654, 2)


def test_scipy_is_imported_by_as_scipy_alone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        GaussNewton(small().objective()).as_scipy()
