"""fbopt.analysis under autocast: the measures are those of the bfloat16 forward pass."""

from __future__ import annotations

import analysis_cases
import numpy as np
import pytest
import torch

from fbopt.analysis import (
    Hessian,
    Objective,
    eigenpairs,
    gradient_statistics,
    loss_landscape,
    random_direction,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case():
    return analysis_cases.mlp(torch.float32)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def by_hand(case, vector, shift=0.0):
    """L, its gradient and H v at theta + shift under torch.autocast, without any code of fbopt."""
    params = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    moves = (torch.zeros_like(vector) + shift).split([p.numel() for p in params.values()])
    for p, move in zip(params.values(), moves, strict=True):
        p.add_(move.view(p.shape)).requires_grad_()
    loss, gradient, product = 0.0, torch.zeros_like(vector), torch.zeros_like(vector)
    total = sum(len(y) for _, y in case.chunks)
    for x, y in case.chunks:
        torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16):
            chunk_loss = case.loss_fn(torch.func.functional_call(case.model, params, x), y)
        inputs, share = list(params.values()), len(y) / total
        grads = flat(torch.autograd.grad(chunk_loss, inputs, create_graph=True))
        loss += share * float(chunk_loss.detach())
        gradient += share * grads.detach()
        product += share * flat(torch.autograd.grad(grads, inputs, vector))
    return loss, gradient, product


def test_loss_gradient_and_product_are_those_of_autocast(case):
    low, full = case.objective(autocast=torch.bfloat16), case.objective()
    vector = torch.randn(low.size, generator=torch.Generator().manual_seed(0))
    loss, *expected = by_hand(case, vector)
    assert low.loss() == pytest.approx(loss, rel=1e-12)
    assert abs(low.loss() - full.loss()) > 1e-5
    low_vectors, full_vectors = ([o.gradient(), Hessian(o)(vector)] for o in (low, full))
    for found, other, wanted in zip(low_vectors, full_vectors, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (other - wanted).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", ["mlp", "convolutional"])
def test_exact_products_are_close_to_those_of_float32(name):
    case = getattr(analysis_cases, name)(torch.float32)
    low, full = (Hessian(case.objective(autocast=dtype)) for dtype in (torch.bfloat16, None))
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(low.objective.size, generator=generator)
    expected = full(vector)
    assert 0 < (low(vector) - expected).norm() < 0.02 * expected.norm()


def test_noise_and_landscapes_run_under_autocast(case):
    low = case.objective(autocast=torch.bfloat16)
    found = gradient_statistics(low)
    assert found.loss == pytest.approx(low.loss(), rel=1e-6)
    assert found.gradient_norm == pytest.approx(float(low.gradient().norm()), rel=1e-5)
    direction = random_direction(low)
    losses = loss_landscape(low, [direction], [[0.0, 0.3]]).losses
    expected = [by_hand(case, direction, t * direction)[0] for t in (0.0, 0.3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["central", "forward"])
def test_finite_differences_step_beyond_the_rounding_of_bfloat16(case, method):
    """At float32's radius forward differences find 7.2 instead of 1.9."""
    low = case.objective(autocast=torch.bfloat16)
    exact = eigenpairs(Hessian(low), 1).values[0]
    hessian = Hessian(low, method)
    assert hessian.radius > 10 * Hessian(case.objective(), method).radius
    assert eigenpairs(hessian, 1, max_products=10).values[0] == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, "bf16"])
def test_another_dtype_is_refused(case, dtype):
    with pytest.raises(ValueError, match=r"autocast must be torch\.bfloat16 or torch\.float16"):
        Objective(case.model, case.loss_fn, case.chunks, autocast=dtype)


def inside(case):
    """An objective whose evaluate begins autocast itself."""

    def evaluate(model, chunk):
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss_fn(model(chunk[0]), chunk[1])

    return Objective(case.model, chunks=case.chunks, evaluate=evaluate)


@pytest.mark.parametrize("method", ["central", "forward"])
def test_autocast_inside_evaluate_is_seen(case, method):
    """At float32's radius forward differences found 7.2 for 1.9 and called it converged."""
    objective = inside(case)
    exact = eigenpairs(Hessian(objective), 1).values[0]
    with pytest.warns(RuntimeWarning, match=r"bfloat16.*method='exact'"):
        hessian = Hessian(objective, method)
    low = case.objective(autocast=torch.bfloat16)
    with pytest.warns(RuntimeWarning):
        assert hessian.radius == Hessian(low, method).radius
    found = eigenpairs(hessian, 1, max_products=12)
    assert found.values[0] == pytest.approx(exact, rel=0.2)
    assert found.converged == (found.residuals <= 1e-3 * found.values)


def test_converged_follows_the_verified_residual(case):
    """A radius below bfloat16's rounding: the iteration's own residual is far too small."""
    with pytest.warns(RuntimeWarning):
        hessian = Hessian(inside(case), "forward", radius=5e-4)
    estimated = eigenpairs(hessian, 1, max_products=30, verify=False)
    verified = eigenpairs(hessian, 1, max_products=30)
    assert estimated.converged.all() and not verified.converged.any()
    assert verified.residuals[0] > 0.1 * verified.values[0]
