"""The update rules that flows follow: theta' = -lr P^-1 grad L, with P = 1 for gradient descent and
P = sqrt(nu) + eps for RMSProp, whose nu moves along.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.objective import Objective

Scale = Tensor | float


class Descent:
    """Gradient descent: P = 1, and no state.

    Attributes:
        lr: the learning rate.
        nu: the mean of squared gradients, (P,) float64; None where there is none.
    """

    nu: Tensor | None = None

    def __init__(self, lr: float) -> None:
        self.lr = float(check_number("lr", lr, above=0))

    def scale(self, nu: Tensor | None) -> Scale:
        """P, (P,) float64."""
        return 1.0

    def rate(self, time: float) -> float:
        """c(t), with which nu' = c(t) (E[g^2] - nu)."""
        return 0.0

    def slope(self, squares: Tensor, time: float, nu: Tensor | None) -> Tensor | None:
        """The derivative nu' where E[g^2] is `squares`; None without a state."""
        return None if nu is None else self.rate(time) * (squares - nu)


class RMSProp(Descent):
    """RMSProp, and Adam without momentum (beta1 = 0), which corrects the bias of its mean.

    nu is as in the next step's denominator: the mean of the squared gradients up to that one. With
    ``kappa = (1 - beta)/beta`` it moves by ``nu' = kappa (E[g^2] - nu)``, whose lag is that of the
    steps; with the bias corrected, by ``kappa/(1 - beta^t exp(-kappa s))`` after t such means, time
    s ago.

    Args:
        objective: the loss, at whose parameters the next step begins.
        optimizer: a ``torch.optim.RMSprop``, ``Adam`` or ``AdamW`` with the state after its last
            step; without one, as before the first.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        group = _group_of(objective, optimizer)
        super().__init__(float(group["lr"]))
        corrected = "betas" in group
        self.beta = float(group["betas"][1] if corrected else group["alpha"])
        self.eps = float(group["eps"])
        if not 0 < self.beta < 1:
            raise ValueError(f"the optimizer's decay of squared gradients is {self.beta}: a flow "
                             "needs one above 0 and below 1")  # fmt: skip
        before = [optimizer.state.get(p) or {} for p in objective.params]
        name = "exp_avg_sq" if corrected else "square_avg"
        zeros = [torch.zeros_like(p) for p in objective.params]
        parts = [s.get(name, zero) for s, zero in zip(before, zeros, strict=True)]
        steps = {int(s.get("step", 0)) for s in before}
        if len(steps) > 1:
            raise ValueError("the optimizer has taken different numbers of steps with parameters")
        self.terms = steps.pop() + 1 if corrected else None
        found = self.beta * objective.flatten(parts).double()
        found += (1 - self.beta) * objective.gradient().double().square()
        self.nu = found / self._weight(0.0)

    def _weight(self, time: float) -> float:
        """What the weights of the mean add up to, where that is corrected."""
        if self.terms is None:
            return 1.0
        return 1 - self.beta**self.terms * math.exp(-self._kappa * time)

    @property
    def _kappa(self) -> float:
        return (1 - self.beta) / self.beta

    def scale(self, nu: Tensor | None) -> Scale:
        """P, (P,) float64."""
        assert nu is not None
        return nu.sqrt() + self.eps

    def rate(self, time: float) -> float:
        """c(t), with which nu' = c(t) (E[g^2] - nu)."""
        return self._kappa / self._weight(time)


def rule_of(objective: Objective, lr: Any) -> Descent:
    """The rule of a learning rate, or of an optimizer.

    Raises:
        TypeError, ValueError: an optimizer whose steps no flow here follows.
    """
    if not isinstance(lr, torch.optim.Optimizer):
        return Descent(lr)
    if isinstance(lr, torch.optim.SGD):
        return Descent(float(_group_of(objective, lr)["lr"]))
    if isinstance(lr, torch.optim.RMSprop | torch.optim.Adam | torch.optim.AdamW):
        return RMSProp(objective, lr)
    raise TypeError(
        "lr must be a number, or a torch.optim.SGD, RMSprop, Adam or AdamW, got "
        f"{type(lr).__name__}"
    )


def _group_of(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of all parameters. Raises ValueError for those that change the flow."""
    groups = optimizer.param_groups
    own = {id(p) for group in groups for p in group["params"]}
    if any(id(p) not in own for p in objective.params):
        raise ValueError("the optimizer has to have all parameters of the objective")
    first = groups[0]
    names = ("lr", "betas", "alpha", "eps")
    if any(group.get(n) != first.get(n) for group in groups[1:] for n in names):
        raise ValueError("lr and decay rates have to be the same in all of the optimizer's groups")
    refused = {
        "momentum": any(group.get("momentum") for group in groups),
        "weight_decay": any(group["weight_decay"] for group in groups),
        "betas[0]": any(group.get("betas", (0,))[0] for group in groups),
        "amsgrad": any(group.get("amsgrad") for group in groups),
        "centered": any(group.get("centered") for group in groups),
        "maximize": any(group.get("maximize") for group in groups),
    }
    if wrong := [name for name, is_on in refused.items() if is_on]:
        raise ValueError(
            f"the optimizer has {', '.join(wrong)}: flows follow steps without momentum, weight "
            "decay and variants; pass an optimizer without"
        )
    return first
