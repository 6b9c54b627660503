"""Extreme eigenvalues and eigenvectors of the full-batch Hessian, from a random or given start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.lanczos import eigenpairs_from_random
from fbopt.analysis.operator import Operator
from fbopt.analysis.ritz import eigenpairs_from
from fbopt.analysis.spectrum import ENDS, Eigenpairs, Wanted


def eigenpairs(
    hessian: Operator,
    count: int = 5,
    which: str = "largest",
    *,
    start: Eigenpairs | Tensor | None = None,
    tolerance: float | None = None,
    max_products: int = 200,
    seed: int = 0,
    verify: bool = True,
) -> Eigenpairs:
    """Extreme eigenvalues of the full-batch Hessian and their eigenvectors.

    Eigenvalues are ordered with their sign: the smallest are the most negative. Without `start`, by
    Lanczos iterations from a random vector, until the next pair inwards has converged as well: one
    of two eigenvalues close to each other could be hidden else. Memory: one vector per product.
    Further eigenvectors of a multiple eigenvalue are found only once the Krylov space is exhausted.

    **Tracking.** From the eigenpairs of a similar operator, such as the same loss a few steps
    before, fewer products are needed: four to six in place of 12 to 14 for the largest one at the
    edge of stability (docs/guides/analysis.md). At least one product is spent on each wanted pair
    and, at each end, on the next one inwards (a *guard*), which is how an eigenvalue that overtakes
    is seen at once. One from further inside has to grow from the random vector, of length 10
    tolerances but within 0.03 and 0.1, that is mixed into each unit start vector (drawn by `seed`
    and the start's bits). Until then it can be missed, in a chain of ``start=pairs`` for 20 calls
    at most: the next one makes ten more products, from a random vector. With `start`, therefore,
    ``converged`` says that a pair is an eigenpair, not that no other is further out. Memory: two
    vectors per product.

    Args:
        hessian: the operator, exact or by finite differences; or another :class:`Operator`.
        count: the number of eigenvalues at each end.
        which: ``"largest"``, ``"smallest"`` or ``"both"``.
        start: what an earlier call returned; or vectors near the wanted eigenvectors, (m, P) with
            m at least 1, from which no call searches.
        tolerance: a pair has converged if its residual is below this fraction of its absolute
            eigenvalue (for eigenvalues near zero, of a thousandth of the largest). Default: 1e-6
            for float64 and exact products, else 1e-3.
        max_products: stop after so many products; the result says which pairs have converged.
        seed: of the random draws.
        verify: compute the residuals by one more product for each pair. With `start` and exact
            products they are computed already, and no more products are made.

    Raises:
        TypeError, ValueError: an invalid argument; products that are not finite.
        RuntimeError: the parameters have changed since the operator was made.
    """
    objective = hessian.objective
    if tolerance is None:
        fine = objective.epsilon < 1e-12 and hessian.method == "exact"
        tolerance = 1e-6 if fine else 1e-3
    like = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    _check(len(like), count, which, tolerance, max_products)
    wanted = Wanted(count, which, tolerance)
    if start is None:
        found = eigenpairs_from_random(like, hessian, wanted, max_products, seed)
    else:
        rows = _start_rows(start, like)
        age = start.age + 1 if isinstance(start, Eigenpairs) else 0
        found = eigenpairs_from(rows, hessian, wanted, max_products, seed, age)
        verify = verify and hessian.method != "exact"
    return _verified(found, hessian, wanted) if verify else found


def _verified(found: Eigenpairs, hessian: Operator, wanted: Wanted) -> Eigenpairs:
    """The same pairs with residuals by one more product each."""
    pairs = zip(found.values, found.vectors, strict=True)
    residuals = np.array([float((hessian(v) - float(x) * v).double().norm()) for x, v in pairs])
    return replace(
        found,
        residuals=residuals,
        converged=wanted.converged(found.values, residuals, found.norm),
        products=found.products + len(residuals),
    )


def _start_rows(start: Eigenpairs | Tensor, like: Tensor) -> Tensor:
    """The start vectors as rows, in the dtype and on the device of the operator's vectors."""
    if isinstance(start, Eigenpairs):
        start = torch.cat([start.vectors, start.guards])
    if not isinstance(start, Tensor):
        raise TypeError(f"start must be Eigenpairs or a tensor, got {type(start).__name__}")
    if start.dim() != 2 or start.shape[1] != len(like) or not len(start):
        raise ValueError(
            f"start must have the shape (m, {len(like)}), a row for each vector, got "
            f"{tuple(start.shape)}"
        )
    rows = start.detach().to(like)
    norms = rows.double().norm(dim=1)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise ValueError("start has a row that is zero, infinite or undefined")
    return rows


def _check(size: int, count: int, which: str, tolerance: float, max_products: int) -> None:
    if which not in ENDS:
        raise ValueError(f"which must be one of {ENDS}, got {which!r}")
    check_number("count", count, least=1)
    check_number("tolerance", tolerance, above=0)
    needed = 2 * count if which == "both" else count
    if needed > size:
        raise ValueError(f"count asks for {needed} eigenvalues, but there are {size}")
    if max_products < needed:
        raise ValueError(f"max_products is {max_products}: {needed} eigenvalues need as many")
