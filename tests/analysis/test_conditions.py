"""An operator belongs to the parameters at which it was made: refused once they have changed."""

from __future__ import annotations

import copy
import pickle

import analysis_cases
import numpy as np
import pytest
import torch
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD
from fbopt.analysis import Hessian, eigenpairs, gradient_statistics, hessian_trace
from fbopt.analysis.hessian import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def step(case):
    optimizer = FullBatchGD(case.model.parameters(), lr=0.5)
    optimizer.step(FullBatchClosure(case.model, case.loss_fn, case.chunks))


def data_write(case):
    """A write that no version counter notes."""
    case.model[0].weight.data[3] += 1e-6


def exchange(case):
    """The sum of all bits stays as it was."""
    flat = case.model[0].weight.data.view(-1)
    flat[:2] = flat[:2].flip(0)


def replace_memory(case):
    case.model[0].weight.data = case.model[0].weight.data * 2


CHANGES = {f.__name__: f for f in (step, data_write, exchange, replace_memory)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_stale_operator_is_refused_and_refreshed(name, method):
    case = analysis_cases.mlp()
    objective = case.objective()
    hessian = Hessian(objective, method)
    vector = torch.randn(objective.size, dtype=torch.float64)
    hessian(vector)
    products = hessian.products
    CHANGES[name](case)
    for work in (hessian, lambda _: eigenpairs(hessian, 1), lambda _: hessian_trace(hessian, 2)):
        with pytest.raises(RuntimeError, match=r"0\.weight has changed.*hessian\.refresh\(\)"):
            work(vector)
    assert hessian.products == products
    hessian.refresh()
    assert torch.equal(hessian(vector), Hessian(objective, method)(vector))


def test_eigenvalues_after_a_step_are_those_of_the_new_point():
    """With the old gradient forward differences found 280 for 1.9, and called it converged."""
    case = analysis_cases.mlp()
    hessian = Hessian(case.objective(), "forward")
    eigenpairs(hessian, 1)
    step(case)
    hessian.refresh()
    expected = torch.linalg.eigvalsh(analysis_cases.dense_hessian(case))[-1]
    np.testing.assert_allclose(eigenpairs(hessian, 1).values, expected, rtol=1e-3)


def test_buffers_count_where_the_loss_reads_them():
    case = analysis_cases.convolutional()
    chunk, frozen = (Hessian(case.objective(batchnorm=b)) for b in ("chunk", "frozen"))
    vector = torch.ones(chunk.objective.size, dtype=torch.float64)
    before = chunk(vector)
    case.model[1].running_mean += 0.1
    assert torch.equal(chunk(vector), before)
    with pytest.raises(RuntimeError, match=r"1\.running_mean has changed"):
        frozen(vector)


def test_settings_count():
    case = analysis_cases.convolutional()
    hessian = Hessian(case.objective(dropout="seeded"))
    vector = torch.ones(hessian.objective.size, dtype=torch.float64)
    case.model[7].eval()
    with pytest.raises(RuntimeError, match=r"the mode .* of a module has changed"):
        hessian(vector)
    case.model[7].train()
    hessian.objective.batchnorm = "frozen"
    with pytest.raises(RuntimeError, match=r"objective\.batchnorm has changed"):
        hessian(vector)


def test_replaced_and_frozen_parameters_are_refused():
    """A replaced parameter had the gradient zero, without a word."""
    case = analysis_cases.mlp()
    objective = case.objective()
    case.model[2].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"2\.bias has been frozen.*make a new one"):
        objective.gradient()
    case.model[2].bias.requires_grad_(True)
    case.model[0].weight = nn.Parameter(case.model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"0\.weight has been replaced.*make a new one"):
        gradient_statistics(objective)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy])
def test_copies_are_whole_and_apart(make, used):
    case = analysis_cases.convolutional(torch.float32)
    hessian = Hessian(case.objective(), "central")
    vector = torch.ones(hessian.objective.size)
    if used:
        hessian(vector)
    other = make(hessian)
    assert torch.equal(other(vector), hessian(vector))
    assert other.objective.loss() == hessian.objective.loss()
    objective = make(hessian.objective)
    assert torch.equal(objective.gradient(), hessian.objective.gradient())
    with torch.no_grad():
        other.objective.params[0].add_(1)
    with pytest.raises(RuntimeError, match="has changed"):
        other(vector)
    assert torch.equal(objective.gradient(), hessian.objective.gradient())
