"""Invalid input to fbopt.analysis: errors that name the cause and change nothing."""

from __future__ import annotations

import random
import re

import analysis_cases
import pytest
import torch
from conftest import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


@pytest.fixture(scope="module")
def case():
    return analysis_cases.mlp(torch.float32)


def hessian(case):
    return Hessian(case.objective())


def zeros(case):
    return torch.zeros(case.objective().size)


def one(case):
    return torch.ones(case.objective().size)


ROWS = {
    "batchnorm": (lambda c: c.objective(batchnorm="off"), "batchnorm must be one of"),
    "dropout": (lambda c: c.objective(dropout="on"), "dropout must be one of"),
    "no loss": (lambda c: Objective(c.model, None, c.chunks), "pass either loss_fn"),
    "no model": (lambda c: Objective(3, c.loss_fn, c.chunks), "model must be a torch.nn.Module"),
    "one-shot": (lambda c: Objective(c.model, c.loss_fn, iter(c.chunks)), "iterated only once"),
    "empty": (lambda c: Objective(c.model, c.loss_fn, []).loss(), "chunks is empty"),
    "reduction": (
        lambda c: gradient_statistics(
            Objective(c.model, nn.CrossEntropyLoss(reduction="sum"), c.chunks)
        ),
        "reduction='mean'",
    ),
    "loss of two": (
        lambda c: gradient_statistics(Objective(c.model, lambda o, t: o[0, :2], c.chunks)),
        "return the mean loss, a 0-dim tensor",
    ),
    "method": (lambda c: Hessian(c.objective(), "fast"), "method must be one of"),
    "radius": (lambda c: Hessian(c.objective(), "central", 0), "radius must be greater than 0"),
    "count": (lambda c: eigenpairs(hessian(c), 0), "count must be at least 1"),
    "which": (lambda c: eigenpairs(hessian(c), 1, "top"), "which must be one of"),
    "products": (lambda c: eigenpairs(hessian(c), 5, max_products=4), "max_products is 4"),
    "tolerance": (lambda c: eigenpairs(hessian(c), 1, tolerance=0), "tolerance must be"),
    "too many": (lambda c: eigenpairs(hessian(c), 2000), "count asks for 2000 eigenvalues"),
    "samples": (lambda c: hessian_trace(hessian(c), 1), "samples must be at least 2"),
    "threshold": (lambda c: measure_flatness(c.objective(), 0), "threshold must be greater than 0"),
    "directions": (lambda c: measure_flatness(c.objective(), 1, 1), "directions must be at least"),
    "zero direction": (
        lambda c: loss_landscape(c.objective(), [zeros(c)], [[0, 1]]),
        "the direction has norm zero",
    ),
    "undefined direction": (
        lambda c: loss_landscape(c.objective(), [one(c) * float("nan")], [[0, 1]]),
        "infinite or undefined entries",
    ),
    "parallel": (
        lambda c: loss_landscape(c.objective(), [one(c), -2 * one(c)], [[0, 1], [0, 1]]),
        "the two directions are parallel",
    ),
    "axes": (lambda c: loss_landscape(c.objective(), [one(c)], [[]]), "each of axes must be"),
    "three": (lambda c: loss_landscape(c.objective(), [one(c)] * 3, [[0]] * 3), "one or two"),
    "vectors": (lambda c: random_direction(c.objective(), vectors="one"), "vectors must be one of"),
    "itself": (
        lambda c: difference(c.objective(), c.model.state_dict(), "second"),
        "second holds the very parameters of the model",
    ),
    "another model": (
        lambda c: difference(c.objective(), {"0.weight": torch.ones(3, 3)}, "second"),
        "second is of another model: for 0.weight it has shape (3, 3), this model (40, 20)",
    ),
    "a model without": (
        lambda c: difference(c.objective(), {}, "second"),
        "second is of another model: for 0.weight it has nothing",
    ),
    "undefined state": (
        lambda c: difference(
            c.objective(), {k: v * float("inf") for k, v in c.model.state_dict().items()}, "second"
        ),
        "second: 0.weight holds infinite or undefined values",
    ),
    "momentum": (
        lambda c: gradient_statistics(c.objective(), [None]),
        "momentum has 1 entries for 6 parameters",
    ),
    "momentum's shape": (
        lambda c: gradient_statistics(c.objective(), [torch.ones(2)] * 6),
        "momentum[0] has shape torch.Size([2]), its parameter torch.Size([40, 20])",
    ),
    "lr": (lambda c: stability_threshold(-1), "lr must be at least 0"),
    "clip": (lambda c: stability_threshold(1, clip=2), "clip must be at most 1"),
    "nesterov": (lambda c: stability_threshold(1, nesterov=True), "nesterov needs momentum"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_named_and_changes_nothing(case, name):
    call, message = ROWS[name]
    before = bits(case.model)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(case)
    assert bits(case.model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_losses_that_are_not_finite(value):
    case = analysis_cases.convolutional(torch.float32)
    with torch.no_grad():
        case.model[3].weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"3\.weight of the model holds infinite or undefined"):
        gradient_statistics(case.objective())
    case = analysis_cases.mlp(torch.float32)
    case.chunks[2][0][1, 1] = float("nan")
    with pytest.raises(ValueError, match="the loss of chunk 2 is nan: the weights are finite"):
        Hessian(case.objective())


def test_all_weights_zero_give_no_direction():
    case = analysis_cases.mlp(torch.float32)
    with torch.no_grad():
        for p in case.model.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="norm zero: the filters of all weights are zero"):
        measure_flatness(case.objective())


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner, self.draw = nn.Linear(20, 4), draw

    def forward(self, x):
        return self.inner(x) * self.draw()


class Shuffled:
    """Chunks in another order each time."""

    def __init__(self, chunks):
        self.chunks, self.calls = chunks, 0

    def __iter__(self):
        self.calls += 1
        return iter(self.chunks[:: (-1) ** self.calls])


class Shrinking(Shuffled):
    def __iter__(self):
        self.calls += 1
        return iter(self.chunks[: 5 - self.calls])


def loader(case):
    x, y = (torch.cat(part) for part in zip(*case.chunks, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


RANDOM = {
    "torch": (lambda c: (Noisy(lambda: torch.rand(())), c.chunks, "off"), "pass dropout='seeded'"),
    "python": (lambda c: (Noisy(random.random), c.chunks, "off"), "drawn in a forward()"),
    "shuffle": (lambda c: (c.model, loader(c), "off"), "DataLoader with shuffle=True"),
    "order": (lambda c: (c.model, Shuffled(c.chunks), "off"), "chunks are shuffled"),
    "length": (lambda c: (c.model, Shrinking(c.chunks), "off"), "had 2 chunks and the first 3"),
    "dropout": (
        lambda c: (
            nn.Sequential(nn.Dropout(0.5), Noisy(random.random)), c.chunks, "seeded",
        ),
        "though dropout (0) is seeded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_a_loss_that_is_not_deterministic_is_named(case, name):
    make, message = RANDOM[name]
    model, chunks, dropout = make(case)
    objective = Objective(model, case.loss_fn, chunks, dropout=dropout)
    with pytest.raises(RuntimeError, match="the loss is not deterministic") as error:
        gradient_statistics(objective)
    assert message in str(error.value)


def test_torchs_draws_can_be_seeded(case):
    model = Noisy(lambda: torch.rand(()))
    objective = Objective(model, case.loss_fn, case.chunks, dropout="seeded")
    assert gradient_statistics(objective).loss == gradient_statistics(objective).loss


def ctc(output, target):
    """A loss that torch can differentiate only once."""
    n = len(output)
    lengths = torch.tensor([n]), torch.tensor([1])
    return nn.functional.ctc_loss(output.log_softmax(1)[:, None], torch.ones(1, 1).long(), *lengths)


def test_operations_without_a_second_derivative(case):
    objective = Objective(case.model, ctc, case.chunks)
    with pytest.raises(
        RuntimeError,
        match=r"method='exact' differentiates twice.*use method='forward' or 'central'",
    ):
        Hessian(objective)(torch.ones(objective.size))
    assert torch.isfinite(Hessian(objective, "central")(torch.ones(objective.size))).all()


def test_compiled_models_need_finite_differences(case):
    compiled = torch.compile(nn.Linear(20, 4))
    objective = Objective(compiled, case.loss_fn, case.chunks)
    with pytest.raises(RuntimeError, match="compiled model"):
        Hessian(objective)


class Detached(torch.autograd.Function):
    """x^3 as an adjoint solver: its backward pass leaves no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy((3 * x * x * g).detach().numpy())


class Solver(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(20, 8).double(), nn.Linear(8, 4).double()

    def forward(self, x):
        return self.two(Detached.apply(self.one(x)))


def test_functions_that_lose_second_derivatives_are_refused():
    """An exact product left a part of H out, without a word."""
    case = analysis_cases.mlp()
    torch.manual_seed(0)
    objective = Objective(Solver(), case.loss_fn, case.chunks)
    with pytest.raises(RuntimeError, match=r"Detached leaves no graph.*'forward' or 'central'"):
        eigenpairs(Hessian(objective), 1)
    assert eigenpairs(Hessian(objective, "central"), 1).converged.all()


def test_weight_norm_has_no_right_second_derivative():
    case = analysis_cases.mlp()
    model = nn.utils.parametrizations.weight_norm(nn.Linear(20, 4).double())
    objective = Objective(model, case.loss_fn, case.chunks)
    vector = torch.randn(objective.size, dtype=torch.float64)
    try:
        exact = Hessian(objective)(vector)
    except RuntimeError as error:
        assert "weight_norm" in str(error)
    else:
        torch.testing.assert_close(exact, Hessian(objective, "central")(vector), rtol=1e-4, atol=0)


def test_the_callers_autocast_is_refused(case):
    """It would compute sums and eigenvectors in bfloat16."""
    objective = case.objective()
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match=r"Objective\(autocast=\.\.\.\)"):
        gradient_statistics(objective)
