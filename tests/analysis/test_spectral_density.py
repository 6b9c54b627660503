"""The spectral density and Hutch++ against exact spectra, and effective ranks against their
definitions.
"""

from __future__ import annotations

import math

import analysis_cases
import numpy as np
import pytest
import torch

from fbopt.analysis import (
    GaussNewton,
    Hessian,
    SpectralDensity,
    eigenpairs,
    gradient_rank,
    hessian_trace,
    hutchpp_trace,
    spectral_density,
    spectral_rank,
    subspace_share,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["mlp", "convolutional"])
def dense(request):
    """A case and the eigenvalues of its dense Hessian, ascending, float64."""
    case = getattr(analysis_cases, request.param)()
    return case, torch.linalg.eigvalsh(analysis_cases.dense_hessian(case)).numpy()


def area(density: SpectralDensity, values: np.ndarray) -> float:
    """Between the cumulative curves, as a share of the spectrum's range."""
    places = np.sort(np.concatenate([density.nodes, values]))
    exact = np.searchsorted(values, places[:-1], side="right") / len(values)
    gaps = np.abs(density.cdf(places[:-1]) - exact) * np.diff(places)
    return float(gaps.sum() / (values[-1] - values[0]))


def test_the_density_is_that_of_the_exact_spectrum(dense):
    case, values = dense
    found = spectral_density(Hessian(case.objective()), 3, 30, seed=1)
    assert area(found, values) < 0.02
    assert found.weights.sum() == pytest.approx(1, rel=1e-12)
    assert (np.diff(found.nodes) >= 0).all() and found.products <= 90
    assert found.nodes[-1] == pytest.approx(values[-1], rel=1e-6)
    for exact, estimate in ((values, found.trace), (values**2, found.squared_trace)):
        assert abs(estimate.value - exact.sum()) < 5 * estimate.error + 0.1 * exact.sum()


def test_the_density_integrates_to_the_distribution(dense):
    case, values = dense
    found = spectral_density(Hessian(case.objective()), 2, 10)
    width = 0.02 * (values[-1] - values[0])
    x = np.linspace(values[0] - 8 * width, values[-1] + 8 * width, 4001)
    curve = found.density(x, width)
    assert np.trapezoid(curve, x) == pytest.approx(1, rel=1e-6)
    assert (curve >= 0).all() and found.density(float(found.nodes[0]), width).shape == ()
    assert found.cdf(x[0]) == 0 and found.cdf(x[-1]) == pytest.approx(1)
    same = spectral_density(Hessian(case.objective()), 2, 10)
    assert np.array_equal(same.nodes, found.nodes) and np.array_equal(same.weights, found.weights)


def test_an_exhausted_krylov_space_is_exact():
    """Three distinct eigenvalues: three products for each vector, and exact places."""
    values = torch.tensor([3.0] * 4 + [1.0] * 10 + [-2.0] * 6, dtype=torch.float64)
    objective, _ = analysis_cases.quadratic(values)
    found = spectral_density(Hessian(objective), 40, 10)
    assert found.products == 120
    np.testing.assert_allclose(found.nodes.reshape(3, 40)[:, 0], [-2, 1, 3], atol=1e-8)
    shares = found.weights.reshape(3, 40).sum(1)
    np.testing.assert_allclose(shares, [0.3, 0.5, 0.2], atol=0.06)


