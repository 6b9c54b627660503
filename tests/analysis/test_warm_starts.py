"""eigenpairs(start=...): fewer products than from a random start, no eigenvalue lost for good."""

from __future__ import annotations

import re

import analysis_cases
import numpy as np
import pytest
import torch

from fbopt.analysis import Hessian, eigenpairs

pytestmark = pytest.mark.usefixtures("one_thread")


def move(case, length=1e-2):
    """A step of gradient descent, so to speak."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in case.model.parameters():
            p.add_(torch.randn_like(p), alpha=length * float(p.norm()) / p.numel() ** 0.5)


CASES = [(count, which) for count in (1, 3) for which in ("largest", "smallest", "both")]


@pytest.fixture(scope="module")
def moved():
    """Eigenpairs for each case, the operator after a move, and its dense matrix."""
    case = analysis_cases.mlp()
    hessian = Hessian(case.objective())
    starts = {key: eigenpairs(hessian, *key, tolerance=1e-3) for key in CASES}
    move(case)
    hessian.refresh()
    return starts, hessian, analysis_cases.dense_hessian(case)


@pytest.mark.parametrize(("count", "which"), CASES)
def test_pairs_of_the_dense_hessian_with_fewer_products(moved, count, which):
    starts, hessian, matrix = moved
    found = eigenpairs(hessian, count, which, start=starts[count, which], tolerance=1e-3)
    cold = eigenpairs(hessian, count, which, tolerance=1e-3, verify=False)
    values = torch.linalg.eigvalsh(matrix)
    ends = {"largest": values.flip(0)[:count], "smallest": values[:count]}
    wanted = ends[which] if which != "both" else torch.cat(list(ends.values()))
    np.testing.assert_allclose(found.values, wanted, rtol=1e-4)
    assert found.converged.all() and found.products < cold.products
    true = (matrix @ found.vectors.T).T - torch.from_numpy(found.values)[:, None] * found.vectors
    np.testing.assert_allclose(found.residuals, true.norm(dim=1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "central"])
def test_tracking_in_float32(method):
    """Five steps, each from the last: four products a step, to a hundredth."""
    case = analysis_cases.mlp(torch.float32)
    hessian, found = Hessian(case.objective(), method), None
    for _ in range(6):
        move(case)
        hessian.refresh()
        fresh = found is None
        found = eigenpairs(hessian, 1, start=found, tolerance=1e-2, verify=False)
        expected = eigenpairs(Hessian(case.objective()), 1, tolerance=1e-4, verify=False)
        np.testing.assert_allclose(found.values, expected.values, rtol=5e-3)
        assert found.converged.all() and (fresh or found.products <= 4)


def test_verification_makes_products_only_for_differences():
    case = analysis_cases.mlp(torch.float32)
    for method, more in (("exact", 0), ("central", 2)):
        hessian = Hessian(case.objective(), method)
        first = eigenpairs(hessian, 2)
        plain, verified = (
            eigenpairs(hessian, 2, start=first, verify=verify) for verify in (False, True)
        )
        assert verified.products == plain.products + more


def overtaking(steps, before=0.5, after=6.0):
    """Diagonals in which entry 30, deep inside, becomes the largest over so many steps."""
    spectrum = torch.cat([torch.tensor([4.0, 3.0, 2.5, 2.0]), torch.linspace(0, 1, 296)]).double()
    for step in range(steps + 14):
        now = spectrum.clone()
        now[30] = before + (after - before) * min(1, (step + 1) / steps)
        yield now


@pytest.mark.parametrize("steps", [1, 8])
def test_an_eigenvalue_from_inside_is_found_within_some_calls(steps):
    """Its eigenvector is orthogonal to all start vectors; only what is mixed in can show it."""
    wrong, start = 0, torch.eye(300, dtype=torch.float64)[:2]
    for values in overtaking(steps):
        found = eigenpairs(Hessian(analysis_cases.diagonal(values)), 1, start=start, tolerance=1e-3)
        start = torch.cat([found.vectors, found.guards])
        assert found.converged.all()
        wrong += not np.allclose(found.values, values.max(), rtol=1e-3)
    assert wrong <= 8
    np.testing.assert_allclose(found.values, 6.0, rtol=1e-5)


def test_a_chain_of_calls_searches_now_and_then():
    values = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0, 1, 298)]).double()
    hessian = Hessian(analysis_cases.diagonal(values))
    found, products = eigenpairs(hessian, 1), []
    for _ in range(42):
        found = eigenpairs(hessian, 1, start=found, tolerance=1e-2)
        products.append(found.products)
    assert [i for i, n in enumerate(products) if n > 10] == [20, 41]


def test_a_guard_that_overtakes_is_seen_at_once():
    values = torch.tensor([4.0, 3.0, 2.0, *[0.1] * 50], dtype=torch.float64)
    first = eigenpairs(Hessian(analysis_cases.diagonal(values)), 1)
    assert first.guards.shape == (1, 53) and abs(first.guards[0, 1]) > 0.9
    values[1] = 4.5
    found = eigenpairs(Hessian(analysis_cases.diagonal(values)), 1, start=first)
    np.testing.assert_allclose(found.values, 4.5, rtol=1e-6)


def test_bits_depend_on_start_and_seed_alone():
    case = analysis_cases.mlp(torch.float32)
    hessian = Hessian(case.objective())
    first = eigenpairs(hessian, 2)
    one, again, other = (eigenpairs(hessian, 2, start=first, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.vectors, again.vectors)
    assert not torch.equal(one.vectors, other.vectors)


def test_any_number_of_rows_will_do():
    values = torch.tensor([5.0, 3.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    hessian = Hessian(analysis_cases.diagonal(values))
    for rows in (1, 3, 5):
        start = torch.ones(rows, 5, dtype=torch.float32) + torch.eye(5)[:rows]
        for count, which in ((1, "largest"), (2, "both"), (5, "smallest")):
            found = eigenpairs(hessian, count, which, start=start)
            expected = {"largest": values[:1], "both": values[[0, 1, 4, 3]]}
            wanted = expected.get(which, values.flip(0))
            np.testing.assert_allclose(found.values, wanted, rtol=1e-9)


ROWS = {
    "list": ([1.0, 2.0], "start must be Eigenpairs or a tensor, got list"),
    "one row": (torch.ones(5), "start must have the shape (m, 5), a row for each vector"),
    "no row": (torch.ones(0, 5), "start must have the shape (m, 5)"),
    "other model": (torch.ones(2, 4), "got (2, 4)"),
    "zero": (torch.zeros(1, 5), "start has a row that is zero"),
    "undefined": (torch.full((1, 5), float("nan")), "start has a row that is zero, infinite"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_starts_are_named(name):
    start, message = ROWS[name]
    hessian = Hessian(analysis_cases.diagonal(torch.ones(5, dtype=torch.float64)))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        eigenpairs(hessian, 1, start=start)
    assert hessian.products == 0
