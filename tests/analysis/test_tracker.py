"""EigenTracker: the dense Hessian's eigenvalues along a run, honest residuals, the same bits."""

from __future__ import annotations

import io
import re

import analysis_cases
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fbopt.analysis import EigenTracker, Hessian, PreconditionedHessian, eigenpairs
from fbopt.analysis.tracker_pairs import estimate

pytestmark = pytest.mark.usefixtures("one_thread")
LR = 0.4


def half_squares(output, target):
    return (output - target).square().sum(1).mean() / 2


def regression(dtype=torch.float64, steps=10):
    """Digits of 4 x 4 pixels, 498 parameters; the largest eigenvalue grows past 2/lr = 5."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(part[:60]) for part in load_digits(return_X_y=True))
    x = nn.functional.avg_pool2d(x.view(-1, 1, 8, 8), 2).flatten(1)
    x, y = (x - x.mean()) / x.std(), torch.eye(10)[y]
    model = nn.Sequential(
        nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 10), nn.Tanh(), nn.Linear(10, 10)
    )
    chunks = list(zip(x.to(dtype).split(25), y.to(dtype).split(25), strict=True))
    case = analysis_cases.Case(model.to(dtype), half_squares, chunks)
    for _ in range(steps):
        descend(case)
    return case


def descend(case):
    """A step of full-batch gradient descent."""
    params = list(case.model.parameters())
    loss = sum(case.loss_fn(case.model(x), y) * len(y) / 60 for x, y in case.chunks)
    with torch.no_grad():
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.sub_(g, alpha=LR)


def test_the_dense_hessian_through_sharpening_to_the_edge():
    """The three largest to 1 % at each of 30 steps, for three products each in the mean."""
    case = regression()
    tracker, seen = EigenTracker(case.objective(), 3), []
    for _ in range(31):
        found, matrix = tracker.update(), analysis_cases.dense_hessian(case)
        true = torch.linalg.eigvalsh(matrix).flip(0).numpy()
        np.testing.assert_allclose(found.values, true[:3], rtol=1e-2)
        rest = found.vectors @ matrix - torch.from_numpy(found.values)[:, None] * found.vectors
        np.testing.assert_allclose(found.residuals, rest.norm(dim=1), rtol=1e-6, atol=1e-12)
        near = np.abs(found.values[:, None] - true).min(axis=1)
        assert (near <= found.residuals + 1e-12).all()
        seen.append((found.products, true[0]))
        descend(case)
    products, sharpness = np.array(seen).T
    assert tracker.spent == products.sum() and products[1:].mean() <= 9
    assert sharpness[0] < 2 / LR < sharpness[-1]


def test_fewer_products_than_from_the_pairs_before():
    case = regression(steps=0)
    hessian, pairs = Hessian(case.objective()), None
    tracker, spent = EigenTracker(case.objective(), 3), 0
    for _ in range(15):
        hessian.refresh()
        pairs = eigenpairs(hessian, 3, start=pairs, tolerance=1e-2, verify=False)
        spent += pairs.products
        found = tracker.update()
        descend(case)
    np.testing.assert_allclose(found.values, pairs.values, rtol=5e-3)
    assert tracker.spent < spent


@pytest.mark.parametrize("method", ["central", "forward"])
def test_differences_in_float32(method):
    case = regression(torch.float32)
    tracker = EigenTracker(case.objective(), 2, method=method)
    for _ in range(6):
        found = tracker.update()
        true = eigenpairs(Hessian(case.objective()), 2, verify=False).values
        np.testing.assert_allclose(found.values, true, rtol=1e-2)
        descend(case)


def test_a_loss_that_is_computed_with_autocast():
    case = regression(torch.float32)
    tracker = EigenTracker(case.objective(autocast=torch.bfloat16), 2)
    true = eigenpairs(Hessian(case.objective()), 2, verify=False).values
    for _ in range(4):
        found = tracker.update()
    np.testing.assert_allclose(found.values, true, rtol=5e-2)


def test_the_preconditioned_hessian():
    case = regression()
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-3)
    objective = case.objective()

    def step():
        for p, part in zip(
            objective.params, objective.unflatten(objective.gradient()), strict=True
        ):
            p.grad = part
        optimizer.step()

    step()
    seen = PreconditionedHessian(objective, optimizer)
    tracker = EigenTracker(objective, 2, preconditioner=seen)
    for _ in range(4):
        step()
        found = tracker.update()
        true = eigenpairs(PreconditionedHessian(objective, optimizer), 2).values
        np.testing.assert_allclose(found.values, true, rtol=1e-2)


def spectrum(size=300):
    return torch.cat([torch.tensor([4.0, 3.0, 2.5]), torch.linspace(0, 1, size - 3)]).double()


@pytest.mark.parametrize("steps", [1, 10])
def test_an_eigenvalue_that_rises_from_inside_is_found(steps):
    """No tracked vector has a part in its eigenvector: the search has to find it."""
    values = spectrum()
    tracker, missed = EigenTracker(analysis_cases.diagonal(values), 2), []
    for update in range(36):
        values[30] = 0.2 + 5.8 * min(1, max(0, update - 3) / steps)
        found, true = tracker.update(), values.sort(descending=True).values
        missed.append(not np.allclose(found.values, true[:2], rtol=1e-2))
        assert found.converged.all()
    assert sum(missed) <= 16 and not any(missed[-10:])
    assert (tracker.spent - 20) / 35 <= 6


def test_eigenvalues_that_overtake():
    values = spectrum()
    tracker = EigenTracker(analysis_cases.diagonal(values), 1)
    for update in range(20):
        values[1] = 3 + 0.1 * update
        np.testing.assert_allclose(tracker.update().values, values.max(), rtol=1e-2)


def test_as_many_as_lie_above_a_bound():
    """From one to four and back; one below the bound is always among them."""
    values, above = spectrum(), 3.5
    tracker = EigenTracker(analysis_cases.diagonal(values), above=above)
    for high, count in (([], 2), ([0, 1], 3), ([0, 1, 2], 4), ([0, 1, 2], 4), ([0], 4), ([0], 2)):
        values[:3] = torch.tensor([3.0, 2.5, 2.2]).double()
        for i in high:
            values[i] = 6.0 - i / 2
        if not high:
            values[0] = 4.0
        found = tracker.update()
        assert len(found.values) == count, (high, found.values)
        true = values.sort(descending=True).values[:count]
        np.testing.assert_allclose(found.values, true, rtol=1e-2)
        assert found.values[-1] < above and found.converged.all()
    tracker.above = 0.5
    assert len(tracker.update().values) == tracker.max_count == 20


def test_states_go_on_to_the_same_bits():
    case = regression(torch.float32)
    tracker = EigenTracker(case.objective(), 2)
    assert tracker.state_dict() == {}
    for _ in range(5):
        tracker.update()
        descend(case)
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = EigenTracker(case.objective(), 2)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(12):  # through two beginnings of the search
        one, two = tracker.update(), other.update()
        assert torch.equal(one.vectors, two.vectors) and one.products == two.products
        np.testing.assert_array_equal(one.values, two.values)
        np.testing.assert_array_equal(one.residuals, two.residuals)
        descend(case)
    changed = EigenTracker(case.objective(), 2, seed=1)
    first = EigenTracker(case.objective(), 2).update()
    assert not torch.equal(changed.update().vectors, first.vectors)


FORGED = {
    "updates": (0, "its updates is no number above 0"),
    "tracked": (True, "its tracked is no number"),
    "spare": (float("nan"), "its spare is no number"),
    "rows": (lambda rows: rows[:, :-1], "its rows has the shape"),
    "before": (lambda rows: rows * float("inf"), "its before holds infinite or undefined values"),
    "weights": ([1.0, 0.0], "its weights is no tensor"),
    "chain": (lambda rows: rows[:1], "its chain has the shape"),
    "matrix": (lambda matrix: matrix.float(), "its matrix is of torch.float32"),
    "ahead": (lambda ahead: ahead.float(), "its chain is of torch.float64"),
    "more": (1, "it has other entries"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_states_are_refused(name):
    value, message = FORGED[name]
    tracker = EigenTracker(analysis_cases.diagonal(spectrum(40)), 2)
    for _ in range(6):
        tracker.update()
    state = tracker.state_dict()
    bad = {**state, name: value(state[name]) if callable(value) else value}
    with pytest.raises(ValueError, match=re.escape(message)):
        tracker.load_state_dict(bad)
    assert tracker.updates == 6


def test_states_of_other_trackers_are_refused():
    def state(size, count):
        tracker = EigenTracker(analysis_cases.diagonal(spectrum(size)), count)
        tracker.update()
        return tracker.state_dict()

    tracker = EigenTracker(analysis_cases.diagonal(spectrum(40)), 2)
    for size, count, message in (
        (50, 2, "it is of 50 parameters"),
        (40, 3, "it tracks 3 eigenvalues, of at most 2"),
        (40, 1, "it tracks 1 eigenvalues, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.load_state_dict(state(size, count))


def test_as_many_eigenvalues_as_parameters():
    values = torch.tensor([5.0, 3.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    for count in (1, 4, 5):
        tracker = EigenTracker(analysis_cases.diagonal(values), count)
        for _ in range(12):
            found = tracker.update()
            np.testing.assert_allclose(found.values, values[:count], rtol=1e-2)
            assert found.products <= 5
        assert tracker.load_state_dict(tracker.state_dict()) is None


def test_errors_of_close_values_are_those_of_their_space():
    """|R|^2/gap with the gap behind both; the last by its residual alone."""
    values, residuals = np.array([5.0, 4.99, 2.0]), np.array([0.1, 0.1, 0.5])
    expected = [0.02 / 2.99, 0.02 / 2.99, 0.5]
    np.testing.assert_allclose(estimate(values, residuals, -np.inf), expected)
    expected[2] = 0.27 / 1.5
    np.testing.assert_allclose(estimate(values, residuals, 0.5), expected)


REFUSED = {
    "count": (0, ValueError, "count must be at least 1"),
    "tolerance": (0.0, ValueError, "tolerance must be greater than 0"),
    "products": (2, ValueError, "products must be at least 3"),
    "max_count": (0, ValueError, "max_count must be at least 1"),
    "method": ("other", ValueError, "method must be one of"),
    "above": ("all", TypeError, "above"),
    "preconditioner": (3, TypeError, "preconditioner must be a PreconditionedHessian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name):
    value, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        EigenTracker(analysis_cases.diagonal(spectrum(5)), **{name: value})
    with pytest.raises(ValueError, match="count asks for 6 eigenvalues, but there are 5"):
        EigenTracker(analysis_cases.diagonal(spectrum(5)), 6)


def test_a_preconditioner_has_its_own_objective_and_method():
    case = regression(steps=0)
    objective = case.objective()
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-3)
    for p, g in zip(objective.params, objective.unflatten(objective.gradient()), strict=True):
        p.grad = g
    optimizer.step()
    seen = PreconditionedHessian(objective, optimizer)
    with pytest.raises(ValueError, match="preconditioner has another objective"):
        EigenTracker(case.objective(), preconditioner=seen)
    with pytest.raises(ValueError, match="its own method"):
        EigenTracker(objective, preconditioner=seen, method="central")


def test_products_that_are_not_finite_are_refused():
    values = spectrum(20)
    tracker = EigenTracker(analysis_cases.diagonal(values), 1)
    tracker.update()
    values[:] = float("inf")
    with pytest.raises(ValueError, match="infinite or undefined"):
        tracker.update()