def test_ranks_of_a_known_spectrum():
    values = torch.tensor([3.0, 3.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    density = spectral_density(Hessian(analysis_cases.diagonal(values)), 150, 6)
    found = spectral_rank(density)
    assert found.stable == pytest.approx(23 / 9, rel=0.1)
    assert found.participation == pytest.approx(81 / 23, rel=0.1)
    exact = SpectralDensity(
        values.numpy(), np.ones(6) / 6, np.full(2, 1.5), np.full(2, 23 / 6), 6, 9
    )
    assert spectral_rank(exact).stable == pytest.approx(23 / 9, rel=1e-12)
    assert spectral_rank(exact).participation == pytest.approx(81 / 23, rel=1e-12)


def test_the_zero_operator_has_one_node_and_no_rank():
    flat = analysis_cases.diagonal(torch.zeros(3, dtype=torch.float64))
    density = spectral_density(Hessian(flat), 2, 3)
    assert density.nodes.tolist() == [0, 0] and density.products == 2
    with pytest.raises(ValueError, match="the operator is zero"):
        spectral_rank(density)


def decaying(power: float) -> tuple[Hessian, float]:
    values = torch.arange(1, 301, dtype=torch.float64) ** -power
    return Hessian(analysis_cases.quadratic(values, samples=1)[0]), float(values.sum())


def test_hutchpp_is_closer_than_hutchinson_at_equal_products():
    """Root mean square errors over 8 seeds, eigenvalues i^-2 for i from 1 to 300."""
    hessian, exact = decaying(2.0)
    errors = {}
    for name, estimate in (("hutch++", hutchpp_trace), ("hutchinson", hessian_trace)):
        values = [estimate(hessian, 30, seed=seed).value for seed in range(8)]
        errors[name] = math.sqrt(np.mean([(v - exact) ** 2 for v in values]))
    assert errors["hutch++"] < 0.2 * errors["hutchinson"]


def test_hutchpp_has_an_honest_error_bar(dense):
    case, values = dense
    hessian = Hessian(case.objective())
    found = [hutchpp_trace(hessian, 18, seed=seed) for seed in range(4)]
    off = [abs(t.value - values.sum()) / t.error for t in found]
    assert max(off) < 4 and 0.2 < np.mean(off) < 2
    assert found[0] == hutchpp_trace(hessian, 18) and found[0].samples == 6
    assert hessian.products == 5 * 18


def test_hutchpp_of_few_eigenvalues_is_exact():
    values = torch.tensor([5.0, -2.0, 1.0] + [0.0] * 20, dtype=torch.float64)
    objective, _ = analysis_cases.quadratic(values)
    found = hutchpp_trace(Hessian(objective), 18)
    assert found.value == pytest.approx(4, abs=1e-10) and found.error < 1e-10


def test_subspace_shares_against_projections():
    case = analysis_cases.convolutional()
    objective = case.objective()
    pairs = eigenpairs(Hessian(objective), 3)
    gradient = objective.gradient()
    expected = sum(float(v @ gradient) ** 2 for v in pairs.vectors) / float(gradient @ gradient)
    assert subspace_share(gradient, pairs) == pytest.approx(expected, rel=1e-8)
    assert subspace_share(-7 * pairs.vectors[1], pairs) == pytest.approx(1, rel=1e-8)
    with pytest.raises(ValueError, match="not orthonormal"):
        subspace_share(gradient, 2 * pairs.vectors)
    with pytest.raises(ValueError, match="same parameter space"):
        subspace_share(gradient[1:], pairs)
    with pytest.raises(ValueError, match="norm zero"):
        subspace_share(torch.zeros_like(gradient), pairs)


@pytest.mark.parametrize("centered", [False, True])
def test_gradient_ranks_against_singular_values(centered):
    case = analysis_cases.convolutional()
    objective = case.objective()
    rows, total = [], sum(len(y) for _, y in case.chunks)
    for chunk in case.chunks:
        only = analysis_cases.Case(case.model, case.loss_fn, [chunk]).objective()
        rows.append(only.gradient() - (objective.gradient() if centered else 0))
    shares = torch.tensor([len(y) / total for _, y in case.chunks], dtype=torch.float64)
    s = torch.linalg.svdvals(torch.stack(rows) * shares.sqrt()[:, None]) ** 2
    found = gradient_rank(objective, centered=centered)
    assert found.stable == pytest.approx(float(s.sum() / s.max()), rel=1e-8)
    assert found.participation == pytest.approx(float(s.sum() ** 2 / (s**2).sum()), rel=1e-8)


def test_one_chunk_has_rank_one_and_no_noise():
    case = analysis_cases.mlp()
    case.chunks = case.chunks[:1]
    found = gradient_rank(case.objective())
    assert (found.stable, found.participation) == (1, 1)
    with pytest.raises(ValueError, match="all chunks are equal"):
        gradient_rank(case.objective(), centered=True)


def test_bfloat16_autocast_has_its_own_density():
    case = analysis_cases.mlp(torch.float32)
    low, full = (
        spectral_density(GaussNewton(case.objective(autocast=t)), 2, 12)
        for t in (torch.bfloat16, None)
    )
    top, other = low.nodes[-1], full.nodes[-1]
    assert top == pytest.approx(other, rel=0.02) and top != other
    assert hutchpp_trace(Hessian(case.objective(autocast=torch.bfloat16)), 9).error > 0
    assert gradient_rank(case.objective(autocast=torch.bfloat16)).stable > 1


@pytest.mark.parametrize("wrong", [{"probes": 1}, {"steps": 1}])
def test_too_few_products_are_refused(wrong):
    hessian, _ = decaying(1.0)
    with pytest.raises(ValueError, match="must be at least 2"):
        spectral_density(hessian, **wrong)
    with pytest.raises(ValueError, match="products must be at least 6"):
        hutchpp_trace(hessian, 5)
