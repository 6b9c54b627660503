"""Small models with ragged chunks for the tests of fbopt.analysis, and their dense Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fbopt.analysis import Objective


@dataclass
class Case:
    """A model, its loss and its chunks, all in one dtype."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    chunks: list[tuple[Tensor, Tensor]]

    def objective(self, **changes) -> Objective:
        return Objective(self.model, self.loss_fn, self.chunks, **changes)


def mlp(dtype: torch.dtype = torch.float64) -> Case:
    """1,653 parameters, cross-entropy, chunks of 16, 16, 16 and 2."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 18), nn.Tanh(), nn.Linear(18, 4)
    )
    return trained(model, torch.randn(50, 20), torch.randint(4, (50,)), dtype, 16)


def convolutional(dtype: torch.dtype = torch.float64) -> Case:
    """BatchNorm, dropout and images with the channels last, chunks of 12, 12 and 9."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Conv2d(5, 4, 3, stride=2),
        nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(33, 2, 7, 7).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return trained(model, x, torch.randint(3, (33,)), dtype, 12)


def trained(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, size: int) -> Case:
    """The case after 20 steps: the Hessian's largest eigenvalues are then well separated."""
    model, x = model.to(dtype), x.to(dtype)
    case = Case(
        model, nn.functional.cross_entropy, list(zip(x.split(size), y.split(size), strict=True))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        case.loss_fn(model(x), y).backward()
        optimizer.step()
    return case


def dense_hessian(case: Case, batchnorm: str = "chunk") -> Tensor:
    """The Hessian of the weighted mean loss, dropout off; buffers and modes are restored."""
    model, params = case.model, list(case.model.parameters())
    buffers = [b.clone() for b in model.buffers()]
    flags = [m.training for m in model.modules()]
    model.eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.training = batchnorm == "chunk"
    total = sum(len(y) for _, y in case.chunks)
    loss = sum(case.loss_fn(model(x), y) * len(y) / total for x, y in case.chunks)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    identity = torch.eye(len(flat), dtype=flat.dtype)
    columns = torch.autograd.grad(flat, params, identity, is_grads_batched=True)
    matrix = torch.cat([c.detach().reshape(len(flat), -1) for c in columns], dim=1)
    for module, training in zip(model.modules(), flags, strict=True):
        module.training = training
    for b, old in zip(model.buffers(), buffers, strict=True):
        b.copy_(old)
    return matrix


def quadratic(eigenvalues: Tensor, samples: int = 7) -> tuple[Objective, Tensor]:
    """An objective whose Hessian has these eigenvalues, and its matrix of eigenvectors.

    Chunk c has ``L_c = theta.(A + B_c) theta/2``, with B_c of weighted mean zero.
    """
    torch.manual_seed(2)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    model = nn.Linear(n, 1, bias=False).double()
    weights = torch.arange(1.0, samples + 1, dtype=torch.float64)
    parts = [torch.randn(n, n, dtype=torch.float64) for _ in weights]
    parts = [p + p.T for p in parts]
    mean = sum(w * p for w, p in zip(weights, parts, strict=True)) / weights.sum()
    chunks = [(w, matrix + p - mean) for w, p in zip(weights, parts, strict=True)]

    def evaluate(model: nn.Module, chunk: tuple[Tensor, Tensor]) -> Tensor:
        theta = model.weight[0]
        return theta @ chunk[1] @ theta / 2

    objective = Objective(model, chunks=chunks, evaluate=evaluate, weight=lambda c: float(c[0]))
    return objective, basis


def diagonal(values: Tensor) -> Objective:
    """An objective whose Hessian is diagonal."""
    model = nn.Linear(len(values), 1, bias=False).double()

    def evaluate(model: nn.Module, chunk: Tensor) -> Tensor:
        return (chunk * model.weight[0] ** 2).sum() / 2

    return Objective(model, chunks=[values], evaluate=evaluate, weight=lambda chunk: 1)
