"""Layer-wise adaptive rate scaling: every tensor's step is sized by its own norm.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fbopt.clip import total_norm
from fbopt.train.optimizers.simple import Rule


class LARS(Rule):
    """LARS, with a rate of its own for each tensor, a layer's weights or its biases.

    One step::

        ratio <- trust ‖p‖ / (‖g‖ + weight_decay ‖p‖)       (1 where ‖p‖ or ‖g‖ is 0)
        v <- momentum v + lr ratio (g + weight_decay p)
        p <- p - v

    The learning rate stands inside the momentum, as in the paper: when it falls, earlier steps
    keep theirs. Norms are read on the device.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr: learning rate, at least 0; many times SGD's, as `trust` multiplies it.
        momentum: m, at least 0.
        weight_decay: the L2 coefficient, at least 0.
        trust: the paper's η, at least 0.

    Raises:
        TypeError, ValueError: an option that is no such number.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum=momentum, trust=trust)

    def update(self) -> None:
        """Move the parameters by their ``p.grad``."""
        for group, p, g in self.moved():
            ratio = trust_ratio(p, p.grad, group["trust"], group["weight_decay"])
            v = self.state[p].get("momentum_buffer")
            if v is None:
                v = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            v.mul_(group["momentum"]).add_(g * ratio.to(g.dtype), alpha=group["lr"])
            p.sub_(v)


def trust_ratio(p: Tensor, g: Tensor, trust: float, weight_decay: float) -> Tensor:
    """``trust ‖p‖ / (‖g‖ + weight_decay ‖p‖)``, 1 where a norm is 0; a 0-dim tensor."""
    weight, gradient = total_norm([p]), total_norm([g])
    ratio = trust * weight / (gradient + weight_decay * weight)
    return torch.where((weight == 0) | (gradient == 0), torch.ones_like(ratio), ratio)
