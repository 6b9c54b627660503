"""The objective of a gradient penalty, J(theta) = sum_c (n_c/N) (L_c + (lambda/2) ||g_c||^2), with
exact derivatives: its gradient by two nested backward passes, products with its Hessian by three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbopt._checks import check_number
from fbopt.analysis.derivatives import gradients
from fbopt.analysis.objective import Objective


class PenalisedObjective(Objective):
    """What full-batch training with a gradient penalty descends, in place of the loss alone.

    With g_c the gradient of the mean loss L_c of chunk c, of n_c samples of N::

        power=2    J = sum_c (n_c/N) (L_c + (lambda/2) ||g_c||^2)
        power=1    J = sum_c (n_c/N) (L_c + lambda ||g_c||)

    as for :class:`fbopt.GradientPenalty`, whose finite differences it does not make. Everything in
    this package that takes an objective measures J with it: ``Hessian(penalised)`` has the
    curvature that penalised steps see, whose largest eigenvalue is to be compared with their
    threshold of stability. To first order in rho, sharpness-aware minimization by chunks descends J
    with power=1 and lambda = rho.

    The model has to be differentiable three times; memory: a chunk's graph of two backward passes.
    Where gradients jump (ReLU), derivatives leave out what the jumps contribute. With power=1,
    ``||g_c||`` has no derivative at zero: there the result is not finite, which is refused. What is
    made of single samples or of the model's outputs (mini-batches, Gauss-Newton and Fisher
    matrices) is of the loss, and refuses J.

    Args:
        model, loss_fn, chunks: as for :class:`Objective`, which takes all other options too.
        coefficient: lambda, at least 0; of a training run ``lr * strength / 4``.
        power: 2 for the squared norm, 1 for the norm.

    Raises:
        TypeError, ValueError: an invalid argument.
    """

    is_penalised = True

    def __init__(
        self,
        *arguments: Any,
        coefficient: float,
        power: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.coefficient = float(check_number("coefficient", coefficient, least=0))
        if isinstance(power, bool) or power not in (1, 2):
            raise ValueError(f"power must be 1, for the norm, or 2, got {power!r}")
        self.power = power

    def chunk_forward(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """The chunk's share of J, the model's output and the target."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss, output, target = super().chunk_forward(index, chunk)
            grads = gradients(loss, self.params, create_graph=True)
            square = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
            penalty = square / 2 if self.power == 2 else square.sqrt()
            found = loss + self.coefficient * penalty
        return (found if differentiable else found.detach()), output, target
