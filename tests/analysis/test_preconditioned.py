"""The preconditioned Hessian against a dense one, and its threshold against torch's own steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fbopt.analysis import (
    Hessian,
    Objective,
    PreconditionedHessian,
    adam_threshold,
    eigenpairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95)}),
    "adam, fused, with decay": (torch.optim.Adam, {"fused": True, "weight_decay": 0.3}),
    "adam, amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6)}),
    "adamw": (torch.optim.AdamW, {"betas": (0.7, 0.9), "weight_decay": 0.4}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "weight_decay": 0.3}),
    "rmsprop, momentum": (torch.optim.RMSprop, {"momentum": 0.6}),
    "rmsprop, centered": (torch.optim.RMSprop, {"centered": True, "alpha": 0.8}),
}


def groups(model: nn.Module, decay: float) -> list[dict]:
    """Only the first parameter decays."""
    first, *others = model.parameters()
    return [
        {"params": [first], "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build(case: str, model: nn.Module) -> torch.optim.Optimizer:
    kind, options = RULES[case]
    options = dict(options)
    return kind(groups(model, options.pop("weight_decay", 0.0)), lr=0.01, **options)


def small() -> tuple[nn.Module, Objective]:
    """A network of 20 parameters and its loss over three ragged chunks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh()).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    chunks = list(zip(x.split(8), y.split(8), strict=True))
    return model, Objective(model, nn.functional.mse_loss, chunks)


def dense(objective: Objective) -> torch.Tensor:
    hessian = Hessian(objective)
    return torch.stack([hessian(row) for row in torch.eye(objective.size, dtype=torch.float64)])


def plain_preconditioner(case: str, gradients: list[torch.Tensor]) -> torch.Tensor:
    """What torch divides by after these gradients, as its documentation has it."""
    options = RULES[case][1]
    v, largest, mean = (torch.zeros_like(gradients[0]) for _ in range(3))
    if "rmsprop" in case:
        alpha = options.get("alpha", 0.99)
        for g in gradients:
            v = alpha * v + (1 - alpha) * g**2
            mean = alpha * mean + (1 - alpha) * g
        return (v - mean**2 if options.get("centered") else v).sqrt() + 1e-8
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    for g in gradients:
        v = beta2 * v + (1 - beta2) * g**2
        largest = torch.maximum(largest, v)
    v = largest if options.get("amsgrad") else v
    t = len(gradients)
    return ((v / (1 - beta2**t)).sqrt() + 1e-8) * (1 - beta1**t)


@pytest.mark.parametrize("case", RULES)
def test_eigenvalues_are_those_of_the_dense_operator(case, clip=0.25):
    model, objective = small()
    optimizer = build(case, model)
    decay = torch.zeros(objective.size, dtype=torch.float64)
    decay[:9] = RULES[case][1].get("weight_decay", 0.0)
    gradients = []
    for _ in range(5):
        theta, g = objective.theta(), clip * objective.gradient()
        for p, part in zip(objective.params, objective.unflatten(g), strict=True):
            p.grad = part
        optimizer.step()
        gradients.append(g if case == "adamw" else g + decay * theta)
    scale = plain_preconditioner(case, gradients)
    if case == "adamw":
        beta1 = optimizer.defaults["betas"][0]
        added = decay * (1 + beta1) / (1 - beta1) / clip
    else:
        added = decay / clip / scale
    root = scale.rsqrt()
    matrix = root[:, None] * dense(objective) * root
    for with_decay in (True, False):
        whole = matrix + torch.diag(added) if with_decay else matrix
        expected = torch.linalg.eigvalsh(whole).flip(0)[:3]
        seen = PreconditionedHessian(objective, optimizer, clip=clip, decay=with_decay)
        found = eigenpairs(seen, 3, tolerance=1e-9)
        assert found.converged.all()
        np.testing.assert_allclose(found.values, expected, rtol=1e-8)
    plain = eigenpairs(Hessian(objective), 1).values[0]
    assert abs(found.values[0] / plain - 1) > 0.1  # the preconditioner matters here


def radius(case: str, lr: float, clip: float, curvature: torch.Tensor) -> float:
    """The spectral radius of one step on a quadratic, from torch's own steps.

    The columns of its matrix are the steps from tiny unit vectors, which leave P as it is.
    """
    size, tiny, columns = len(curvature), 1e-7, []
    name = "momentum_buffer" if case.startswith("rmsprop") else "exp_avg"
    has_buffer = name == "exp_avg" or "momentum" in case
    for column in torch.eye(size * (1 + has_buffer), dtype=torch.float64) * tiny:
        model = nn.Linear(size - 1, 1).double()
        optimizer = build(case, model)
        for group in optimizer.param_groups:
            group["lr"] = lr
        theta = column[:size]
        with torch.no_grad():
            for p, part in zip(model.parameters(), theta.split([size - 1, 1]), strict=True):
                p.copy_(part.view_as(p))
        fill(case, optimizer, model)
        grads = clip * curvature @ theta
        parts = list(model.parameters())
        for p, g in zip(parts, grads.split([size - 1, 1]), strict=True):
            p.grad = g.view_as(p)
        if has_buffer:
            for p, m in zip(parts, column[size:].split([size - 1, 1]), strict=True):
                optimizer.state[p][name] = m.view_as(p).clone()
        optimizer.step()
        after = [torch.cat([p.detach().flatten() for p in parts])]
        if has_buffer:
            after.append(torch.cat([optimizer.state[p][name].flatten() for p in parts]))
        columns.append(torch.cat(after) / tiny)
    return torch.linalg.eigvals(torch.stack(columns).T).abs().max().item()


