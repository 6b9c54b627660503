"""PenalisedObjective: J, its gradient and its Hessian by definition; what refuses it."""

from __future__ import annotations

import analysis_cases
import pytest
import torch
from torch import Tensor, nn

from fbopt import FullBatchClosure, GradientPenalty
from fbopt.analysis import (
    Fisher,
    GaussNewton,
    Hessian,
    PenalisedObjective,
    batch_sharpness,
    eigenpairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> analysis_cases.Case:
    """61 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softplus())
    model = nn.Sequential(*model, nn.Linear(3, 1)).append(nn.Flatten(0))
    x = torch.randn(23, 5, dtype=torch.float64)
    chunks = list(zip(x.split(8), x.sin().sum(1).split(8), strict=True))
    return analysis_cases.Case(model.double(), nn.functional.mse_loss, chunks)


def by_hand(case: analysis_cases.Case, power: int, coefficient: float):
    """J as a function of a vector."""
    names = [name for name, _ in case.model.named_parameters()]
    shapes = [p.shape for p in case.model.parameters()]

    def chunk(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        sizes = [shape.numel() for shape in shapes]
        parts = (t.view(s) for t, s in zip(theta.split(sizes), shapes, strict=True))
        output = torch.func.functional_call(case.model, dict(zip(names, parts, strict=True)), x)
        return case.loss_fn(output, y)

    def objective(theta: Tensor) -> Tensor:
        total = theta.new_zeros(())
        for x, y in case.chunks:
            grad = torch.func.grad(chunk)(theta, x, y)
            norm = grad.norm() if power == 1 else grad.square().sum() / 2
            total = total + len(y) / 23 * (chunk(theta, x, y) + coefficient * norm)
        return total

    return objective


@pytest.mark.parametrize("power", [2, 1])
def test_value_gradient_and_hessian_by_definition(power):
    case, coefficient = small(), 0.7
    penalised = PenalisedObjective(
        case.model, case.loss_fn, case.chunks, coefficient=coefficient, power=power
    )
    theta, expected = penalised.theta(), by_hand(case, power, coefficient)
    assert penalised.loss() == pytest.approx(expected(theta).item(), rel=1e-12)
    gradient = torch.func.grad(expected)(theta)
    torch.testing.assert_close(penalised.gradient(), gradient, rtol=1e-9, atol=1e-11)
    dense = torch.autograd.functional.hessian(expected, theta)
    hessian = Hessian(penalised)
    columns = torch.stack([hessian(e) for e in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(columns, dense, rtol=1e-8, atol=1e-10)
    values = torch.linalg.eigvalsh(dense)
    assert eigenpairs(hessian, 1).values[0] == pytest.approx(values[-1].item(), rel=1e-6)
    plain = torch.autograd.functional.hessian(by_hand(case, power, 0.0), theta)
    assert values[-1] != pytest.approx(torch.linalg.eigvalsh(plain)[-1].item(), rel=1e-2)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("make", [analysis_cases.mlp, analysis_cases.convolutional])
def test_the_gradient_is_that_of_training(make, power):
    """With BatchNorm by chunk, and dropout off: of a closure whose products are exact."""
    case = make()
    penalised = PenalisedObjective(
        case.model, case.loss_fn, case.chunks, coefficient=0.3, power=power
    )
    rule = GradientPenalty(coefficient=0.3, power=power, method="exact")
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    FullBatchClosure(case.model, case.loss_fn, case.chunks, penalty=rule)()
    grads = torch.cat([p.grad.flatten() for p in case.model.parameters()])
    torch.testing.assert_close(penalised.gradient(), grads, rtol=1e-9, atol=1e-12)


def test_without_a_coefficient_it_is_the_loss():
    case = analysis_cases.mlp()
    penalised = PenalisedObjective(case.model, case.loss_fn, case.chunks, coefficient=0.0)
    assert penalised.loss() == case.objective().loss()
    vector = torch.randn(penalised.size, dtype=torch.float64)
    torch.testing.assert_close(Hessian(penalised)(vector), Hessian(case.objective())(vector))


def test_what_is_of_the_loss_alone_refuses_it():
    case = analysis_cases.mlp()
    penalised = PenalisedObjective(case.model, case.loss_fn, case.chunks, coefficient=0.1)
    for measure in (
        lambda: batch_sharpness(penalised, [4]), lambda: GaussNewton(penalised),
        lambda: Fisher(penalised),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="of the loss alone: pass an Objective"):
            measure()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"coefficient": -1.0}, "coefficient must be"),
        ({"coefficient": 0.1, "power": 3}, "power must be 1"),
        ({"coefficient": 0.1, "power": True}, "power must be 1"),
    ],
)
def test_bad_arguments_are_named(options, words):
    case = analysis_cases.mlp()
    with pytest.raises(ValueError, match=words):
        PenalisedObjective(case.model, case.loss_fn, case.chunks, **options)
