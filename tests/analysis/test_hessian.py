"""Hessian products, eigenpairs and the trace against dense Hessians, SciPy and quadratics."""

from __future__ import annotations

import math

import analysis_cases
import numpy as np
import pytest
import torch
from torch import nn

from fbopt.analysis import Hessian, eigenpairs, hessian_trace
from fbopt.analysis.basis import Basis

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {"mlp": analysis_cases.mlp, "convolutional": analysis_cases.convolutional}


@pytest.fixture(scope="module", params=CASES)
def dense(request):
    """A case and its dense Hessian, float64."""
    case = CASES[request.param]()
    return case, analysis_cases.dense_hessian(case)


ACCURACY = {"exact": 1e-6, "central": 1e-3, "forward": 1e-3}


@pytest.mark.parametrize("method", ACCURACY)
def test_eigenpairs_of_the_dense_hessian(dense, method, backend):
    case, matrix = dense
    values, vectors = torch.linalg.eigh(matrix)
    found = eigenpairs(Hessian(case.objective(), method), 5)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, values.flip(0)[:5], rtol=ACCURACY[method])
    overlap = (found.vectors @ vectors.flip(1)[:, :5]).abs()
    torch.testing.assert_close(overlap, torch.eye(5).double(), rtol=0, atol=3e-3)
    true = (matrix @ found.vectors.T).T - torch.from_numpy(found.values)[:, None] * found.vectors
    np.testing.assert_allclose(found.residuals, true.norm(dim=1), rtol=1e-2, atol=1e-5)


def test_finite_differences_in_float32():
    """Against the dense float64 Hessian at the float32 weights."""
    case = analysis_cases.mlp(torch.float32)
    wide = analysis_cases.Case(
        nn.Sequential(*case.model).double(), case.loss_fn, [(x.double(), y) for x, y in case.chunks]
    )
    values = torch.linalg.eigvalsh(analysis_cases.dense_hessian(wide)).flip(0)[:5]
    case.model.float()
    for method in ACCURACY:
        found = eigenpairs(Hessian(case.objective(), method), 5)
        np.testing.assert_allclose(found.values, values, rtol=1e-3)


def test_both_ends_agree_with_scipy(dense):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    case, matrix = dense
    operator = Hessian(case.objective())
    size = len(matrix)

    def product(v: np.ndarray) -> np.ndarray:
        return operator(torch.from_numpy(v).reshape(-1)).numpy()

    sparse = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    largest = linalg.eigsh(sparse, 3, which="LA", return_eigenvectors=False)[::-1]
    smallest = linalg.eigsh(sparse, 3, which="SA", return_eigenvectors=False, ncv=60)
    found = eigenpairs(Hessian(case.objective()), 3, "both")
    np.testing.assert_allclose(found.values, [*largest, *np.sort(smallest)], rtol=1e-6)
    assert found.values[3] < 0 < found.values[2]


def test_frozen_batchnorm_has_its_own_hessian():
    case = analysis_cases.convolutional()
    chunk, frozen = (analysis_cases.dense_hessian(case, b) for b in ("chunk", "frozen"))
    v = torch.randn(len(chunk), dtype=torch.float64)
    for name, matrix in (("chunk", chunk), ("frozen", frozen)):
        product = Hessian(case.objective(batchnorm=name))(v)
        torch.testing.assert_close(product, matrix @ v)
    assert not torch.allclose(chunk, frozen, rtol=1e-2)


SPECTRA = {
    "apart": [9.0, 7.0, 4.0, 2.0, 1.0, 0.5, -0.5, -3.0],
    "multiple": [3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "multiple of the identity": [2.0] * 6,
    "zero": [0.0] * 5,
    "of rank one": [5.0, 0.0, 0.0, 0.0],
}


# Finite differences of a flat quadratic are rounding errors.
QUADRATICS = [*(("exact", name) for name in SPECTRA), ("central", "apart"), ("forward", "apart")]


@pytest.mark.parametrize(("method", "name"), QUADRATICS)
def test_a_quadratic_of_known_eigenvalues(method, name):
    known = torch.tensor(SPECTRA[name], dtype=torch.float64)
    objective, _ = analysis_cases.quadratic(known)
    hessian = Hessian(objective, method)
    found = eigenpairs(hessian, 3)
    tolerance = 1e-10 if method == "exact" else 1e-5
    np.testing.assert_allclose(found.values, known[:3], rtol=tolerance, atol=1e-10)
    least = eigenpairs(hessian, 2, "smallest")
    np.testing.assert_allclose(least.values, known.flip(0)[:2], rtol=tolerance, atol=1e-10)
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(3).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rank", [2, 8, 20])
def test_the_larger_of_two_close_eigenvalues_is_not_missed(rank):
    """The random start has little of its vector: 9.9 was found for 10.04, and called converged."""
    start = Basis(torch.zeros(300, dtype=torch.float64), seed=0).random().abs().argsort()
    values = torch.linspace(0, 1, 300, dtype=torch.float64)
    values[start[rank]] = 10.04
    values[start[-7:]] = torch.tensor([9.9, 8.6, 7.6, 6.0, 5.2, 4.0, 3.0], dtype=torch.float64)
    found = eigenpairs(Hessian(analysis_cases.diagonal(values)), 1, tolerance=1e-3)
    np.testing.assert_allclose(found.values, 10.04, rtol=1e-5)


def test_pairs_that_have_not_converged_are_marked():
    objective, _ = analysis_cases.quadratic(torch.linspace(0, 1, 300, dtype=torch.float64))
    found = eigenpairs(Hessian(objective), 4, max_products=12, verify=False)
    assert found.products == 12 and not found.converged.all()
    assert (found.residuals[~found.converged] > 1e-6).all()


def test_the_trace_is_within_its_error_bar(dense):
    case, matrix = dense
    exact, off = float(matrix.trace()), matrix - torch.diag(matrix.diagonal())
    found = hessian_trace(Hessian(case.objective()), 100, seed=3)
    assert abs(found.value - exact) < 3 * found.error
    deviation = math.sqrt(2 * float(off.square().sum()))  # of one sample
    assert found.error == pytest.approx(deviation / 10, rel=0.25)
    assert hessian_trace(Hessian(case.objective()), 100, seed=3) == found
