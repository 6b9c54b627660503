"""fbopt.analysis against dense Hessians, stored gradients, SciPy, and quadratics."""

from __future__ import annotations

import math
import weakref

import analysis_cases
import numpy as np
import pytest
import torch
from conftest import bits
from torch import nn

from fbopt import FullBatchGD
from fbopt.analysis import (
    Hessian,
    Objective,
    difference,
    eigenpairs,
    gradient_statistics,
    hessian_trace,
    loss_landscape,
    measure_flatness,
    random_direction,
    stability_threshold,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {"mlp": analysis_cases.mlp, "convolutional": analysis_cases.convolutional}


@pytest.fixture(scope="module", params=CASES)
def dense(request):
    """A case and its dense Hessian, float64."""
    case = CASES[request.param]()
    return case, analysis_cases.dense_hessian(case)


ACCURACY = {"exact": 1e-6, "central": 1e-3, "forward": 1e-3}


@pytest.mark.parametrize("method", ACCURACY)
def test_eigenpairs_of_the_dense_hessian(dense, method, backend):
    case, matrix = dense
    values, vectors = torch.linalg.eigh(matrix)
    found = eigenpairs(Hessian(case.objective(), method), 5)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, values.flip(0)[:5], rtol=ACCURACY[method])
    overlap = (found.vectors @ vectors.flip(1)[:, :5]).abs()
    torch.testing.assert_close(overlap, torch.eye(5).double(), rtol=0, atol=3e-3)
    true = (matrix @ found.vectors.T).T - torch.from_numpy(found.values)[:, None] * found.vectors
    np.testing.assert_allclose(found.residuals, true.norm(dim=1), rtol=1e-2, atol=1e-5)


def test_finite_differences_in_float32():
    """The same weights in float32, so also at another point than float64 would have reached."""
    case = analysis_cases.mlp(torch.float32)
    wide = analysis_cases.Case(
        nn.Sequential(*case.model).double(), case.loss_fn, [(x.double(), y) for x, y in case.chunks]
    )
    values = torch.linalg.eigvalsh(analysis_cases.dense_hessian(wide)).flip(0)[:5]
    case.model.float()
    for method in ACCURACY:
        found = eigenpairs(Hessian(case.objective(), method), 5)
        np.testing.assert_allclose(found.values, values, rtol=1e-3)


def test_both_ends_are_scipys(dense):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    case, matrix = dense
    operator = Hessian(case.objective())
    size = len(matrix)

    def product(v: np.ndarray) -> np.ndarray:
        return operator(torch.from_numpy(v).reshape(-1)).numpy()

    sparse = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    largest = linalg.eigsh(sparse, 3, which="LA", return_eigenvectors=False)[::-1]
    smallest = linalg.eigsh(sparse, 3, which="SA", return_eigenvectors=False, ncv=60)
    found = eigenpairs(Hessian(case.objective()), 3, "both")
    np.testing.assert_allclose(found.values, [*largest, *np.sort(smallest)], rtol=1e-6)
    assert found.values[3] < 0 < found.values[2]


def test_frozen_batchnorm_has_its_own_hessian():
    case = analysis_cases.convolutional()
    chunk, frozen = (analysis_cases.dense_hessian(case, b) for b in ("chunk", "frozen"))
    v = torch.randn(len(chunk), dtype=torch.float64)
    for name, matrix in (("chunk", chunk), ("frozen", frozen)):
        product = Hessian(case.objective(batchnorm=name))(v)
        torch.testing.assert_close(product, matrix @ v)
    assert not torch.allclose(chunk, frozen, rtol=1e-2)


SPECTRA = {
    "apart": [9.0, 7.0, 4.0, 2.0, 1.0, 0.5, -0.5, -3.0],
    "multiple": [3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "multiple of the identity": [2.0] * 6,
    "zero": [0.0] * 5,
    "of rank one": [5.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ACCURACY)
def test_a_quadratic_of_known_eigenvalues(name, method):
    known = torch.tensor(SPECTRA[name], dtype=torch.float64)
    objective, _ = analysis_cases.quadratic(known)
    hessian = Hessian(objective, method)
    if method != "exact" and name != "apart":
        pytest.skip("differences of a quadratic are rounding where it is flat")
    found = eigenpairs(hessian, 3)
    tolerance = 1e-10 if method == "exact" else 1e-5
    np.testing.assert_allclose(found.values, known[:3], rtol=tolerance, atol=1e-10)
    least = eigenpairs(hessian, 2, "smallest")
    np.testing.assert_allclose(least.values, known.flip(0)[:2], rtol=tolerance, atol=1e-10)
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(3).double(), rtol=0, atol=1e-8)


def test_what_has_not_converged_is_said():
    objective, _ = analysis_cases.quadratic(torch.linspace(0, 1, 300, dtype=torch.float64))
    found = eigenpairs(Hessian(objective), 4, max_products=12, verify=False)
    assert found.products == 12 and not found.converged.all()
    assert (found.residuals[~found.converged] > 1e-6).all()


def test_the_trace_is_within_its_error_bar(dense):
    case, matrix = dense
    exact, off = float(matrix.trace()), matrix - torch.diag(matrix.diagonal())
    found = hessian_trace(Hessian(case.objective()), 100, seed=3)
    assert abs(found.value - exact) < 3 * found.error
    deviation = math.sqrt(2 * float(off.square().sum()))  # of one sample
    assert found.error == pytest.approx(deviation / 10, rel=0.25)
    assert hessian_trace(Hessian(case.objective()), 100, seed=3) == found


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
    """McCandlish et al., appendix A.1, with the small batch of N/C samples."""
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
    """Gradients x_i of independent samples with mean 0.5 and variance 1 in each of 40 entries."""
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


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_steps_diverge_just_above_the_threshold(nesterov, clip, momentum):
    """By the spectral radius of the linear recursion of torch.optim.SGD on one eigendirection."""
    if nesterov and not momentum:
        pytest.skip("Nesterov needs momentum")
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


def every_measure(objective):
    gradient_statistics(objective, [torch.ones_like(p) for p in objective.params])
    for method in ACCURACY:
        eigenpairs(Hessian(objective, method), 1, max_products=3)
    hessian_trace(Hessian(objective), 2)
    measure_flatness(objective, 0.5, 2)
    loss_landscape(objective, [random_direction(objective)], [[-0.1, 0.1]])


@pytest.mark.parametrize("dropout", ["off", "seeded"])
@pytest.mark.parametrize("batchnorm", ["chunk", "frozen"])
def test_nothing_is_changed(batchnorm, dropout):
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


@pytest.mark.parametrize("method", ACCURACY)
def test_one_chunks_gradients_are_held_at_a_time(method, monkeypatch):
    """Memory that does not depend on the number of chunks: tensors that autograd made and left."""
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


def test_everything_depends_on_the_seed_alone():
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
