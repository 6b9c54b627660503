"""What every measure leaves unchanged, what it holds in memory, and what it counts."""

from __future__ import annotations

import weakref

import analysis_cases
import pytest
import torch
from conftest import bits

from fbopt.analysis import (
    Hessian,
    Objective,
    eigenpairs,
    gradient_statistics,
    hessian_trace,
    loss_landscape,
    measure_flatness,
    random_direction,
)
from fbopt.analysis.hessian import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def every_measure(objective):
    gradient_statistics(objective, [torch.ones_like(p) for p in objective.params])
    for method in METHODS:
        eigenpairs(Hessian(objective, method), 1, max_products=3)
    hessian_trace(Hessian(objective), 2)
    measure_flatness(objective, 0.5, 2)
    loss_landscape(objective, [random_direction(objective)], [[-0.1, 0.1]])


@pytest.mark.parametrize("dropout", ["off", "seeded"])
@pytest.mark.parametrize("batchnorm", ["chunk", "frozen"])
def test_measures_change_nothing(batchnorm, dropout):
    case = analysis_cases.convolutional(torch.float32)
    case.model[4].eval()  # one BatchNorm that somebody has frozen
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in case.model.parameters()]
    before, state = bits(case.model, grads), torch.get_rng_state()
    every_measure(case.objective(batchnorm=batchnorm, dropout=dropout))
    assert bits(case.model, [p.grad for p in case.model.parameters()]) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exception_changes_nothing():
    case = analysis_cases.convolutional(torch.float32)
    objective = case.objective()
    direction = random_direction(objective)
    before = bits(case.model)

    def fails(output, target):
        raise KeyboardInterrupt

    objective.loss_fn = fails
    for work in (objective.loss, objective.gradient):
        with pytest.raises(KeyboardInterrupt):
            work(direction)
        assert bits(case.model) == before


@pytest.mark.parametrize("method", METHODS)
def test_one_chunks_gradients_are_held_at_a_time(method, monkeypatch):
    """Count the gradients alive at every call of autograd: memory does not grow with chunks."""
    case = analysis_cases.mlp(torch.float32)
    x, y = (torch.cat(part) for part in zip(*case.chunks, strict=True))
    made: list[weakref.ref] = []
    grad, alive = torch.autograd.grad, []

    def recorded(*arguments, **options):
        alive.append(sum(ref() is not None for ref in made))
        grads = grad(*arguments, **options)
        made.extend(weakref.ref(g) for g in grads if g is not None)
        return grads

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    objective = Objective(case.model, case.loss_fn, list(zip(x.split(2), y.split(2), strict=True)))
    hessian = Hessian(objective, method)
    hessian(torch.ones(objective.size))
    gradient_statistics(objective)
    assert len(alive) >= 2 * 25 and max(alive) <= 2 * len(objective.params)


def test_costs_are_counted():
    case = analysis_cases.mlp(torch.float32)
    objective, seen = case.objective(), []
    objective.on_pass = lambda: seen.append(1)
    gradient_statistics(objective)
    assert vars(objective.cost) == {"losses": 3, "gradients": 1, "second_backwards": 0}
    before = objective.cost.copy()
    Hessian(objective)(torch.ones(objective.size))
    Hessian(objective, "central")(torch.ones(objective.size))
    Hessian(objective, "forward")(torch.ones(objective.size))
    loss_landscape(objective, [random_direction(objective)], [[0.0] * 7])
    spent = objective.cost.since(before)
    assert vars(spent) == {"losses": 7, "gradients": 1 + 2 + 2, "second_backwards": 1}
    assert len(seen) == 4 + 1 + 2 + 2 + 7


def test_results_depend_on_the_seed_alone():
    def numbers(seed):
        objective = analysis_cases.convolutional(torch.float32).objective(
            dropout="seeded", seed=seed
        )
        torch.manual_seed(numbers.calls)
        numbers.calls += 1
        found = eigenpairs(Hessian(objective, "central"), 2, seed=seed)
        trace = hessian_trace(Hessian(objective), 3, seed)
        flat = measure_flatness(objective, 0.1, 2, seed=seed)
        return found.values.tolist(), trace, flat, objective.loss()

    numbers.calls = 0
    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)
