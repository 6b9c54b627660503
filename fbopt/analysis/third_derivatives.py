"""Third derivatives of the full-batch loss along two directions: grad(u.(H v)), a vector, by three
backward passes per chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbopt._engine.autograd_graph import naming_methods
from fbopt.analysis.derivatives import gradients
from fbopt.analysis.objective import Objective

Parts = Sequence[Tensor | None]


def third_derivative(objective: Objective, left: Tensor, right: Tensor) -> Tensor:
    """The gradient of a curvature, ``grad_theta (u.(H(theta) v))``, at the model's parameters.

    It is the third derivative tensor T of L applied to u and v: ``sum_bc T_abc u_b v_c``. By three
    nested backward passes over every chunk, exact to rounding. One pass over the chunks; memory: a
    chunk's graph of two backward passes.

    Args:
        objective: the loss L.
        left: u, a vector (P,) of the parameter space (:class:`Objective`).
        right: v, the same.

    Returns:
        A vector (P,), in the units of L; zero where L is at most quadratic.

    Raises:
        ValueError: a vector of another shape.
        RuntimeError: an operation of the model cannot be differentiated three times.
    """
    for name, vector in (("left", left), ("right", right)):
        if vector.shape != (objective.size,):
            raise ValueError(
                f"{name} must have the shape ({objective.size},), got {tuple(vector.shape)}"
            )
    u, v = objective.unflatten(left), objective.unflatten(right)
    with (
        objective.evaluating("products", None, torch.cat([left, right])),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        naming_methods(),
    ):
        for index, chunk, weight in objective.visit():
            loss = objective.chunk_loss(index, chunk)
            grads = gradients(loss, objective.params, create_graph=True)
            curvature = _along(_along(grads, v, objective.params, keep=True), u)
            objective.shares.add(weight, loss, _gradient(curvature, objective.params))
            del loss, grads, curvature
    objective.count("gradients", "second_backwards")
    return objective.flatten(objective.sums.means())


def _along(
    found: Parts, direction: Sequence[Tensor], params: Sequence[Tensor] = (), keep: bool = False
) -> list[Tensor | None]:
    """The derivative of ``found.direction`` by the parameters; without these that number itself."""
    pairs = zip(found, direction, strict=True)
    terms = [(f * d).sum() for f, d in pairs if f is not None and f.requires_grad]
    if not terms:
        return [None for _ in params or (0,)]
    total = torch.stack([t.double() for t in terms]).sum()
    if not params:
        return [total]
    return list(torch.autograd.grad(total, params, create_graph=keep, allow_unused=True))


def _gradient(curvature: Parts, params: Sequence[Tensor]) -> list[Tensor | None]:
    (total,) = curvature
    if total is None or not total.requires_grad:
        return [None for _ in params]
    return list(torch.autograd.grad(total, params, allow_unused=True))


def curvature_gradients(objective: Objective, vectors: Tensor) -> Tensor:
    """The gradients of ``u_i.(H u_j)`` for i <= j, as rows in the order of :func:`triangle`.

    Args:
        objective: the loss.
        vectors: u_1 to u_k, (k, P), orthonormal.

    Returns:
        (k(k+1)/2, P), those with i < j times sqrt(2): the scalar product of the rows with the
        entries of a symmetric matrix X in the same order and scale is ``sum_ij X_ij grad H_ij``.
    """
    rows = [
        third_derivative(objective, vectors[i], vectors[j]) * (1 if i == j else 2**0.5)
        for i, j in triangle(len(vectors))
    ]
    return torch.stack(rows) if rows else vectors.new_zeros((0, objective.size))


def triangle(size: int) -> list[tuple[int, int]]:
    """The places (i, j), i <= j, of a symmetric matrix's upper triangle, column by column."""
    return [(i, j) for j, i in itertools.product(range(size), repeat=2) if i <= j]
