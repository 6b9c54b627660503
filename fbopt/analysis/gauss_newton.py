"""Generalised Gauss-Newton products G v = J^T (d^2 L/dz^2) J v, with z the model's outputs.

Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (Neural
Computation 14, 2002).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fbopt._engine.autograd_graph import SecondBackward
from fbopt.analysis.derivatives import products
from fbopt.analysis.outputs import OutputOperator, Outputs


class GaussNewton(OutputOperator):
    """The generalised Gauss-Newton matrix of L, as a linear operator: ``operator(v)`` is G v.

    With z the outputs of the model for chunk c, J_c their Jacobian by the parameters, and L_c the
    mean loss as a function of z::

        G = sum_c (n_c/N) J_c^T (d^2 L_c / dz^2) J_c

    It is the Hessian without the curvature of the model itself, ``H = G + sum_c (n_c/N) dL_c/dz
    d^2 z``: positive semidefinite for a loss that is convex in the outputs, such as cross-entropy
    and the squared error. For the cross-entropy it equals the Fisher matrix with the model's own
    labels.

    It belongs to the parameters at which it was made, as a :class:`Hessian` does.

    Args:
        objective: the loss, made with `loss_fn`; the model returns one tensor. Under autocast the
            products are those of the autocast forward pass.

    Attributes:
        objective: the loss.
        products: the number of products so far.

    Raises:
        ValueError: an objective made with `evaluate`; weights or a loss that are not finite; a
            loss function that reads the parameters itself (at the first product).
        TypeError: the model's output is not one tensor (at the first product).
        RuntimeError: a loss that is not deterministic; a compiled model; a product after the model
            has changed; a function without the derivatives that are needed.
    """

    name = "GaussNewton"

    def _multiply(self, index: int, outputs: Outputs, vector: Tensor) -> Tensor:
        values = outputs.wide()
        loss = outputs.loss_of(values)
        if not loss.requires_grad:
            return torch.zeros_like(vector)
        second = None if self._is_checked else SecondBackward(loss)
        (image,) = products(loss, [values], [vector.to(values.dtype)])
        if second is not None:
            moved = (values.detach() * 1.01 + 0.01).requires_grad_()
            second.check([values], lambda: contextlib.nullcontext(_at(outputs, values, moved)))
        return torch.zeros_like(vector) if image is None else image


def _at(outputs: Outputs, values: Tensor, moved: Tensor) -> Tensor:
    """The loss at other outputs, with a graph that ends in `values`."""
    return outputs.loss_of(values + (moved - values).detach())
