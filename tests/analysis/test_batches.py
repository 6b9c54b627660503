"""Sharpness along directions and of mini-batches, and loss gaps, against their definitions."""

from __future__ import annotations

import analysis_cases
import pytest
import torch
from torch import nn

from fbopt.analysis import (
    Hessian,
    Objective,
    batch_sharpness,
    critical_sharpness,
    directional_sharpness,
    loss_gap,
)
from fbopt.analysis.batches import Batches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case():
    return analysis_cases.convolutional()


def quotient(objective: Objective, direction: torch.Tensor) -> float:
    """d.H d/|d|^2 with the dense Hessian."""
    return rayleigh(dense(objective), direction)


def dense(objective: Objective) -> torch.Tensor:
    case = analysis_cases.Case(objective.model, objective.loss_fn, objective.chunks)
    return analysis_cases.dense_hessian(case)


def rayleigh(matrix: torch.Tensor, direction: torch.Tensor) -> float:
    return float(direction @ matrix @ direction / direction.square().sum())


def test_directional_sharpness_is_the_rayleigh_quotient(case):
    objective = case.objective()
    direction, matrix = torch.randn(objective.size, dtype=torch.float64), dense(objective)
    for d, given in ((objective.gradient(), None), (direction, direction)):
        found = directional_sharpness(objective, given)
        assert found == pytest.approx(rayleigh(matrix, d), rel=1e-8)
    scaled = directional_sharpness(objective, -30 * direction)
    assert scaled == pytest.approx(found, rel=1e-12)
    assert objective.cost.second_backwards == 3
    central = directional_sharpness(objective, direction, hessian=Hessian(objective, "central"))
    assert central == pytest.approx(found, rel=1e-4) and central != found


def test_critical_sharpness_of_a_quadratic_is_the_directional_one():
    objective, _ = analysis_cases.quadratic(torch.tensor([9.0, 7, 4, 1, 0.5]).double())
    gradient = objective.gradient()
    expected = directional_sharpness(objective)
    for start in (0.06, 0.28, 0.9):
        found = critical_sharpness(objective, start=start)
        assert found.value == pytest.approx(expected, rel=1e-8) and found.reached
        assert found.losses <= 6
    update = torch.tensor([0.3, -0.2, 0.5, 0.1, 1.0]).double()
    update = update * -torch.sign(update @ gradient)
    curvature = directional_sharpness(objective, update) * float(update.square().sum())
    found = critical_sharpness(objective, update)
    assert found.value == pytest.approx(curvature / -float(update @ gradient), rel=1e-8)


def test_critical_sharpness_is_where_the_loss_is_back(case):
    objective = case.objective()
    update, base = -0.3 * objective.gradient(), objective.loss()
    directional_sharpness(objective, update)  # with the check that the loss is deterministic
    before = objective.cost.losses
    found = critical_sharpness(objective, update, precision=1e-6)
    assert found.losses == objective.cost.losses - before
    assert objective.loss(found.step * update) == pytest.approx(base, rel=1e-6)
    for share in (0.25, 0.5, 0.75, 0.99):
        assert objective.loss(share * found.step * update) < base
    assert objective.loss(1.01 * found.step * update) > base
    assert found.value == 2 / found.step
    for start in (1e-3, 30.0):
        other = critical_sharpness(objective, update, start=start)
        assert other.step == pytest.approx(found.step, rel=0.02)
        assert other.losses < 20


