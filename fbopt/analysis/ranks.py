"""How many directions matter: the share of a vector in an eigenspace, and effective ranks of the
chunks' gradients and of an operator, |M|_F^2/|M|_2^2 and (sum s^2)^2/sum s^4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt.analysis.checks import check
from fbopt.analysis.density import SpectralDensity
from fbopt.analysis.directions import check_direction
from fbopt.analysis.objective import Objective
from fbopt.analysis.spectrum import Eigenpairs


def subspace_share(direction: Tensor, eigenpairs: Eigenpairs | Tensor) -> float:
    """The share of a direction's squared norm in the space of eigenvectors, ``|V d|^2/|d|^2``.

    Gur-Ari, Roberts, Dyer, "Gradient Descent Happens in a Tiny Subspace" (arXiv 1812.04754): for
    the gradient and the top eigenvectors of the Hessian it comes close to 1 in training. For random
    directions it is k/P. For a momentum or an update, pass it as a vector
    (``objective.flatten(tensors)``).

    Args:
        direction: d, a vector of the parameter space.
        eigenpairs: what :func:`eigenpairs` returned; or orthonormal rows V, (k, P).

    Returns:
        A number from 0 to 1.

    Raises:
        TypeError, ValueError: the direction is zero or not finite, or of another length; rows that
            are not orthonormal.
    """
    rows = eigenpairs.vectors if isinstance(eigenpairs, Eigenpairs) else eigenpairs
    if not isinstance(rows, Tensor) or rows.dim() != 2 or direction.shape != rows.shape[1:]:
        raise ValueError(
            "pass a direction (P,) and Eigenpairs, or a tensor (k, P), of the same parameter space"
        )
    norm = check_direction(direction)
    rows = rows.detach().double()
    gram = rows @ rows.T
    if not torch.allclose(gram, torch.eye(len(rows)).to(gram), rtol=0, atol=1e-3):
        raise ValueError("eigenpairs has rows that are not orthonormal: take torch.linalg.qr(V.T)")
    unit = direction.detach().to(rows) / norm
    return min(float((rows @ unit).square().sum()), 1.0)


@dataclass(frozen=True)
class EffectiveRank:
    """Two continuous counts of the singular values s that matter, each from 1 to the rank.

    Attributes:
        stable: the stable rank, ``sum s^2 / max s^2``.
        participation: the participation ratio of the squares, ``(sum s^2)^2 / sum s^4``.
    """

    stable: float
    participation: float


def gradient_rank(objective: Objective, *, centered: bool = False) -> EffectiveRank:
    """The effective rank of the chunks' gradients, of the matrix with rows ``sqrt(n_c/N) g_c``.

    From the eigenvalues s^2 of its Gram matrix: 1 if all chunks pull in one direction, up to the
    number of chunks if all are orthogonal and of one length.

    Args:
        objective: the loss. Memory: a gradient for each chunk.
        centered: subtract the full-batch gradient from each: the rank of the noise.

    Raises:
        ValueError: weights or the loss are not finite; all gradients (or differences) are zero.
        RuntimeError: the loss is not deterministic.
    """
    check(objective)
    own: list[Tensor] = []
    objective.accumulate(lambda weight, loss, grads: own.append(objective.flatten(grads)))
    mean = objective.flatten(objective.sums.means()).double()
    weights = torch.tensor(objective.shares.weights, dtype=torch.float64)
    rows = torch.stack(own).double() if own else mean.new_zeros(0, len(mean))
    shares = objective.shares.gather(weights.view(1, -1))[0]
    found = objective.shares.gather(rows.T).T
    if centered:
        found = found - mean
    scaled = found * (shares / shares.sum()).sqrt().to(found).unsqueeze(1)
    squares = torch.linalg.eigvalsh(scaled @ scaled.T).clamp_min(0)
    if not float(squares[-1]) > 0:
        raise ValueError(
            "the gradients of all chunks are " + ("equal" if centered else "zero") + ": they have "
            "no rank"
        )
    total = squares.sum()
    return EffectiveRank(float(total / squares[-1]), float(total**2 / squares.square().sum()))


def spectral_rank(density: SpectralDensity) -> EffectiveRank:
    """The effective rank of an operator, from the estimate of its spectrum.

    With eigenvalues x the stable rank is ``sum x^2 / max x^2``, and the participation ratio, as for
    covariances, of the eigenvalues themselves, ``tr(A)^2/tr(A^2)``. For a positive semidefinite
    operator both lie between 1 and its rank; where negative eigenvalues cancel positive ones the
    participation ratio is smaller, down to 0.

    Args:
        density: what :func:`spectral_density` returned; the largest of its nodes in size counts as
            the largest eigenvalue, of which it is a lower bound.

    Raises:
        ValueError: the operator is zero.
    """
    trace, squared = density.trace.value, density.squared_trace.value
    largest = float(max(abs(density.nodes[0]), abs(density.nodes[-1])))
    if not largest > 0 or not squared > 0:
        raise ValueError("the operator is zero: it has no rank")
    return EffectiveRank(squared / largest**2, trace**2 / squared)
