"""The direction in which a chunk's second gradient is taken, and how far that one counts."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Direction(NamedTuple):
    """What is added to a chunk's gradient g: ``k (grad L(theta + s T^2 v) - g)``.

        v = own g + whole G            G is the gradient of all chunks
        s = r / ||T v||                T = abs(theta) + eta, or 1 where `eta` is None
        k = c ||v|| / r                c / r where `follows_norm` is False

    Attributes:
        own: the share of the chunk's own gradient, 0 or 1.
        whole: the share of the whole gradient.
        follows_norm: whether k grows with ``||v||``; not with `eta`.
        eta: for the scale T of each parameter; None for none.
    """

    own: float = 1.0
    whole: float = 0.0
    follows_norm: bool = True
    eta: float | None = None

    def length(self, squared_norm: Tensor) -> Tensor:
        """What the kernels take for ``||v||^2``, from that: k is the square root of it times c / r.

        Without gradient there is no perturbation, and k of no account.
        """
        return squared_norm if self.follows_norm else torch.ones_like(squared_norm)

    def exact_length(self, squared_norm: Tensor) -> Tensor:
        """The same where k counts H v itself: c, or ``c / ||v||`` (0 where v = 0)."""
        if self.follows_norm:
            return torch.ones_like(squared_norm)
        return torch.where(squared_norm == 0, 0.0, squared_norm.reciprocal())


class PerturbationRule(Protocol):
    """What the passes at second points need to know: of a penalty, or of SAM.

    Attributes:
        method: "forward" or "central" differences, or "exact" for a second backward pass.
        radius: r, the length of the perturbation.
        direction: v.
        needs_norms: whether the penalty is of ``||g_c||``.
    """

    @property
    def method(self) -> str: ...
    @property
    def radius(self) -> float: ...
    @property
    def direction(self) -> Direction: ...

    @property
    def needs_norms(self) -> bool: ...

    def coefficient_at(self, step: int, optimizer: torch.optim.Optimizer | None) -> float | Tensor:
        """Return c at a step: lambda, of a penalty."""
        ...

    def value(
        self,
        c: float | Tensor,
        square: Tensor | None,
        norm: Tensor | None,
        whole: Tensor | None,
    ) -> Tensor | None:
        """Return the penalty, None for a gradient that is that of no function.

        Args:
            c: of this step.
            square: the mean of ``||g_c||^2``.
            norm: that of ``||g_c||``, where k does not follow the norm.
            whole: ``||G||^2``, where the direction has a share of it.
        """
        ...
