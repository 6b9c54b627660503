"""A small network with its dense Gauss-Newton and Fisher matrices, from definitions."""

from __future__ import annotations

import analysis_cases
import torch
from torch import nn

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
