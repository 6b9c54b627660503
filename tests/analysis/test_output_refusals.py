"""What Gauss-Newton and Fisher products cannot be of is refused, and lost derivatives are seen."""

from __future__ import annotations

import pytest
import torch
from curvature_cases import (
    small,
)
from torch import nn

from fbopt.analysis import (
    Fisher,
    GaussNewton,
    Objective,
    fisher_trace,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
