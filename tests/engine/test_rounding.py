"""Rounding told from another computation: by how much a loss changes with the last bits of its
parameters.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fbopt._engine.rounding import Comparison, Found, Precision, pointing

CPU = torch.device("cpu")


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def found(loss, params, **more):
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return Found(loss.detach(), grads, **more)


def compare(function, other, params, **more):
    """How `other` differs from `function`, both losses by the parameters."""
    comparison = Comparison(lambda: found(function(), params, **more), params, ["a", "b"])
    return comparison.difference(found(other(), params))


def logistic(x, steps, expanded):
    """x <- 4 x (1 - x): two formulas of one map, whose rounding doubles in every step."""
    for _ in range(steps):
        x = 4 * x - 4 * x * x if expanded else 4 * x * (1 - x)
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 10, 20, 40])
def test_chaotic_computations_differ_by_rounding_alone(steps, dtype):
    x = parameter(0.3, dtype=dtype)
    one, other = (lambda e=e: logistic(x, steps, e).sum() for e in (False, True))
    if steps == 40:  # where nothing is left of a digit
        assert not torch.isclose(one(), other(), rtol=1e-6)
    assert compare(one, other, [x]) is None
    assert compare(one, lambda: one() * 1.5 if steps < 20 else one() * 1e9, [x]) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_cancels_is_not_compared_with_itself(dtype):
    """Near a minimum it is rounding; another one far away is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = x.sin().sum(1)
    solution = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    w, x, y = nn.Parameter(solution.to(dtype)), x.to(dtype), y.to(dtype)
    one = lambda: (x @ w - y).square().mean()  # noqa: E731
    other = lambda: (x.flip(0) @ w - y.flip(0)).square().mean()  # noqa: E731
    assert found(one(), [w]).grads[0].norm() < 1e3 * torch.finfo(dtype).eps
    assert compare(one, other, [w]) is None
    assert compare(one, lambda: one() + 1e-2 * w.sum(), [w]) is not None


def test_each_parameter_is_compared_by_itself():
    """A small gradient that is lost beside a large one."""
    a, b = parameter(1.0, 2.0), parameter(3.0)
    one = lambda: (1e4 * a).square().sum() + 1e-3 * b.square().sum()  # noqa: E731
    without = lambda: (1e4 * a).square().sum() + 1e-3 * b.detach().square().sum() + 0 * b.sum()  # noqa: E731
    assert compare(one, without, [a, b]) == "no gradient reaches b"
    assert compare(one, lambda: one() + 1e-5 * (b - b.detach()).sum(), [a, b]) == (
        "another gradient reaches b"
    )


def test_what_is_said_of_a_difference():
    a = parameter(1.0)
    expected = Found(torch.ones(()), [torch.ones(1)], [torch.ones(1)])
    comparison = Comparison(lambda: expected, [a], ["a"])
    assert comparison.difference(expected) is None
    loss, products = torch.tensor(2.0), [torch.zeros(1)]
    assert comparison.difference(expected._replace(loss=loss)) == "its loss is 2 rather than 1"
    assert comparison.difference(expected._replace(grads=products)) == "no gradient reaches a"
    found = comparison.difference(expected._replace(products=products))
    assert found == "another product H g reaches a"


def test_unused_parameters_are_not_compared():
    a, b = parameter(1.0), parameter(1.0)
    comparison = Comparison(lambda: found(a.sum(), [a, b]), [a, b], ["a", "b"])
    zeros = Found(torch.ones(()).double(), [torch.ones(1), torch.zeros(1)])
    assert comparison.difference(zeros) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_to_be_so_in_the_same_places(value):
    a = parameter(1.0, 1.0)
    factors = torch.tensor([value, 1.0], dtype=torch.float64)
    one = lambda: (a * factors).sum()  # noqa: E731
    assert compare(one, one, [a]) is None
    assert compare(one, lambda: (a * factors.flip(0)).sum(), [a]) is not None
    assert compare(one, lambda: a.sum(), [a]) is not None
    assert compare(lambda: a.sum(), one, [a]) is not None


def test_a_state_of_its_own_is_no_rounding():
    """Neither what changes with every run, nor what changes with the second."""
    a = parameter(1.0)
    for drift in (itertools.count(), itertools.chain([0, 0], itertools.count(1))):
        run = lambda drift=drift: (a * (1 + 0.1 * next(drift))).sum()  # noqa: E731
        comparison = Comparison(lambda run=run: found(run(), [a]), [a], ["a"])
        assert comparison.difference(found((a * 1.05).sum(), [a])) is not None


