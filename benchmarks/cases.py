"""Benchmark cases: tensors, models and data by size, and the expected results.

Expected results come from fbopt.reference, in float64 unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.timing import CPU
from fbopt import reference
from fbopt._ops.flat import flat_size, flat_views, scalar_on

CLASSES = 10
NETWORKS = {"resnet18": ("resnet18", (3, 32, 32)), "small-cnn": ("cnn", (1, 40))}
TITLES = {
    "resnet18": "ResNet-18 for 32×32 images",
    "small-cnn": "the small CNN for MNIST-1D",
    "tiny": "1,000 tensors of 16 elements",
    "large": "one tensor of 2²⁶ elements",
}
Chunks = Sequence[tuple[Tensor, ...]]
Tensors = Sequence[Tensor]
Shapes = Sequence[torch.Size]


class WrongResult(AssertionError):
    """A contender's result differs from the reference."""


def distance(found: Tensors, expected: Tensors, norm: float) -> float:
    """Return ||found - expected|| / ||expected|| over the elements of all tensors."""
    actual, wanted = (torch.cat([t.detach().reshape(-1) for t in ts]) for ts in (found, expected))
    wanted = wanted.double()
    off = torch.linalg.vector_norm(actual.to(wanted) - wanted, norm)
    return (off / torch.linalg.vector_norm(wanted, norm)).item()


def require_close(
    who: str, what: str, found: Tensors, expected: Tensors, tolerance: float, norm: float = math.inf
) -> None:
    """Raise WrongResult unless the distance is within tolerance; by default the maximum norm's."""
    off = distance(found, expected, norm)
    if not off <= tolerance:
        raise WrongResult(f"{who}: {what} is off by {off:.1e} of its norm, over {tolerance:g}")


def shapes(size: str) -> list[torch.Size]:
    """The shapes of the parameters of a size."""
    if size == "tiny":
        return [torch.Size([16])] * 1000
    if size == "large":
        return [torch.Size([2**26])]
    return [p.shape for p in model(size).parameters()]


def model(size: str, device: torch.device = CPU) -> nn.Module:
    """The network that a size is named after; every parameter gets a gradient."""
    from fbopt.train import models

    torch.manual_seed(0)
    return with_gradients(models.build(*NETWORKS[size], CLASSES)).to(device)


def with_gradients(network: nn.Module) -> nn.Module:
    """Set BatchNorm's weights to one and return the network.

    The last BatchNorm of a residual block starts at zero: no gradient would reach its block.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network


def data(size: str, samples: int, chunk: int, device: torch.device = CPU) -> Chunks:
    """Random inputs and labels in chunks, the last of which may be smaller."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(samples, *NETWORKS[size][1], generator=generator, device=device)
    y = torch.randint(CLASSES, (samples,), generator=generator, device=device)
    return list(zip(x.split(chunk), y.split(chunk), strict=True))


def normal(like: Shapes, scale: float, seed: int, device: torch.device) -> list[Tensor]:
    """Normal random tensors of the given shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, device=device) for shape in like]


def point_to(params: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    """Let parameters use the memory of other tensors."""
    for p, t in zip(params, tensors, strict=True):
        p.data = t


@dataclass
class Operands:
    """Parameters, gradients g at theta and g+ ("plus") at the second point, shared by contenders.

    Contenders may overwrite the gradients: `refresh` rewrites them before every call, as a backward
    pass would.
    """

    params: list[Tensor]
    grads: list[Tensor]
    plus: list[Tensor]
    # Of a chunk of a penalised step.
    coefficient: float
    weight: float = 128.0
    radius: float = 1.0
    eta: float | None = None  # of ASAM's scale, None for none
    # Of the end of a step: SGD with Nesterov momentum, of mean gradients that have to be clipped.
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_norm: float = 0.25

    @classmethod
    def of(
        cls,
        like: Shapes,
        device: torch.device = CPU,
        penalised: bool = True,
        eta: float | None = None,
    ) -> Operands:
        """Random tensors of these shapes, the terms of comparable size so that errors show."""
        grads = normal(like, 1.0, 1, device)
        plus = torch._foreach_add(grads, normal(like, 0.3, 2, device)) if penalised else []
        coefficient = 2 / math.sqrt(sum(g.numel() for g in grads))
        return cls(normal(like, 0.05, 0, device), grads, plus, coefficient, eta=eta)

    def __post_init__(self) -> None:
        self.original = [t.clone() for t in (*self.grads, *self.plus)]

    def refresh(self) -> None:
        torch._foreach_copy_([*self.grads, *self.plus], self.original)

    def parameters(self) -> list[nn.Parameter]:
        """A contender's own copy of the parameters."""
        return [nn.Parameter(p.clone()) for p in self.params]

    def double(self) -> tuple[list[Tensor], ...]:
        """Copies of the three lists in float64."""
        lists = (self.params, self.grads, self.plus)
        return tuple([t.detach().double() for t in tensors] for tensors in lists)

    @property
    def device(self) -> torch.device:
        return self.grads[0].device

    @property
    def numel(self) -> int:
        """Elements in one list."""
        return sum(g.numel() for g in self.grads)

    @cached_property
    def expected_update(self) -> tuple[list[Tensor], list[Tensor]]:
        """The perturbation of the parameters, and what the chunk adds to the sums."""
        params, grads, plus = self.double()
        flat = torch.empty(flat_size(params), dtype=torch.float64, device=self.device)
        if self.eta is None:
            square = reference.perturb_(flat, params, grads, self.radius)
        else:
            square, scaled = reference.adaptive_norms(params, grads, self.eta)
            reference.perturb_adaptive_(flat, params, grads, self.radius, self.eta, scaled)
        sums = [torch.zeros_like(g) for g in grads]
        weight, coefficient = (scalar_on(self.device, x) for x in (self.weight, self.coefficient))
        reference.accumulate_penalty_(
            sums, grads, plus, [], weight, coefficient, square, self.radius
        )
        return torch._foreach_sub(flat_views(flat, params), params), sums

    @cached_property
    def expected_step(self) -> tuple[list[Tensor], list[Tensor]]:
        """How far two steps with the same gradients move the parameters, and the momentum."""
        start, grads, _ = self.double()
        params, velocity = [p.clone() for p in start], [torch.zeros_like(p) for p in start]
        norm, lr = reference.squared_norm(grads).sqrt(), scalar_on(self.device, self.lr)
        rule = {"dampening": 0.0, "nesterov": True, "maximize": False}
        rule |= {"momentum": self.momentum, "weight_decay": self.weight_decay}
        for first in (True, False):
            reference.sgd_step_(
                params, grads, velocity, lr, None, norm, self.max_norm, **rule, first=first
            )
        return torch._foreach_sub(params, start), velocity
