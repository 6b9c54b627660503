"""Gradient norms and the noise scale against stored gradients and known distributions."""

from __future__ import annotations

import math

import analysis_cases
import numpy as np
import pytest
import torch
from torch import nn

from fbopt.analysis import Objective, gradient_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def stored_gradients(case):
    params = list(case.model.parameters())
    grads = [
        torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(case.loss_fn(case.model(x), y), params)]
        )
        for x, y in case.chunks
    ]
    flat = [torch.cat([part.reshape(-1) for part in g]) for g in grads]
    return torch.stack(flat), torch.tensor([len(y) for _, y in case.chunks]).double()


@pytest.mark.parametrize("one_label", [True, False])
def test_noise_scale_is_the_formula_over_stored_gradients(one_label):
    """McCandlish et al., appendix A.1, with N/C samples as the small batch."""
    case = analysis_cases.mlp()
    if one_label:  # a strong signal; the trained case has none that exceeds its error
        case.chunks = [(x, 0 * y) for x, y in case.chunks]
    grads, n = stored_gradients(case)
    total, count = n.sum(), len(n)
    full = (n / total) @ grads
    small, large = ((n / total) @ grads.square().sum(1)).item(), full.square().sum().item()
    b_small, b_big = (total / count).item(), total.item()
    signal = (b_big * large - b_small * small) / (b_big - b_small)
    noise = (small - large) / (1 / b_small - 1 / b_big)
    momentum = [torch.ones_like(p) for p in case.model.parameters()]
    found = gradient_statistics(case.objective(), momentum)
    norms = grads.norm(dim=1)
    mean = (n / total) @ norms
    cosine = full.sum() / (full.norm() * math.sqrt(len(full)))
    expected = {
        "gradient_norm": math.sqrt(large),
        "chunk_norm_mean": mean.item(),
        "chunk_norm_deviation": ((n / total) @ (norms - mean).square()).sqrt().item(),
        "squared_signal": signal,
        "noise_trace": noise,
        "chunk_signal_to_noise": signal / (noise / b_small),
        "full_signal_to_noise": signal / (noise / b_big),
        "momentum_angle": math.degrees(math.acos(cosine)),
    }
    assert {k: found.as_json()[k] for k in expected} == pytest.approx(expected, rel=1e-10)
    assert (signal > 0) == one_label
    if one_label:
        assert found.noise_scale == pytest.approx(noise / signal, rel=1e-10)
    else:
        assert found.noise_scale is None


def test_noise_estimates_are_unbiased_also_over_ragged_chunks():
    """Sample gradients with mean 0.5 and variance 1 in each of 40 independent entries."""
    torch.manual_seed(5)
    sizes, signal, noise = [3, 8, 1, 20, 8], [], []
    model = nn.Linear(40, 1, bias=False).double()
    for _ in range(300):
        x = 0.5 + torch.randn(sum(sizes), 40, dtype=torch.float64)
        objective = Objective(model, chunks=x.split(sizes), evaluate=lambda m, c: m(c).mean())
        objective.is_deterministic = True
        found = gradient_statistics(objective)
        signal.append(found.squared_signal)
        noise.append(found.noise_trace)
    for values, true in ((signal, 10.0), (noise, 40.0)):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - true) < 3 * error < 0.05 * true


def test_a_single_chunk_has_no_noise_scale():
    case = analysis_cases.mlp()
    found = Objective(case.model, case.loss_fn, case.chunks[:1])
    assert gradient_statistics(found).as_json()["noise_scale"] is None
