"""Fisher products and traces against per-sample gradients, and both matrices in low precision."""

from __future__ import annotations

import analysis_cases
import pytest
import torch
from curvature_cases import (
    CLOSE,
    dense_fisher,
    matrix,
    sample_gradients,
    small,
    whole,
)
from torch import nn

from fbopt.analysis import (
    Fisher,
    GaussNewton,
    fisher_trace,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fisher_is_the_dense_matrix(labels):
    case = small()
    expected = dense_fisher(case, labels)
    torch.testing.assert_close(matrix(Fisher(case.objective(), labels)), expected, **CLOSE)
    exact = fisher_trace(case.objective(), labels, samples=None)
    assert (exact.value, exact.error) == (pytest.approx(float(expected.trace()), rel=1e-10), 0)
    estimate = fisher_trace(case.objective(), labels, samples=400, seed=1)
    assert abs(estimate.value - exact.value) < 3 * estimate.error
    # The spread of |sum_i s_i g_i|^2/N is known from the Gram matrix.
    if labels == "data":
        gram = sample_gradients(case, *whole(case)) @ sample_gradients(case, *whole(case)).T
        sizes = [len(y) for _, y in case.chunks]
        blocks = torch.block_diag(*[torch.ones(n, n) for n in sizes]).bool()
        off = (gram * blocks).square().sum() - gram.diagonal().square().sum()
        deviation = float((2 * off).sqrt()) / len(gram)
        assert estimate.error == pytest.approx(deviation / 20, rel=0.2)


def test_drawn_labels_average_to_the_models():
    case = small()
    objective, expected = case.objective(), dense_fisher(case, "model")
    one, same, many = (matrix(Fisher(objective, "model", draws=n, seed=3)) for n in (2, 2, 1_000))
    assert torch.equal(one, same) and (one - expected).norm() > 0.1 * expected.norm()
    assert (many - expected).norm() < 0.12 * expected.norm()
    exact = fisher_trace(objective, "model", draws=2, samples=None, seed=3)
    assert exact.value == pytest.approx(float(one.trace()), rel=1e-10)


def test_label_smoothing_leaves_the_models_fisher():
    case = small(nn.CrossEntropyLoss(label_smoothing=0.2))
    found = matrix(Fisher(case.objective(), "model"))
    case.loss_fn = nn.functional.cross_entropy
    torch.testing.assert_close(found, dense_fisher(case, "model"), **CLOSE)


def test_samples_of_a_chunk_with_batchnorm():
    """g_i is the derivative of sample i's loss as it is in its chunk."""
    case = analysis_cases.convolutional()
    objective = case.objective()
    vector = torch.randn(objective.size, dtype=torch.float64)
    case.model.train()
    case.model[-2].eval()  # dropout
    total, expected = sum(len(y) for _, y in case.chunks), torch.zeros_like(vector)
    buffers = [b.clone() for b in case.model.buffers()]
    for x, y in case.chunks:
        losses = nn.functional.cross_entropy(case.model(x), y, reduction="none")
        for loss in losses:
            grads = torch.autograd.grad(loss, list(case.model.parameters()), retain_graph=True)
            g = torch.cat([g.reshape(-1) for g in grads])
            expected += g * (g @ vector) / total
    for b, old in zip(case.model.buffers(), buffers, strict=True):
        b.copy_(old)
    torch.testing.assert_close(Fisher(objective)(vector), expected, **CLOSE)
    torch.testing.assert_close(
        Fisher(objective, "model")(vector), GaussNewton(objective)(vector), **CLOSE
    )


@pytest.fixture(scope="module")
def fitted() -> analysis_cases.Case:
    """Losses of about 1e-3: derivatives of single samples are below half precision's range."""
    case = analysis_cases.mlp(torch.float32)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    x, y = whole(case)
    for _ in range(300):
        optimizer.zero_grad()
        case.loss_fn(case.model(x), y).backward()
        optimizer.step()
    return case


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.05), (torch.float16, 0.008)])
def test_products_are_those_of_autocast(fitted, dtype, off):
    vector = torch.randn(1654, generator=torch.Generator().manual_seed(0))
    for kind, labels in ((GaussNewton, ()), (Fisher, ("data",)), (Fisher, ("model",))):
        low, full = (kind(fitted.objective(autocast=t), *labels)(vector) for t in (dtype, None))
        assert 1e-4 * full.norm() < (low - full).norm() < off * full.norm()
    low, full = (
        fisher_trace(fitted.objective(autocast=t), samples=None).value for t in (dtype, None)
    )
    assert 0 < abs(low - full) < off * full


def test_products_of_a_model_in_bfloat16():
    """Close to those of the same weights in float64."""
    case, wide = analysis_cases.mlp(torch.bfloat16), analysis_cases.mlp(torch.bfloat16)
    wide.model.double()
    wide.chunks = [(x.double(), y) for x, y in wide.chunks]
    vector = torch.randn(1654, generator=torch.Generator().manual_seed(0))
    for kind in (GaussNewton, Fisher):
        low, full = kind(case.objective())(vector), kind(wide.objective())(vector.double())
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.08 * full.norm()
