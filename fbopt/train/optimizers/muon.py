"""Muon for convolutions and hidden layers, AdamW for the rest, as one optimizer.

torch.optim.Muon takes matrices alone. The weights of a convolution, (out, in, …), are the matrix of
out rows that multiplies its patches: a view of them is what Muon gets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fbopt.train.optimizers.simple import Rule

OPTIONS = ("lr", "weight_decay", "momentum", "nesterov", "betas", "eps")


class Muon(Rule):
    """``torch.optim.Muon`` on the groups with ``matrices=True``, ``torch.optim.AdamW`` on the rest.

    Muon's steps have the root mean square of AdamW's (``adjust_lr_fn="match_rms_adamw"``, Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate serves both. Muon's state is the momentum
    of each weight in the weight's own shape; the state dict is that of one optimizer.

    Args:
        params: parameter groups, those for Muon with ``matrices=True``; of at least 2 dimensions.
        lr, weight_decay: of both, at least 0; the decay is decoupled.
        momentum, nesterov: Muon's.
        betas, eps: AdamW's.

    Raises:
        TypeError, ValueError: an option that is no number of at least 0, or a group for Muon with a
            parameter of less than 2 dimensions.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon/, 2024.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        muon = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(params, lr, weight_decay)
        for group in self.param_groups:
            group.setdefault("matrices", False)
            # By "fused" torch loads AdamW's count of steps to the parameters' device.
            rest = {"betas": betas, "eps": eps, "fused": True}
            group |= muon if group["matrices"] else rest
            for p in group["params"]:
                if group["matrices"] and p.dim() < 2:
                    raise ValueError(
                        "Muon takes weights of at least 2 dimensions, not of shape "
                        f"{tuple(p.shape)}: leave it to a group without matrices=True"
                    )

    def update(self) -> None:
        """Move the parameters by their ``p.grad``."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            options = {k: v for k, v in group.items() if k in OPTIONS}
            if params:
                (self._step_matrices if group["matrices"] else self._step_rest)(params, options)

    def _step_matrices(self, params: list[Tensor], options: dict[str, Any]) -> None:
        matrices = [nn.Parameter(as_matrix(p, p)) for p in params]
        muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        for p, matrix in zip(params, matrices, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            alike = p.grad.stride() == p.stride()
            matrix.grad = as_matrix(p.grad if alike else torch.empty_like(p).copy_(p.grad), p)
            muon.state[matrix]["momentum_buffer"] = as_matrix(self.state[p]["momentum_buffer"], p)
        muon.step()

    def _step_rest(self, params: list[Tensor], options: dict[str, Any]) -> None:
        adamw = torch.optim.AdamW(params, fused=True, **options)
        for p in params:
            adamw.state[p] = self.state[p]
        adamw.step()


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of a tensor (out, …) as out rows, its columns in the order in which `like`'s lie in
    memory; Muon's step does not depend on that order. A tensor that lies otherwise is an error.
    """
    strides = like.stride()
    order = sorted(range(1, like.dim()), key=lambda dim: -strides[dim])
    return tensor.detach().permute(0, *order).view(len(like), -1)
