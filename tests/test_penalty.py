"""The gradient penalty: its definition, its orders of accuracy, its coefficient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._direction import Direction
from fbopt._engine.perturb import Perturbation, hessian_product
from fbopt._ops.buckets import FlatBuckets


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    x, y = torch.randn(21, 5, dtype=dtype), torch.randint(0, 3, (21,))
    return model, list(zip(x.split(8), y.split(8), strict=True))


def flat_gradient(model, chunks, penalty, **options):
    FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty, **options)()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def objective_gradient(model, chunks, coefficient):
    """The gradient of J = L + (lambda/2) sum_c (n_c/N) ||g_c||^2, from the definition."""
    params = list(model.parameters())
    total = sum(len(y) for _, y in chunks)
    objective = 0.0
    for x, y in chunks:
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        square = sum(g.square().sum() for g in grads)
        objective = objective + len(y) / total * (loss + coefficient / 2 * square)
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, params)])


def test_exact_is_the_gradient_of_the_objective():
    model, chunks = problem()
    wanted = objective_gradient(model, chunks, 0.3)
    got = flat_gradient(model, chunks, GradientPenalty(coefficient=0.3, method="exact"))
    assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("method, order", [("forward", 1), ("central", 2)])
def test_finite_differences_converge_at_their_order(method, order):
    model, chunks = problem()
    wanted = objective_gradient(model, chunks, 1.0)
    plain = flat_gradient(model, chunks, None)
    errors = []
    for radius in (4e-2, 2e-2, 1e-2, 5e-3):
        penalty = GradientPenalty(coefficient=1.0, radius=radius, method=method)
        errors.append((flat_gradient(model, chunks, penalty) - wanted).norm().item())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2**order] * 3, rel=0.1)
    assert errors[-1] < 0.02 * (wanted - plain).norm()


@pytest.mark.parametrize("method", ["forward", "central", "exact"])
@pytest.mark.parametrize("lr", [0.8, torch.tensor(0.8), torch.tensor(0.8, dtype=torch.float64)])
def test_strength_is_lr_over_four(method, lr):
    model, chunks = problem()
    optimizer = FullBatchGD(model.parameters(), lr=lr)
    by_strength = flat_gradient(
        model, chunks, GradientPenalty(strength=0.5, method=method), optimizer=optimizer
    )
    number = GradientPenalty(coefficient=float(lr) * 0.5 / 4, method=method)
    torch.testing.assert_close(
        by_strength, flat_gradient(model, chunks, number), rtol=1e-12, atol=0
    )


def test_coefficient_follows_the_current_lr():
    model, chunks = problem()
    optimizer = FullBatchGD(model.parameters(), lr=0.8)
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks, penalty=GradientPenalty(), optimizer=optimizer
    )
    for lr in (0.8, 0.1, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        closure()
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        wanted = flat_gradient(model, chunks, GradientPenalty(coefficient=lr / 8))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_equal_rates_of_several_groups_are_one_rate():
    model, chunks = problem()
    shared = torch.tensor(0.8)
    for lrs in ((0.8, 0.8), (shared, shared), (torch.tensor(0.5), torch.tensor(0.5))):
        groups = [
            {"params": [p], "lr": lr} for p, lr in zip(model[0].parameters(), lrs, strict=True)
        ]
        optimizer = FullBatchGD(groups, lr=0.1)
        got = flat_gradient(model, chunks, GradientPenalty(), optimizer=optimizer)
        wanted = flat_gradient(model, chunks, GradientPenalty(coefficient=float(lrs[0]) / 8))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "unit", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_coefficient_may_be_a_function_of_the_step(unit):
    model, chunks = problem()
    penalty = GradientPenalty(coefficient=lambda step: unit * step)
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty)
    for step in range(3):
        closure()
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        wanted = flat_gradient(model, chunks, GradientPenalty(coefficient=0.1 * step))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_no_second_pass_where_the_coefficient_is_zero():
    model, chunks = problem()
    calls = []

    def loss_fn(output, target):
        calls.append(1)
        return F.cross_entropy(output, target)

    closure = FullBatchClosure(model, loss_fn, chunks, penalty=GradientPenalty(coefficient=0))
    closure()
    assert len(calls) == len(chunks)


@pytest.mark.parametrize("method", ["forward", "central", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradient_has_no_penalty(method, dtype):
    model = nn.Linear(3, 1).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    chunks = [(torch.ones(4, 3, dtype=dtype), torch.zeros(4, 1, dtype=dtype))]
    penalty = GradientPenalty(coefficient=0.5, method=method)
    closure = FullBatchClosure(model, F.mse_loss, chunks, penalty=penalty)
    closure()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert closure.mean_sqnorm == 0


@pytest.mark.parametrize("method", ["forward", "central", "exact"])
def test_mean_of_the_squared_chunk_norms(method):
    model, chunks = problem()
    penalty = GradientPenalty(coefficient=0.5, method=method)
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty)
    closure()
    wanted = 0.0
    for x, y in chunks:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        wanted += len(y) / 21 * sum(g.square().sum().item() for g in grads)
    assert closure.mean_sqnorm.item() == pytest.approx(wanted, rel=1e-12)


def test_parameters_of_several_dtypes_share_one_norm():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Parameter(torch.randn(4, dtype=torch.float32))
            self.b = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def evaluate(model, x):
        return (torch.tanh(model.a.double() * x) * model.b).sum(-1).square().mean()

    x = torch.randn(9, 4, dtype=torch.float64)
    gradients = []
    for cast in (False, True):
        model = Mixed()
        if cast:
            model = model.double()
        penalty = GradientPenalty(coefficient=0.5)
        FullBatchClosure(model, chunks=x.split(4), evaluate=evaluate, penalty=penalty)()
        gradients.append([p.grad.double() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_shift_moves_by_the_radius_into_a_second_buffer():
    params = [
        nn.Parameter(torch.randn(3, 4)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(5)),
    ]
    grads = [torch.randn_like(p) for p in params]
    before, pointers = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    shift = Perturbation(FlatBuckets(params))
    shift.begin()
    square = shift.fill([grads], 0.3).plain
    with shift.applied():
        moved = torch.cat([(p - b).flatten() for p, b in zip(params, before, strict=True)])
        assert all(p.data_ptr() != q for p, q in zip(params, pointers, strict=True))
    direction = torch.cat([g.flatten() for g in grads])
    assert square.item() == pytest.approx(direction.square().sum().item(), rel=1e-6)
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-4)
    assert F.cosine_similarity(moved, direction, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == pointers


def test_products_with_the_hessian_of_a_linear_loss_are_zero():
    p = nn.Parameter(torch.ones(3))
    grads = torch.autograd.grad((2 * p).sum(), [p], create_graph=True)
    assert torch.equal(hessian_product(list(grads), [p], Direction(), [None])[0], torch.zeros(3))


def test_float32_penalty_is_close_to_float64():
    model, chunks = problem(torch.float32)
    wide, wide_chunks = problem(torch.float64)
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    wide_chunks = [(x.double(), y) for x, y in chunks]
    penalty = GradientPenalty(coefficient=0.1)
    got, wanted = flat_gradient(model, chunks, penalty), flat_gradient(wide, wide_chunks, penalty)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_the_defaults_are_the_published_ones():
    assert GradientPenalty() == GradientPenalty(0.5, 1e-2, "forward", None, 2, 0.0)


def test_a_share_of_the_whole_gradient_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="full_strength must be at most 1e\\+30 times strength"):
        GradientPenalty(0.5, full_strength=1e300)
    GradientPenalty(0.0, full_strength=1e300)  # alone: no ratio
