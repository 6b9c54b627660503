"""Steps of a length that the gradient's does not set: along its signs, or along its unit vector.

p ← p − lr sign(g)          sign descent (Bernstein et al. 2018, arXiv 1802.04434, without noise)
p ← p − lr g/‖g‖            normalized gradient descent, with one norm over all parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.clip import total_norm


class Rule(torch.optim.Optimizer):
    """What the update rules here share: options that are numbers, and a step with a closure.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr: learning rate, at least 0.
        weight_decay: at least 0; the coefficient of L2 where the rule does not say otherwise.
        others: further options of every group, at least 0.

    Raises:
        TypeError, ValueError: an option that is no such number.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, **others: float
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, **others}
        for name, value in defaults.items():
            check_number(name, value, least=0)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what the closure, which fills ``p.grad``, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Move the parameters by their ``p.grad``."""
        raise NotImplementedError

    def moved(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Every group, parameter and gradient g + weight_decay p; ``p.grad`` stays as it is."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    decay = group["weight_decay"]
                    yield group, p, p.grad.add(p, alpha=decay) if decay else p.grad


class SignDescent(Rule):
    """Sign descent, ``p ← p − lr sign(g + weight_decay p)``; where that is 0, p stays.

    Args and Raises: as :class:`Rule`.
    """

    def update(self) -> None:
        """Move the parameters by their ``p.grad``."""
        for group, p, g in self.moved():
            p.add_(g.sign(), alpha=-group["lr"])


class NormalizedGD(Rule):
    """Normalized gradient descent, ``p ← p − lr g/‖g‖`` with ``g ← g + weight_decay p``.

    The norm is of all groups' gradients as one vector, read on the device. A gradient of 0 moves
    nothing.

    Args and Raises: as :class:`Rule`.
    """

    def update(self) -> None:
        """Move the parameters by their ``p.grad``."""
        found = list(self.moved())
        norm = total_norm([g for _, _, g in found])
        scale = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
        scale = torch.where(norm.isfinite(), scale, norm)  # what is not finite is seen in the loss
        for group, p, g in found:
            p.add_(g * scale.to(p.device, p.dtype), alpha=-group["lr"])
