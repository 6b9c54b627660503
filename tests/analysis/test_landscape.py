"""Directions, landscapes and flatness against moved models and a bowl."""

from __future__ import annotations

import math

import analysis_cases
import numpy as np
import pytest
import torch

from fbopt.analysis import difference, loss_landscape, measure_flatness, random_direction

pytestmark = pytest.mark.usefixtures("one_thread")


def test_directions_have_the_filters_norms():
    case = analysis_cases.convolutional()
    objective = case.objective()
    parts = objective.unflatten(random_direction(objective, 1))
    for p, d in zip(objective.params, parts, strict=True):
        norms = d.flatten(1).norm(dim=1) if d.dim() > 1 else d
        target = p.detach().flatten(1).norm(dim=1) if d.dim() > 1 else torch.zeros_like(d)
        torch.testing.assert_close(norms, target)
    scaled = objective.unflatten(random_direction(objective, 1, vectors="scaled"))
    for p, d in zip(objective.params, scaled, strict=True):
        torch.testing.assert_close(d.norm(), p.detach().norm())
    assert torch.equal(random_direction(objective, 1), random_direction(objective, 1))
    assert not torch.equal(random_direction(objective, 1), random_direction(objective, 1, 1))


def test_landscapes_are_losses_of_moved_models():
    case = analysis_cases.convolutional()
    other = analysis_cases.convolutional()
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    objective = case.objective()
    ways = [difference(objective, other.model.state_dict()), random_direction(objective)]
    found = loss_landscape(objective, ways, [[0.0, 0.5, 1.0], [0.0, 0.25]])
    assert found.losses.shape == (3, 2)
    assert found.losses[0, 0] == pytest.approx(objective.loss(), rel=1e-14)
    assert found.losses[2, 0] == pytest.approx(other.objective().loss(), rel=1e-12)
    with torch.no_grad():
        moves = objective.unflatten(0.5 * ways[0] + 0.25 * ways[1])
        for p, move in zip(case.model.parameters(), moves, strict=True):
            p.add_(move)
    assert found.losses[1, 1] == pytest.approx(case.objective().loss(), rel=1e-12)
    line = loss_landscape(case.objective(), [1e4 * ways[1]], [[0.0, 1e300]])
    assert line.as_json()["losses"][1] is None  # not finite: no number in JSON


def test_flatness_of_a_bowl_is_known():
    """L = a |theta - theta_0|^2/2 rises by h at |t d| = sqrt(2 h/a)."""
    objective, _ = analysis_cases.quadratic(torch.full((6,), 5.0, dtype=torch.float64))
    center = objective.theta()
    inner = objective.evaluate
    objective.evaluate = lambda m, c: inner(m, c) - 5 * m.weight[0] @ center + m.weight.sum() * 0
    found = measure_flatness(objective, 0.2, 6)
    np.testing.assert_allclose(found.lengths, math.sqrt(2 * 0.2 / 5), rtol=2e-3)
    assert found.reached == 6 and found.error < 1e-2 * found.mean
    near = measure_flatness(objective, 1e6, 3, limit=0.5)
    assert near.reached == 0 and near.distances == (0.5,) * 3
