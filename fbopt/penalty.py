"""The gradient penalty (lambda/2) sum_c (n_c/N) ||g_c||^2 and its Hessian-vector products.

Geiping et al., "Stochastic Training is Not Necessary for Generalization", ICLR 2022, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._checks import check_number

METHODS = ("forward", "central", "exact")


@dataclass(frozen=True)
class GradientPenalty:
    """Penalty on the squared gradient norm of every chunk, with its gradient ``lambda H_c g_c``.

    - ``forward``: ``H g ~ (grad L(theta + s g) - g) / s``, ``s = radius / ||g||``; one more pass
      per chunk, error of first order in the radius.
    - ``central``: ``H g ~ (grad L(theta + s g) - grad L(theta - s g)) / 2s``; two more passes,
      error of second order.
    - ``exact``: double backward. Needs operations that can be differentiated twice; functions of
      which a second derivative would be lost (``once_differentiable``, a backward pass without
      graph, torch's ``weight_norm``) are refused in the first call.

    Args:
        strength: the published strength; ``lambda = lr * strength / 4`` with lr the optimizer's
            current learning rate, as in the code released with the paper. (Its autograd-penalty
            variant adds twice that.)
        radius: length of the perturbation in parameter space, ``||s g|| = radius``.
        method: ``"forward"``, ``"central"`` or ``"exact"``.
        coefficient: lambda itself, in place of ``lr * strength / 4``: a number, or a function of
            the step (the number of closure calls so far) that returns one.
    """

    strength: float = 0.5
    radius: float = 1e-2
    method: str = "forward"
    coefficient: float | Callable[[int], float | Tensor] | None = None

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)
        check_number("radius", self.radius, above=0)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.coefficient is not None and not callable(self.coefficient):
            check_number("coefficient", self.coefficient, least=0)

    def coefficient_at(self, step: int, optimizer: torch.optim.Optimizer | None) -> float | Tensor:
        """Return lambda at a step: a number, or a 0-dim tensor where the learning rate is one.

        Raises:
            TypeError, ValueError: the parameter groups have different learning rates, there is no
                optimizer to follow, or ``coefficient`` returned no number of at least zero.
        """
        if callable(self.coefficient):
            value = self.coefficient(step)
            return (
                value if isinstance(value, Tensor) else check_number("coefficient", value, least=0)
            )
        if self.coefficient is not None:
            return self.coefficient
        if optimizer is None:
            raise ValueError(
                "GradientPenalty(strength=...) follows the learning rate of an optimizer: pass "
                "optimizer=... to FullBatchClosure, or GradientPenalty(coefficient=...)"
            )
        return _common_lr(optimizer) * self.strength / 4


def _common_lr(optimizer: torch.optim.Optimizer) -> float | Tensor:
    rates: list[float | Tensor] = [group["lr"] for group in optimizer.param_groups]
    if any(lr is not rates[0] and _differ(lr, rates[0]) for lr in rates):
        raise ValueError(
            "the optimizer's parameter groups have different learning rates, so strength gives no "
            "one lambda = lr * strength / 4: pass GradientPenalty(coefficient=...)"
        )
    return rates[0]


def _differ(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two rates differ; tensors on a GPU are not read and count as different."""
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in (a, b)):
        return True
    return float(a) != float(b)