def fill(case: str, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the optimizer a state as after some steps: of P = 0.5, 0.9, …"""
    squares = [torch.tensor([[0.3, 0.8, 0.2]]).double(), torch.tensor([0.5]).double()]
    for p, square in zip(model.parameters(), squares, strict=True):
        zero = torch.zeros_like(p.detach())
        if case.startswith("rmsprop"):
            state = {"square_avg": square, "step": torch.tensor(4.0), "grad_avg": zero,
                     "momentum_buffer": zero.clone()}  # fmt: skip
        else:
            state = {"exp_avg_sq": square, "step": torch.tensor(4.0), "exp_avg": zero,
                     "max_exp_avg_sq": zero.clone()}  # fmt: skip
        optimizer.state[p] = {k: v.clone() for k, v in state.items()}


@pytest.mark.parametrize("clip", [1.0, 0.3])
@pytest.mark.parametrize("case", [c for c in RULES if "amsgrad" not in c and "centered" not in c])
def test_steps_diverge_just_above_the_threshold(case, clip):
    torch.manual_seed(1)
    x = torch.randn(30, 3).double()
    model = nn.Linear(3, 1).double()
    objective = Objective(model, nn.functional.mse_loss, [(x, torch.zeros(30, 1).double())])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            p.grad = torch.zeros_like(p)
    optimizer = build(case, model)
    fill(case, optimizer, model)
    optimizer.step()  # of length zero, as `radius` measures after one step
    seen = PreconditionedHessian(objective, optimizer, clip=clip, decay=True)
    # The operator does not depend on lr; the threshold, here of lr 0.01, does.
    edge = 0.01 * seen.threshold.value / eigenpairs(seen, 1, tolerance=1e-10).values[0]
    below, above = (radius(case, k * edge, clip, dense(objective)) for k in (0.999, 1.001))
    assert below < 1 < above


def test_finite_differences_and_refresh():
    model, objective = small()
    optimizer = build("adam", model)

    def step():
        for p, g in zip(objective.params, objective.unflatten(objective.gradient()), strict=True):
            p.grad = g
        optimizer.step()

    step()
    exact = PreconditionedHessian(objective, optimizer)
    central = PreconditionedHessian(objective, optimizer, method="central")
    old = eigenpairs(exact, 1).values[0]
    assert eigenpairs(central, 1).values[0] == pytest.approx(old, rel=1e-4)
    step()
    with pytest.raises(RuntimeError, match="has changed since this Hessian was made"):
        exact(objective.theta())
    exact.refresh()
    new = PreconditionedHessian(objective, optimizer)
    assert torch.equal(exact(objective.theta()), new(objective.theta()))
    assert eigenpairs(new, 1).values[0] != pytest.approx(old, rel=1e-3)


def test_thresholds_in_words():
    assert adam_threshold(1e-3).value == pytest.approx(38_000)  # 38/lr, Cohen et al. 2022
    assert adam_threshold(1e-3).formula == "(2 + 2 beta1)/((1 - beta1) lr)"
    assert adam_threshold(0.1, 0.5, clip=0.5).value == pytest.approx(120)
    assert adam_threshold(0.1, 0.0).value == pytest.approx(20)


def test_bad_input():
    model, objective = small()
    params = list(model.parameters())
    adam = torch.optim.Adam(params)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Adam, AdamW or RMSprop, got SGD"):
        PreconditionedHessian(objective, torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match=r"no state for 0\.weight: take a step first"):
        PreconditionedHessian(objective, adam)
    with pytest.raises(ValueError, match=r"2\.bias is not one of the optimizer's parameters"):
        for p in params:
            p.grad = torch.ones_like(p)
        other = torch.optim.Adam(params[:-1])
        other.step()
        PreconditionedHessian(objective, other)
    adam.step()
    with pytest.raises(ValueError, match="clip must be at most 1"):
        PreconditionedHessian(objective, adam, clip=2.0)
    several = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    several.step()
    with pytest.raises(ValueError, match="lr differs between the optimizer's parameter groups"):
        PreconditionedHessian(objective, several)
    with pytest.raises(ValueError, match=r"divide the gradient of 0\.weight by zero or by what"):
        optimizer = torch.optim.RMSprop(params, eps=0.0)
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
        PreconditionedHessian(objective, optimizer)
    with pytest.raises(ValueError, match="beta1 must be below 1"):
        adam_threshold(0.1, 1.0)
