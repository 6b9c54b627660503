"""Sharpness-aware minimization (SAM) and its adaptive kind (ASAM): the gradient at the worst point
nearby, to first order.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021;
Andriushchenko and Flammarion, "Towards Understanding Sharpness-Aware Minimization", ICML 2022;
Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
Neural Networks", ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fbopt._checks import check_number
from fbopt._direction import Direction

if TYPE_CHECKING:
    import torch

METHODS = ("forward", "central")
SCOPES = ("chunk", "full")
ETA = 0.01  # as in the code released with Kwon et al., github.com/SamsungLabs/ASAM


@dataclass(frozen=True)
class SharpnessAware:
    """Gradients at ``theta + rho v / ||v||`` in place of those at theta.

    With g_c the gradient of chunk c, of n_c samples, and G that of all chunks::

        scope="chunk"    v = g_c         m-sharpness, with m the size of a chunk
        scope="full"     v = G           the sharpness of the loss of all samples

        g'_c = g_c + alpha (grad L_c(theta + rho v / ||v||) - g_c)

    With ``adaptive=True`` (ASAM) distances are relative to the parameters, elementwise::

        T = abs(theta) + eta             the point is  theta + rho T^2 v / ||T v||

    which is theta where ``||T v||`` is 0.

    Args:
        rho: length of the perturbation in parameter space; of one that is adaptive that of the
            perturbation divided by T (0.5 in the code released with the paper).
        adaptive: scale the perturbation of each parameter with its size. Of biases and of BatchNorm
            too; the released code leaves T = 1 for parameters whose names lack "weight".
        scope: ``"chunk"``: one more pass over each chunk; or ``"full"``: one more and, before them,
            a visit of all chunks for G, which leaves no trace in buffers and random generators.
        alpha: share of the gradient at the perturbed point; 1 takes it alone.
        method: ``"forward"``, as above; ``"central"`` adds alpha/2 times the difference of the
            gradients at both sides.
        eta: T of a parameter that is zero, at least 0; 0.01 in the released code, and with 0 zeros
            stay zeros, and nothing depends on the scale of a layer that BatchNorm follows.
    """

    rho: float = 0.05
    adaptive: bool = False
    scope: str = "chunk"
    alpha: float = 1.0
    method: str = field(default="forward", kw_only=True)
    eta: float = field(default=ETA, kw_only=True)

    def __post_init__(self) -> None:
        check_number("rho", self.rho, above=0)
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"adaptive must be True or False, got {type(self.adaptive).__name__}")
        check_number("alpha", self.alpha, least=0)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        check_number("eta", self.eta, least=0)
        if self.eta != ETA and not self.adaptive:
            raise ValueError("eta is of the adaptive perturbation: pass adaptive=True")

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
        """The direction of the second points, g_c or G, and how it is scaled."""
        of_chunk, eta = self.scope == "chunk", self.eta if self.adaptive else None
        return Direction(float(of_chunk), float(not of_chunk), follows_norm=False, eta=eta)

    def coefficient_at(self, step: int, optimizer: torch.optim.Optimizer | None) -> float:
        """The coefficient, which is the same at every step."""
        return self.coefficient

    def value(self, c: object, square: object, norm: object, whole: object) -> None:
        """Return None: the gradient is that of no function."""
