"""Sharpness-aware minimization (SAM): the gradient at the worst point nearby, to first order.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021;
Andriushchenko and Flammarion, "Towards Understanding Sharpness-Aware Minimization", ICML 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fbopt._checks import check_number
from fbopt._direction import Direction

if TYPE_CHECKING:
    import torch

METHODS = ("forward", "central")
SCOPES = ("chunk", "full")


@dataclass(frozen=True)
class SharpnessAware:
    """Gradients at ``theta + rho v / ||v||`` in place of those at theta.

    With g_c the gradient of chunk c, of n_c samples, and G that of all chunks::

        scope="chunk"    v = g_c         m-sharpness, with m the size of a chunk
        scope="full"     v = G           the sharpness of the loss of all samples

        g'_c = g_c + alpha (grad L_c(theta + rho v / ||v||) - g_c)

    Args:
        rho: length of the perturbation in parameter space.
        scope: ``"chunk"``: one more pass over each chunk; or ``"full"``: one more and, before them,
            a visit of all chunks for G, which leaves no trace in buffers and random generators.
        alpha: share of the gradient at the perturbed point; 1 takes it alone.
        method: ``"forward"``, as above; ``"central"`` adds alpha/2 times the difference of the
            gradients at both sides.
    """

    rho: float = 0.05
    scope: str = "chunk"
    alpha: float = 1.0
    method: str = "forward"

    def __post_init__(self) -> None:
        check_number("rho", self.rho, above=0)
        check_number("alpha", self.alpha, least=0)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")

    @property
    def radius(self) -> float:
        """The length of the perturbation."""
        return self.rho

    @property
    def coefficient(self) -> float:
        """What the kernels divide by the radius for the factor alpha."""
        return self.alpha * self.rho

    @property
    def needs_norms(self) -> bool:
        """Whether a value takes the mean norm; there is none."""
        return False

    @property
    def direction(self) -> Direction:
        """The direction of the second points, g_c or G."""
        of_chunk = self.scope == "chunk"
        return Direction(float(of_chunk), float(not of_chunk), follows_norm=False)

    def coefficient_at(self, step: int, optimizer: torch.optim.Optimizer | None) -> float:
        """The coefficient, which is the same at every step."""
        return self.coefficient

    def value(self, c: object, square: object, norm: object, whole: object) -> None:
        """Return None: the gradient is that of no function."""
