"""The Hessian that the steps of Adam, AdamW and RMSprop see: P^{-1/2} H P^{-1/2}, with P the
diagonal matrix that they divide the gradient by.

Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022, arXiv 2207.14484.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.objective import Objective
from fbopt.analysis.stability import Threshold, adam_threshold, stability_threshold

SHARED = ("lr", "betas", "momentum")  # of which the threshold is a function


class PreconditionedHessian(Hessian):
    """The preconditioned Hessian of L, as a linear operator; symmetric, with the eigenvalues of
    ``P^-1 H``.

    P is that of the optimizer's last step, in the names of torch's state, at its step t::

        (1 - beta1^t) (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)      Adam, AdamW
        sqrt(square_avg) + eps                                      RMSprop

    (``max_exp_avg_sq`` with amsgrad, ``square_avg - grad_avg^2`` if centered.) Steps with this P,
    without weight decay, diverge where the largest eigenvalue exceeds ``threshold``. With decay W
    they do where the largest one of the operator plus a diagonal does: ``W/(clip P)`` for L2 decay,
    ``W (1 + beta1)/((1 - beta1) clip)`` for AdamW's, which is decoupled. ``decay=True`` adds it.
    (L2 decay then often has the largest eigenvalues: weights that nothing but the decay moves,
    such as those of pixels that are always black, swing about zero.)

    Args:
        objective: the loss.
        optimizer: a ``torch.optim.Adam``, ``AdamW`` or ``RMSprop`` that has made a step with every
            parameter of the objective; lr, betas and momentum the same in all groups.
        clip: the clip coefficient that scales the gradient, above 0 and at most 1.
        decay: add what the weight decay does.
        method, radius: as for :class:`Hessian`.

    Attributes:
        threshold: the :class:`Threshold` of these steps.
        products, radius: as for :class:`Hessian`.

    Raises:
        TypeError, ValueError: an invalid argument; another optimizer.
        RuntimeError: as for :class:`Hessian`.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 1.0,
        decay: bool = False,
        method: str = "exact",
        radius: float | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.RMSprop):
            raise TypeError(
                "optimizer must be a torch.optim.Adam, AdamW or RMSprop, got "
                f"{type(optimizer).__name__}: for SGD's steps use Hessian and stability_threshold"
            )
        self.optimizer, self.clip = optimizer, float(check_number("clip", clip, above=0))
        self.decay = decay
        super().__init__(objective, method, radius)

    def refresh(self) -> None:
        """Move the operator to the model's current parameters and the optimizer's state."""
        found = [self._diagonals(i, p) for i, p in enumerate(self.objective.params)]
        scale, added = (self.objective.flatten(parts) for parts in zip(*found, strict=True))
        self.threshold = _threshold(self.optimizer, self.clip)
        super().refresh()
        self._root, self._added = scale.rsqrt(), added

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the operator's product with a vector of the parameter space."""
        image = super().__call__(vector * self._root) * self._root
        return image + self._added * vector if self.decay else image

    def _diagonals(self, index: int, p: Tensor) -> tuple[Tensor, Tensor]:
        """P of a parameter, and what its weight decay adds to the operator's diagonal."""
        for group in self.optimizer.param_groups:
            if any(p is other for other in group["params"]):
                break
        else:
            raise ValueError(f"{self._name(index)} is not one of the optimizer's parameters")
        if not (state := self.optimizer.state.get(p)):
            raise ValueError(
                f"the optimizer has no state for {self._name(index)}: take a step first, or leave "
                "it out of the objective's params"
            )
        scale = preconditioner(state, group)
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                f"the optimizer would divide the gradient of {self._name(index)} by zero or by "
                "what is not finite: pass it an eps above 0, or measure an earlier step"
            )
        decay = float(group["weight_decay"]) / self.clip
        if isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
            beta1 = float(group["betas"][0])
            return scale, torch.full_like(scale, decay * (1 + beta1) / (1 - beta1))
        return scale, decay / scale

    def _name(self, index: int) -> str:
        return self.objective.names[index] or f"params[{index}]"


def preconditioner(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P for one parameter, in float64, from its state and options in Adam, AdamW or RMSprop."""
    if "square_avg" in state:
        square, factor = state["square_avg"].double(), 1.0
        if group["centered"]:
            square = square - state["grad_avg"].double().square()
    else:
        (beta1, beta2), step = map(float, group["betas"]), float(state["step"])
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
        square, factor = square / (1 - beta2**step), 1 - beta1**step
    found: Tensor = (square.sqrt() + group["eps"]) * factor
    return found


def _threshold(optimizer: torch.optim.Optimizer, clip: float) -> Threshold:
    first, *others = optimizer.param_groups
    for name in SHARED:
        if any(group.get(name) != first.get(name) for group in others):
            raise ValueError(
                f"{name} differs between the optimizer's parameter groups, so that its steps have "
                "no one threshold: use the same in all"
            )
    if "betas" in first:
        return adam_threshold(float(first["lr"]), float(first["betas"][0]), clip=clip)
    return stability_threshold(float(first["lr"]), float(first["momentum"]), clip=clip)
