"""The complementarity problem of a central flow: X >= 0, S = Q + K[X] >= 0, <S, X> = 0 (matrices),
as the optimality conditions of the convex program min 1/2 <X, K[X]> + <Q, X> over X >= 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fbopt.analysis.basis import Array
from fbopt.analysis.third_derivatives import triangle

CURE = "a central flow needs a solver of cone programs: pip install 'fbopt[flow]' (clarabel, scipy)"
ACCURACY = 1e-11  # of the program, scaled to numbers around 1


def solve(constant: Array, gram: Array) -> tuple[Array, Array]:
    """Solve ``X >= 0, S = Q + K[X] >= 0, <S, X> = 0`` for symmetric k x k matrices.

    The inequalities are those of semidefinite matrices. Symmetric matrices are given as vectors of
    their upper triangle, column by column, off-diagonal entries times sqrt(2).

    Args:
        constant: Q as such a vector, (k(k+1)/2,) float64.
        gram: K as a symmetric positive semidefinite matrix on such vectors.

    Returns:
        X and S, (k, k) float64.

    Raises:
        ModuleNotFoundError: clarabel or scipy is not installed.
        RuntimeError: there is no solution: no X keeps S positive semidefinite.
    """
    clarabel, sparse = solver()
    entries = len(constant)
    size = round((np.sqrt(8 * entries + 1) - 1) / 2)
    force, stiffness = max(np.abs(constant).max(), 1e-300), max(np.abs(gram).max(), 1e-300)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, ACCURACY)
    program = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(gram / stiffness)),
        constant / force,
        sparse.csc_matrix(-np.eye(entries)),
        np.zeros(entries),
        [clarabel.PSDTriangleConeT(size)],
        settings,
    )
    found = program.solve()
    if str(found.status) not in ("Solved", "AlmostSolved"):
        raise RuntimeError(
            f"the complementarity problem of {size} eigenvalues at the edge has no solution that "
            f"the solver finds ({found.status}): no oscillation holds them; follow fewer with a "
            "smaller margin, take more substeps, or begin at another point"
        )
    x = np.array(found.x) * (force / stiffness)
    return matrix(x, size), matrix(constant + gram @ x, size)


def solver() -> tuple[Any, Any]:
    """The modules clarabel and scipy.sparse. Raises ModuleNotFoundError with the cure."""
    try:
        import clarabel
        from scipy import sparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{CURE}; {error}", name=error.name) from error
    return clarabel, sparse


def matrix(entries: Array, size: int) -> Array:
    """The symmetric matrix of a scaled upper triangle."""
    found = np.zeros((size, size))
    for entry, (i, j) in zip(entries, triangle(size), strict=True):
        found[i, j] = found[j, i] = entry if i == j else entry / 2**0.5
    return found


def entries_of(symmetric: Array) -> Array:
    """The scaled upper triangle of a symmetric matrix; the inverse of :func:`matrix`."""
    places = triangle(len(symmetric))
    return np.array([symmetric[i, j] * (1 if i == j else 2**0.5) for i, j in places])
