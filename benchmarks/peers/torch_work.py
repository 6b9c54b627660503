"""A workload in torch: the network with its weights, its loss, and the chunks as tensors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.cases import CLASSES, with_gradients
from benchmarks.peers.workload import Result, Workload
from benchmarks.task import Task
from fbopt.train import models
from fbopt.train.precision import autocast_dtype, cross_entropy

MLP_WIDTHS = (64, 64, 64, 64, CLASSES)


def tanh_network(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def network(name: str) -> nn.Module:
    """The network of a workload with its initial weights; every parameter gets a gradient."""
    torch.manual_seed(0)
    if name == "mlp":
        return tanh_network(*MLP_WIDTHS)
    return with_gradients(models.build("cnn", (1, 40), CLASSES))


def task(workload: Workload) -> Task:
    """The workload as a task of plain torch."""
    model = network(workload.network)
    weights = {name: torch.from_numpy(value) for name, value in workload.weights.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.data = weights[name].clone()
    chunks = [tuple(map(torch.from_numpy, chunk)) for chunk in workload.chunks()]
    penalty = {"radius": workload.radius, "coefficient": workload.coefficient}
    return Task(model, chunks, True, autocast_dtype(workload.precision), cross_entropy, **penalty)


def result(model: nn.Module, loss: Tensor) -> Result:
    """The mean loss, and what is in `p.grad`."""
    grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return Result(loss.item(), grads)
