"""The threshold of stability against the spectral radius of torch.optim.SGD steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fbopt import FullBatchGD
from fbopt.analysis import stability_threshold

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.7, False), (0.7, True)])
def test_steps_diverge_just_above_the_threshold(nesterov, clip, momentum):
    """Compare the spectral radius of a step on one eigenvector with 1."""
    rule = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 0.4}
    threshold = stability_threshold(0.2, **rule, clip=clip).value
    radii = []
    for curvature in (0.999 * threshold, 1.001 * threshold):
        columns = []
        for theta, velocity in ((1.0, 0.0), (0.0, 1.0)):  # the columns of a step's matrix
            p = nn.Parameter(torch.tensor([theta], dtype=torch.float64))
            optimizer = FullBatchGD([p], lr=0.2, **rule)
            if momentum:
                p.grad = torch.zeros_like(p)
                optimizer.state[p]["momentum_buffer"] = torch.tensor([velocity]).double()
            p.grad = clip * curvature * p.detach()
            optimizer.step()
            buffer = optimizer.state[p]["momentum_buffer"].item() if momentum else 0.0
            columns.append([p.item(), buffer])
        radii.append(np.abs(np.linalg.eigvals(np.array(columns).T)).max())
    assert radii[0] < 1 < radii[1]


def test_thresholds_in_words():
    assert stability_threshold(0.1).value == pytest.approx(20)
    found = stability_threshold(0.1, 0.9, True, weight_decay=0.5, clip=0.5)
    assert found.formula == "((2 + 2 momentum)/(1 + 2 momentum)/lr - weight_decay)/clip"
    assert stability_threshold(0.1, 0.9, dampening=0.5).value == pytest.approx(3.8 / 0.05)
