"""The passes over the chunks that a measure takes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Cost:
    """Numbers of passes over all chunks: losses alone, gradients, and second backward passes (all
    that follow the first one through the same graph).

    An exact Hessian-vector product counts as one of `gradients` and one of `second_backwards`; one
    by central differences as two of `gradients`; one with :class:`GaussNewton` or :class:`Fisher`
    as one of `gradients` and two of `second_backwards`.
    """

    losses: int = 0
    gradients: int = 0
    second_backwards: int = 0

    def since(self, start: Cost) -> Cost:
        """The passes made after `start`, an earlier :meth:`copy`."""
        return Cost(**{name: value - getattr(start, name) for name, value in vars(self).items()})

    def copy(self) -> Cost:
        """A copy that later passes do not change."""
        return replace(self)
