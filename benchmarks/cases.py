"""What is benchmarked: lists of tensors by size, and what one chunk and one step make of them, in
float64 by fbopt.reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.devices import CPU
from fbopt._ops import reference
from fbopt._ops.flat import flat_size, flat_views

SIZES = ("resnet18", "small-cnn", "tiny")
TITLES = {
    "resnet18": "ResNet-18 for 32×32 images",
    "small-cnn": "the small CNN for MNIST-1D",
    "tiny": "1,000 tensors of 16 elements",
    "large": "one tensor of 2²⁶ elements",
}


class WrongResult(AssertionError):
    """A contender computes something else than the reference."""


def shapes(size: str) -> list[torch.Size]:
    """The shapes of the parameters of a size."""
    if size == "tiny":
        return [torch.Size([16])] * 1000
    if size == "large":
        return [torch.Size([2**26])]
    return [p.shape for p in model(size).parameters()]


def model(size: str, width: int | None = None) -> nn.Module:
    """The network that a size is named after."""
    from fbopt.train import models

    if size == "resnet18":
        return models.build("resnet18", (3, 32, 32), 10, width)
    return models.build("cnn", (1, 40), 10, width)


def require_close(
    who: str, what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> None:
    """Raise WrongResult unless all errors are within tolerance of the largest expected value."""
    pairs = zip(found, expected, strict=True)
    error = max((f.detach().double() - e).abs().max().item() for f, e in pairs)
    scale = max(e.abs().max().item() for e in expected)
    if not error <= tolerance * scale:
        raise WrongResult(f"{who}: {what} is off by {error / scale:.1e} of its largest value")


def normal(
    like: Sequence[torch.Size], scale: float, seed: int, device: torch.device
) -> list[Tensor]:
    """Normal random tensors of the given shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, device=device) for shape in like]


def double(*tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of tensors in float64."""
    return [[t.detach().double() for t in each] for each in tensors]


def scalar(value: float, device: torch.device = CPU) -> Tensor:
    """A 0-dim float64 tensor, as the ops take their coefficients."""
    return torch.full((), value, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Work:
    """Gradients that contenders share, rewritten before every call as backward would."""

    grads: list[Tensor]
    plus: list[Tensor]
    pristine: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pristine", [t.clone() for t in (*self.grads, *self.plus)])

    def refresh(self) -> None:
        """Undo what contenders did to the gradients."""
        torch._foreach_copy_([*self.grads, *self.plus], self.pristine)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.grads[0].device

    @property
    def numel(self) -> int:
        """Elements in one list of gradients."""
        return sum(g.numel() for g in self.grads)


@dataclass(frozen=True)
class Chunk(Work):
    """One chunk of a penalised step: parameters, their gradient, that at the shifted point."""

    params: list[Tensor]
    coefficient: float
    weight: float = 128.0
    radius: float = 1.0

    @classmethod
    def of(cls, like: Sequence[torch.Size], seed: int = 0, device: torch.device = CPU) -> Chunk:
        """Random tensors of these shapes, with terms of comparable size, so that an error shows."""
        grads = normal(like, 1.0, seed + 1, device)
        plus = torch._foreach_add(grads, normal(like, 0.3, seed + 2, device))
        coefficient = 2 / math.sqrt(sum(g.numel() for g in grads))
        return cls(grads, plus, normal(like, 0.05, seed, device), coefficient)

    def parameters(self) -> list[nn.Parameter]:
        """A contender's own copy of the parameters."""
        return [nn.Parameter(p.clone()) for p in self.params]

    def zeros(self) -> list[Tensor]:
        """A contender's own sums."""
        return [torch.zeros_like(p) for p in self.params]

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The shift of the parameters, and what the chunk adds to the sums."""
        params, grads, plus = double(self.params, self.grads, self.plus)
        flat = torch.empty(flat_size(params), dtype=torch.float64, device=self.device)
        square = reference.perturb_(flat, params, grads, self.radius)
        shifted = flat_views(flat, params)
        sums = [torch.zeros_like(g) for g in grads]
        weight, coefficient = (scalar(x, self.device) for x in (self.weight, self.coefficient))
        reference.accumulate_penalty_(
            sums, grads, plus, [], weight, coefficient, square, self.radius
        )
        return torch._foreach_sub(shifted, params), sums


@dataclass(frozen=True)
class Finish(Work):
    """The end of a step: mean gradients to clip and put through SGD with Nesterov momentum."""

    params: list[Tensor]
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_norm: float = 0.25

    @classmethod
    def of(cls, like: Sequence[torch.Size], seed: int = 0, device: torch.device = CPU) -> Finish:
        """Random tensors of these shapes, of a norm that has to be clipped."""
        return cls(normal(like, 1.0, seed + 1, device), [], normal(like, 0.05, seed, device))

    def parameters(self) -> list[nn.Parameter]:
        """A contender's own copy of the parameters, with the shared gradients in place."""
        params = [nn.Parameter(p.clone()) for p in self.params]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """How far the parameters are after two steps with the same gradients, and the momentum."""
        start, params, grads = double(self.params, self.params, self.grads)
        params, velocity = [p.clone() for p in params], [torch.empty_like(p) for p in params]
        norm = reference.squared_norm(grads).sqrt()
        rule = {"dampening": 0.0, "nesterov": True, "maximize": False}
        rule |= {"momentum": self.momentum, "weight_decay": self.weight_decay}
        lr = scalar(self.lr, self.device)
        for first in (True, False):
            reference.sgd_step_(
                params, grads, velocity, lr, None, norm, self.max_norm, **rule, first=first
            )
        return torch._foreach_sub(params, start), velocity
