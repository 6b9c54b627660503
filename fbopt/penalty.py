"""Penalties on gradient norms, (lambda/2) sum_c (n_c/N) ||g_c||^2 and its kin, whose gradients are
Hessian-vector products.

Geiping et al., "Stochastic Training is Not Necessary for Generalization", ICLR 2022, section 4;
Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
Learning", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt._direction import Direction

METHODS = ("forward", "central", "exact")
MOST = 1e30  # of one strength by the other: float32 holds the ratio


@dataclass(frozen=True)
class GradientPenalty:
    """Penalty on the gradient norm of every chunk.

    With g_c and H_c the gradient and Hessian of chunk c, of n_c samples, and G that of all chunks::

        power=2    (lambda/2) sum_c (n_c/N) ||g_c||^2      of which the gradient is lambda H_c g_c
        power=1       lambda  sum_c (n_c/N) ||g_c||                       lambda H_c g_c / ||g_c||

    and with ``full_strength`` also ``(mu/2) ||G||^2``, whose gradient is mu H_c G. Products with
    v = g_c, or v = g_c + (mu/lambda) G:

    - ``forward``: ``H v ~ (grad L(theta + s v) - g) / s``, ``s = radius / ||v||``; one more pass
      per chunk, error of first order in the radius.
    - ``central``: ``H v ~ (grad L(theta + s v) - grad L(theta - s v)) / 2s``; two more passes,
      error of second order.
    - ``exact``: double backward. Needs operations that can be differentiated twice; functions of
      which a second derivative would be lost (``once_differentiable``, a backward pass without
      graph, torch's ``weight_norm``) are refused in the first call.

    Args:
        strength: the published strength; ``lambda = lr * strength / 4`` with lr the optimizer's
            current learning rate, as in the code released with the paper. (Its autograd-penalty
            variant adds twice that.)
        radius: length of the perturbation in parameter space, ``||s v|| = radius``.
        method: ``"forward"``, ``"central"`` or ``"exact"``.
        coefficient: lambda itself, in place of ``lr * strength / 4``: a number, or a function of
            the step (the number of closure calls so far) that returns one.
        power: 2 for the squared norm, 1 for the norm.
        full_strength: the published strength for the gradient of all chunks:
            ``mu = lambda * full_strength / strength``, which is ``lr * full_strength / 4`` unless
            ``coefficient`` is given; with ``strength=0`` lambda is that of G alone. For power 2.
            Every step then visits all chunks once before, without penalty, for G.
    """

    strength: float = 0.5
    radius: float = 1e-2
    method: str = "forward"
    coefficient: float | Callable[[int], float | Tensor] | None = None
    power: int = 2
    full_strength: float = 0.0

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)
        check_number("radius", self.radius, above=0)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.coefficient is not None and not callable(self.coefficient):
            check_number("coefficient", self.coefficient, least=0)
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(f"power must be 1, for the norm, or 2, got {self.power!r}")
        check_number("full_strength", self.full_strength, least=0)
        if self.full_strength and self.power == 1:
            raise ValueError("full_strength is for the squared norm: pass power=2")
        if self.full_strength > MOST * self.strength > 0:
            raise ValueError(
                f"full_strength must be at most {MOST:g} times strength, got {self.full_strength} "
                f"and {self.strength}"
            )

    @property
    def needs_norms(self) -> bool:
        """Whether the value takes the mean norm, not that of the squares alone."""
        return self.power == 1

    @property
    def direction(self) -> Direction:
        """The direction v of the second points, by shares of g_c and G."""
        if not self.full_strength:
            return Direction(follows_norm=self.power == 2)
        if not self.strength:
            return Direction(own=0.0, whole=1.0)
        return Direction(whole=self.full_strength / self.strength)

    def value(
        self,
        c: float | Tensor,
        square: Tensor | None,
        norm: Tensor | None,
        whole: Tensor | None,
    ) -> Tensor | None:
        """Return the penalty for its coefficient and the means of ``||g_c||^2`` and ``||g_c||``,
        and ``||G||^2``; None without the one that it needs.
        """
        if self.power == 1 or square is None:
            return None if norm is None else c * norm
        own, shared, *_ = self.direction
        return c / 2 * (own * square + (0.0 if whole is None else shared * whole))

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
        return _common_lr(optimizer) * (self.strength or self.full_strength) / 4


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
