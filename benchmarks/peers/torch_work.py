"""A workload in torch: the network with its weights, its loss, and the chunks as tensors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.cases import CLASSES, with_gradients
from benchmarks.peers import burgers
from benchmarks.peers.workload import Result, Workload
from benchmarks.task import Task
from fbopt.train import models
from fbopt.train.precision import autocast_dtype

RESNET_WIDTH = 16


def tanh_network(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def network(name: str, width: int | None = None) -> nn.Module:
    """The network of a workload with its initial weights; every parameter gets a gradient."""
    torch.manual_seed(0)
    if name == "mlp":
        return tanh_network(64, *[width or 64] * 3, CLASSES)
    if name == "pinn":
        return tanh_network(2, *[width or 32] * 4, 1)
    shape = (3, 32, 32) if name == "resnet18" else (1, 40)
    return with_gradients(models.build(name, shape, CLASSES, width))


def task(workload: Workload, functional: bool = False) -> Task:
    """The workload as a task of plain torch; `functional`: its derivatives are torch.func's."""
    model = network(workload.network, workload.width)
    model = model.double() if workload.precision == "fp64" else model
    for name, p in model.named_parameters():
        p.data = torch.from_numpy(workload.weights[name]).clone()
    arrays = [torch.from_numpy(array) for array in workload.arrays]
    if workload.network == "resnet18":  # the faster layout
        last = {"memory_format": torch.channels_last}
        model = model.to(**last)
        arrays = [a.contiguous(**last) if a.ndim == 4 else a for a in arrays]
    chunks = list(zip(*(array.split(workload.chunk) for array in arrays), strict=True))
    how = {"radius": workload.radius, "coefficient": workload.coefficient}
    if workload.network == "pinn":
        loss = burgers.functional_loss if functional else burgers.autograd_loss
        how |= {"evaluate": loss, "loss_fn": None}
    return Task(model, chunks, True, autocast_dtype(workload.precision), **how)


def result(model: nn.Module, loss: Tensor) -> Result:
    """The mean loss, and what is in `p.grad`."""
    grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return Result(loss.item(), grads)
