"""Gauss-Newton and Fisher products and traces against dense Jacobians and curvlinops."""

from __future__ import annotations

import analysis_cases
import curvlinops
import numpy as np
import pytest
import torch
from torch import nn

from fbopt.analysis import (
    Fisher,
    GaussNewton,
    Hessian,
    Objective,
    eigenpairs,
    fisher_trace,
    hessian_trace,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def small(loss_fn=nn.functional.cross_entropy, outputs: int = 3) -> analysis_cases.Case:
    """43 parameters, chunks of 8, 8 and 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    x, y = torch.randn(19, 4).double(), torch.randint(3, (19,))
    if loss_fn is not nn.functional.cross_entropy and not isinstance(loss_fn, nn.CrossEntropyLoss):
        y = torch.randn(19, outputs).double()
    return analysis_cases.Case(model, loss_fn, list(zip(x.split(8), y.split(8), strict=True)))


def jacobian(case: analysis_cases.Case, x: torch.Tensor) -> torch.Tensor:
    """The outputs' derivative by all parameters, (n * outputs, P), one backward pass each."""
    rows, params = [], list(case.model.parameters())
    for output in case.model(x).flatten():
        grads = torch.autograd.grad(output, params, retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def whole(case: analysis_cases.Case) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.cat(side) for side in zip(*case.chunks, strict=True))
    return x, y


def dense_gauss_newton(case: analysis_cases.Case) -> torch.Tensor:
    x, y = whole(case)
    z = case.model(x).detach()
    inner = torch.autograd.functional.hessian(lambda z: case.loss_fn(z, y), z)
    flat = jacobian(case, x)
    return flat.T @ inner.reshape(len(flat), len(flat)) @ flat


def sample_gradients(case: analysis_cases.Case, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A row for each sample: the gradient of its own loss, one backward pass each."""
    rows = []
    for i in range(len(x)):
        loss = case.loss_fn(case.model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(case.model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def dense_fisher(case: analysis_cases.Case, labels: str) -> torch.Tensor:
    x, y = whole(case)
    if labels == "data":
        rows = sample_gradients(case, x, y)
        return rows.T @ rows / len(x)
    p = case.model(x).detach().softmax(1)
    total = 0.0
    for label in range(p.shape[1]):
        rows = sample_gradients(case, x, torch.full((len(x),), label))
        total = total + (rows * p[:, label, None]).T @ rows / len(x)
    return total


def matrix(operator) -> torch.Tensor:
    size = operator.objective.size
    return torch.stack([operator(row) for row in torch.eye(size, dtype=torch.float64)])


LOSSES = {
    "cross_entropy": nn.functional.cross_entropy,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "mse": nn.functional.mse_loss,
    "own": lambda z, y: ((z - y) ** 4).sum(1).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_is_the_dense_matrix(name):
    case = small(LOSSES[name])
    found = matrix(GaussNewton(case.objective()))
    torch.testing.assert_close(found, dense_gauss_newton(case), **CLOSE)
    assert (found - analysis_cases.dense_hessian(case)).norm() > 1e-2 * found.norm()


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    case = small()
    case.model = nn.Linear(4, 3).double()
    torch.testing.assert_close(
        matrix(GaussNewton(case.objective())), analysis_cases.dense_hessian(case), **CLOSE
    )


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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_curvlinops_agrees(name):
    case = small(LOSSES[name])
    loss = nn.CrossEntropyLoss() if name == "cross_entropy" else nn.MSELoss()
    params = [p for p in case.model.parameters() if p.requires_grad]
    pairs = [
        (Hessian, curvlinops.HessianLinearOperator),
        (GaussNewton, curvlinops.GGNLinearOperator),
    ]
    if name == "cross_entropy":  # its squared error is the mean over elements, too
        pairs.append((Fisher, curvlinops.EFLinearOperator))
    vectors = torch.randn(2, sum(p.numel() for p in params), dtype=torch.float64)
    for ours, theirs in pairs:
        oracle = theirs(case.model, loss, params, case.chunks, check_deterministic=False)
        operator = ours(case.objective())
        for vector in vectors:
            torch.testing.assert_close(operator(vector), (oracle @ vector).detach(), **CLOSE)


def test_eigenpairs_traces_and_costs():
    case = small()
    objective = case.objective()
    dense = dense_gauss_newton(case)
    operator = GaussNewton(objective)
    values = torch.linalg.eigvalsh(dense).flip(0)
    found = eigenpairs(operator, 3)
    np.testing.assert_allclose(found.values, values[:3], rtol=1e-8)
    estimate = hessian_trace(operator, 100)
    assert abs(estimate.value - float(dense.trace())) < 3 * estimate.error
    before = objective.cost.copy()
    operator(torch.ones(objective.size, dtype=torch.float64))
    spent = objective.cost.since(before)
    assert (spent.losses, spent.gradients, spent.second_backwards) == (0, 1, 2)
    before = objective.cost.copy()
    fisher_trace(objective, samples=5)
    spent = objective.cost.since(before)
    assert (spent.losses, spent.gradients, spent.second_backwards) == (0, 1, 4)


@pytest.mark.parametrize("kind", [GaussNewton, Fisher])
def test_a_stale_point_is_refused(kind):
    case = small()
    operator, vector = kind(case.objective()), torch.ones(43, dtype=torch.float64)
    with torch.no_grad():
        case.model[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"0\.weight has changed.*operator\.refresh\(\)"):
        operator(vector)
    assert operator.products == 0
    operator.refresh()
    assert torch.equal(operator(vector), kind(case.objective())(vector))


def test_scipy_finds_the_same_eigenvalues():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = GaussNewton(small().objective())
    found = linalg.eigsh(operator.as_scipy(), 3, which="LA", return_eigenvectors=False)[::-1]
    np.testing.assert_allclose(found, eigenpairs(operator, 3).values, rtol=1e-8)
    narrow = Hessian(analysis_cases.mlp(torch.float32).objective()).as_scipy()
    assert narrow.dtype == np.float32 and narrow.shape == (1654, 1654)
    assert (narrow @ np.ones((1654, 2), np.float32)).shape == (1654, 2)


def test_scipy_is_imported_by_as_scipy_alone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        GaussNewton(small().objective()).as_scipy()


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


class Lost(torch.autograd.Function):
    """A square whose backward pass detaches."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return (2 * ctx.saved_tensors[0] * g).detach()


class WithLost(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        return Lost.apply(self.linear(x))


def test_lost_derivatives_are_refused():
    case = small()
    case.model = WithLost()
    with pytest.raises(RuntimeError, match=r"J v differentiates.*Lost.*method='central'"):
        GaussNewton(case.objective())(torch.ones(15, dtype=torch.float64))
    case = small(lambda z, y: Lost.apply(z - y).mean())
    with pytest.raises(RuntimeError, match=r"J v differentiates.*Lost"):
        GaussNewton(case.objective())(torch.ones(43, dtype=torch.float64))


def test_a_loss_that_is_flat_in_the_outputs_has_no_gauss_newton():
    case = small(nn.functional.l1_loss)
    found = GaussNewton(case.objective())(torch.ones(43, dtype=torch.float64))
    assert not found.any()


def ignoring(case):
    x, y = case.chunks[0]
    return [(x, y.index_fill(0, torch.tensor([1]), -100)), *case.chunks[1:]]


def regularised(case):
    weight = case.model[0].weight
    return lambda z, y: nn.functional.cross_entropy(z, y) + weight.square().sum()


def squares(z, y):
    return nn.functional.mse_loss(z, nn.functional.one_hot(y, 3).double())


def evaluate(model, chunk):
    return nn.functional.cross_entropy(model(chunk[0]), chunk[1])


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
REFUSALS = {
    "labels": (lambda c, o: Fisher(o, "true"), "labels must be one of"),
    "draws": (lambda c, o: Fisher(o, "data", draws=2), "draws is for labels='model'"),
    "no draws": (lambda c, o: Fisher(o, "model", draws=0), "draws must be"),
    "samples": (lambda c, o: fisher_trace(o, samples=1), "samples must be at least 2"),
    "evaluate": (lambda c, o: GaussNewton(with_(c, None, evaluate=evaluate)), "loss_fn and chunks"),
    "traced": (lambda c, o: fisher_trace(with_(c, None, evaluate=evaluate)), "loss_fn and chunks"),
    "linear": (lambda c, o: fisher_trace(with_(c, lambda z, y: -z.mean()), "model"), "entropy"),
    "squares": (lambda c, o: multiply(Fisher(with_(c, squares), "model")), "cross-entropy"),
    "sum": (
        lambda c, o: multiply(
            Fisher(with_(c, lambda z, y: 2 * nn.functional.cross_entropy(z, y)), "model")
        ),
        "cross-entropy",
    ),
    "weights": (lambda c, o: Fisher(with_(c, WEIGHTED)), "class weights"),
    "ignored": (lambda c, o: multiply(Fisher(with_(c, chunks=ignoring(c)))), "mean over the rows"),
    "batch": (
        lambda c, o: multiply(Fisher(with_(c, lambda z, y: (z - z.mean(0)).square().mean()))),
        "mean over the rows",
    ),
    "regulariser": (
        lambda c, o: multiply(GaussNewton(with_(c, regularised(c)))),
        "reads the model",
    ),
}


def with_(case, *loss_fn, chunks=None, **options):
    loss = loss_fn[0] if loss_fn else case.loss_fn
    return Objective(case.model, loss, chunks or case.chunks, **options)


def multiply(operator):
    return operator(torch.ones(operator.objective.size, dtype=torch.float64))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_measured_is_refused(name):
    work, words = REFUSALS[name]
    case = small()
    with pytest.raises(ValueError, match=words):
        work(case, case.objective())


def test_a_compiled_model_and_a_short_vector_are_refused():
    case = small()
    with pytest.raises(ValueError, match=r"vector has shape \(3,\).*\(43,\)"):
        GaussNewton(case.objective())(torch.ones(3, dtype=torch.float64))
    case.model = torch.compile(case.model, backend="eager")
    for work in (GaussNewton, Fisher, fisher_trace):
        with pytest.raises(RuntimeError, match=r"compiled model.*the model before torch\.compile"):
            work(case.objective())


def test_an_output_of_several_tensors_is_refused():
    case = small()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = case.model

        def forward(self, x):
            return {"logits": self.inner(x)}

    objective = Objective(
        Two(), lambda z, y: nn.functional.cross_entropy(z["logits"], y), case.chunks
    )
    with pytest.raises(TypeError, match="has to be one tensor"):
        multiply(GaussNewton(objective))