def test_an_exploding_loss_is_bracketed():
    """Beyond the zero the loss grows by orders of magnitude: secants alone would crawl."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.0)

    def evaluate(model, chunk):
        theta = model.weight[0, 0]
        return torch.exp(40 * (theta - 1.3)) - theta

    objective = Objective(model, chunks=[torch.ones(1)], evaluate=evaluate, weight=lambda c: 1)
    found = critical_sharpness(objective, torch.ones(1).double(), precision=1e-3)
    zero = found.step
    assert abs(objective.loss(torch.full((1,), zero).double()) - objective.loss()) < 0.1
    assert 1.3 < zero < 1.32 and found.losses < 25


def test_a_loss_that_never_rises_is_marked():
    model = nn.Linear(3, 1).double()
    objective = Objective(
        model, chunks=[torch.ones(1)], evaluate=lambda m, c: m.bias.sum(), weight=lambda c: 1
    )
    found = critical_sharpness(objective, start=1.0, limit=64.0)
    assert (found.reached, found.step, found.value) == (False, 64, 2 / 64)


def test_what_is_no_descent_direction_is_refused(case):
    objective = case.objective()
    with pytest.raises(ValueError, match="does not lower the loss"):
        critical_sharpness(objective, objective.gradient())
    with pytest.raises(ValueError, match="norm zero"):
        critical_sharpness(objective, torch.zeros(objective.size))
    with pytest.raises(ValueError, match=r"objective\.flatten"):
        directional_sharpness(objective, torch.ones(3))
    with pytest.raises(TypeError, match=r"objective\.flatten"):
        directional_sharpness(objective, [torch.ones(3)])


def chosen(case, size, count, seed):
    """The batches that are drawn, as pairs."""
    return [batch.chunks[0] for batch in Batches(case.objective()).draw(size, count, seed)]


def test_batch_sharpness_against_dense_hessians(case):
    (found,) = batch_sharpness(case.objective(), [6], 3, seed=5)
    curvatures, squares = [], []
    for pair in chosen(case, 6, 3, 5):
        batch = Objective(case.model, case.loss_fn, [pair])
        g = batch.gradient()
        squares.append(float(g @ g))
        curvatures.append(quotient(batch, g) * squares[-1])
    ratios = torch.tensor(curvatures) / torch.tensor(squares)
    assert found.value == pytest.approx(float(ratios.mean()), rel=1e-6)
    assert found.error == pytest.approx(float(ratios.std()) / 3**0.5, rel=1e-5)
    assert found.ratio == pytest.approx(sum(curvatures) / sum(squares), rel=1e-8)
    assert (found.size, found.samples) == (6, 3)


def test_the_batch_of_all_samples_has_the_directional_sharpness():
    case = analysis_cases.mlp()
    (found,) = batch_sharpness(case.objective(), [50], 2)
    assert found.value == pytest.approx(directional_sharpness(case.objective()), rel=1e-8)
    (gap,) = loss_gap(case.objective(), [50], 2)
    assert gap.loss_mean == pytest.approx(gap.loss, rel=1e-12) and gap.distance_mean < 1e-10
    assert gap.cosine == pytest.approx(1) and abs(gap.gap) < 1e-12


def test_draws_are_without_replacement_and_depend_on_the_seed():
    case = analysis_cases.mlp()
    x = torch.cat([x for x, _ in case.chunks])
    first, other = (chosen(case, 20, 4, seed) for seed in (0, 1))
    for inputs, _ in first:
        rows = {int((x == row).all(1).nonzero()) for row in inputs}
        assert len(rows) == 20
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, chosen(case, 20, 2, 0), strict=False))
    assert not torch.equal(first[0][0], other[0][0]) and not torch.equal(first[0][0], first[1][0])


def test_loss_gaps_against_their_definitions(case):
    objective = case.objective()
    (found,) = loss_gap(objective, [6], 5, seed=2)
    g, losses, distances, cosines = objective.gradient(), [], [], []
    for pair in chosen(case, 6, 5, 2):
        batch = Objective(case.model, case.loss_fn, [pair])
        h = batch.gradient()
        losses.append(batch.loss())
        distances.append(float((h - g).norm() / g.norm()))
        cosines.append(float(h @ g / (h.norm() * g.norm())))
    table = torch.tensor([losses, distances, cosines], dtype=torch.float64)
    mean, deviation = table.mean(1).tolist(), table.std(1).tolist()
    assert found.loss == pytest.approx(objective.loss(), rel=1e-12)
    assert found.loss_mean == pytest.approx(mean[0], rel=1e-8)
    assert found.loss_deviation == pytest.approx(deviation[0], rel=1e-8)
    assert found.gap == pytest.approx((mean[0] - found.loss) / found.loss, rel=1e-8)
    assert found.distance_mean == pytest.approx(mean[1], rel=1e-8)
    assert found.distance_deviation == pytest.approx(deviation[1], rel=1e-8)
    assert found.cosine == pytest.approx(mean[2], rel=1e-8)


def test_the_expected_distance_is_that_of_the_noise_trace():
    """E |g_B - g|^2 = tr(S)/B (N - B)/(N - 1) for draws without replacement."""
    case = analysis_cases.mlp()
    objective, size = case.objective(), 10
    x, y = (torch.cat(side) for side in zip(*case.chunks, strict=True))
    g = objective.gradient()
    noise = 0.0
    for i in range(50):
        one = Objective(case.model, case.loss_fn, [(x[i : i + 1], y[i : i + 1])])
        noise += float((one.gradient() - g).square().sum()) / 50
    (found,) = loss_gap(objective, [size], 200)
    expected = noise / size * (50 - size) / 49 / float(g @ g)
    square = found.distance_mean**2 + found.distance_deviation**2
    assert square == pytest.approx(expected, rel=0.1)


def test_the_model_is_left_as_it_was(case):
    state = {name: t.clone() for name, t in case.model.state_dict().items()}
    draws = torch.get_rng_state()
    objective = case.objective(dropout="seeded")
    batch_sharpness(objective, [5], 2)
    loss_gap(objective, [5], 2)
    critical_sharpness(objective)
    assert all(torch.equal(t, state[name]) for name, t in case.model.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state())


def test_measures_under_autocast():
    case = analysis_cases.mlp(torch.float32)
    low, full = (case.objective(autocast=t) for t in (torch.bfloat16, None))
    pairs = [
        [directional_sharpness(o) for o in (low, full)],
        [batch_sharpness(o, [20], 3)[0].value for o in (low, full)],
        [loss_gap(o, [20], 3)[0].distance_mean for o in (low, full)],
        [critical_sharpness(o).value for o in (low, full)],
    ]
    for narrow, wide in pairs:
        assert narrow == pytest.approx(wide, rel=0.1) and narrow != wide


REFUSALS = {
    "size": (lambda c: batch_sharpness(c.objective(), [0]), ValueError, "from 1 to the 33 samples"),
    "fraction": (lambda c: loss_gap(c.objective(), [2.5]), ValueError, "whole number"),
    "larger": (lambda c: loss_gap(c.objective(), [34]), ValueError, "from 1 to the 33 samples"),
    "samples": (lambda c: loss_gap(c.objective(), [3], 1), ValueError, "samples must be at least"),
    "evaluate": (
        lambda c: loss_gap(Objective(c.model, chunks=c.chunks, evaluate=evaluate), [3]),
        ValueError,
        "without evaluate or weight",
    ),
    "chunks": (
        lambda c: loss_gap(
            Objective(c.model, c.loss_fn, [{"x": x, "y": y} for x, y in c.chunks]), [3]
        ),
        Exception,
        "input, target",
    ),
}


def evaluate(model, chunk):
    return nn.functional.cross_entropy(model(chunk[0]), chunk[1])


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_drawn_is_refused(name, case):
    work, kind, words = REFUSALS[name]
    with pytest.raises(kind, match=words):
        work(case)
