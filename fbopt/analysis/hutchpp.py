"""The trace by Hutch++: exact on the range of a random sketch, by Hutchinson's estimator on the
rest, tr(A) = tr(Q^T A Q) + E z.(I - Q Q^T) A (I - Q Q^T) z.

Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation" (SOSA 2021, arXiv
2010.09649), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.basis import Basis
from fbopt.analysis.directions import random_signs
from fbopt.analysis.hessian import Trace
from fbopt.analysis.operator import Operator


def hutchpp_trace(operator: Operator, products: int = 30, seed: int = 0) -> Trace:
    """Estimate the trace of an operator of which a few eigenvalues are far larger than the others.

    A third of the products makes an orthonormal basis Q of the range of A on random signs, a third
    is exact on it, and the rest are samples of Hutchinson's estimator off it. Unbiased, also where
    eigenvalues are negative. For a positive semidefinite A the error falls with 1/products, that of
    :func:`hessian_trace` with 1/sqrt(products); if the eigenvalues are alike, that one is better.

    Args:
        operator: a :class:`Hessian` or another operator.
        products: the number of products with it, at least 6.
        seed: of the random signs.

    Returns:
        A :class:`Trace`: `error` is the standard error of the samples off the basis, given the
        basis; `samples` is their number.

    Raises:
        TypeError, ValueError: `products` is not a number or too small; products that are not
            finite.
        RuntimeError: the model has changed since the operator was made.
    """
    check_number("products", products, least=6)
    objective, sketch = operator.objective, int(products) // 3
    generator = torch.Generator().manual_seed(seed)
    like = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    basis, inside = Basis(like, seed), 0.0
    for _ in range(sketch):
        unit = _new(basis, operator.finite(random_signs(objective, generator)))
        if unit is not None:
            basis.add(unit)
            inside += float(unit.double() @ operator.finite(unit).double())
    samples = []
    for _ in range(int(products) - 2 * sketch):
        _, vector = basis.orthogonalize(random_signs(objective, generator))
        samples.append(float(vector.double() @ operator.finite(vector).double()))
    outside = Trace.of(samples)
    return Trace(inside + outside.value, outside.error, outside.samples)


def _new(basis: Basis, vector: Tensor) -> Tensor | None:
    """The unit vector of what is orthogonal to the basis; None if that is rounding alone."""
    _, rest = basis.orthogonalize(vector)
    norm, least = float(rest.norm()), 1e3 * torch.finfo(rest.dtype).eps * float(vector.norm())
    if norm <= least:
        return None
    _, rest = basis.orthogonalize(rest / norm)
    return rest.div_(rest.norm())