def test_parameters_are_as_before_also_if_a_run_raises():
    a = parameter(1.0, 2.0)
    before, where, runs = a.detach().clone(), a.data_ptr(), itertools.count()

    def run():
        if next(runs) == 2:  # with other last bits
            assert not torch.equal(a, before)
            raise KeyError("mine")
        return found(a.square().sum(), [a])

    comparison = Comparison(run, [a], ["a"])
    with pytest.raises(KeyError, match="mine"):
        comparison.difference(found(a.square().sum() * 1.1, [a]))
    assert torch.equal(a, before) and a.data_ptr() == where
    with pytest.raises(ValueError, match="argument"), pointing([a, a], [before]):
        pass
    assert a.data_ptr() == where


def test_precision_is_that_of_the_least_exact_part():
    wide, single, half = torch.float64, torch.float32, torch.bfloat16
    assert Precision.of({wide}, CPU).share < Precision.of({wide, single}, CPU).share
    assert Precision.of({single}, CPU).share < Precision.of({single, half}, CPU).share
    assert Precision.of({half}, CPU).last_bit == torch.finfo(half).eps
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [p.fp32_precision for p in products]
    torch.set_float32_matmul_precision("medium")  # products in bfloat16
    try:
        assert Precision.of({single}, CPU).share == Precision.of({half}, CPU).share
        assert Precision.of({wide}, CPU).share < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
        for settings, value in zip(products, before, strict=True):
            settings.fp32_precision = value


def test_half_precision_inside_of_a_loss_allows_for_more():
    a = parameter(1.0, 2.0, dtype=torch.float32)
    one = lambda: a.square().sum()  # noqa: E731
    rounded = lambda: a.bfloat16().square().sum().float() * 1.003  # noqa: E731
    assert compare(one, rounded, [a]) is not None
    dtypes = frozenset({torch.float32, torch.bfloat16})
    assert compare(one, rounded, [a], dtypes=dtypes) is None
    assert compare(one, lambda: 2 * one(), [a], dtypes=dtypes) is not None


@pytest.mark.parametrize("terms", [1, 128 * 32 * 32, 64 * 224 * 224])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.1, 1.5, 2.0, -1.0])
def test_the_length_of_sums_excuses_no_wrong_gradient(factor, terms):
    """Of a network with BatchNorm, whose gradients change by far more than last bits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def run() -> Found:
        return found(nn.functional.cross_entropy(model(x), y), params)

    comparison, right = Comparison(run, params, names, terms), run()
    assert comparison.difference(right) is None
    wrong = right._replace(grads=[factor * g for g in right.grads])
    assert comparison.difference(wrong) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_round_by_more_than_last_bits(dtype):
    """The order of n terms changes about √n last bits of all that is summed, and no more."""
    a = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (1, 100)]
    run = lambda: found(1e-4 * a[0].sum() + a[1].sum(), a)  # noqa: E731
    one, bits = run(), torch.finfo(dtype).eps * 10  # last bits of all gradients together
    for changes, terms, same in (
        (50, 1, True), (3000, 1, False), (3000, 1 << 18, True), (3e5, 1 << 18, False),
    ):  # fmt: skip
        other = one._replace(grads=[one.grads[0] + changes * bits, one.grads[1]])
        comparison = Comparison(run, a, ["a", "b"], terms)
        assert (comparison.difference(other) is None) == same, (changes, terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_all_shapes_and_dtypes(dtype):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((), (0, 3), (2, 3))]
    params.append(nn.Parameter(torch.ones(3, 2, dtype=dtype).t()))
    names = list("abcd")

    def run():
        assert [p.dtype for p in params] == [dtype] * 4
        assert params[3].stride() == (1, 2)
        return found(sum((p * p).sum() for p in params), params)

    comparison = Comparison(run, params, names)
    other = run()
    assert comparison.difference(other._replace(loss=2 * other.loss)) is not None


def test_rounding_that_reaches_another_vector_is_rounding():
    """Last bits that switch a ReLU change one vector or another, by chance."""
    p = parameter(1.0, 2.0, 3.0, dtype=torch.float32)

    def run() -> Found:
        last_bits = (p.detach().view(torch.int32) & 1).float().mean()
        return Found(torch.ones(()), [torch.ones(3) * (1 + 1e-3 * last_bits), torch.ones(3)])

    comparison = Comparison(run, [p, p], ["one", "other"])
    assert (
        comparison.difference(Found(torch.ones(()), [torch.ones(3), torch.full((3,), 1.02)]))
        is None
    )
    other = comparison.difference(Found(torch.ones(()), [torch.ones(3), torch.full((3,), 1.5)]))
    assert other == "another gradient reaches other"
