"""Steps whose length is searched evaluate the loss several times: what is logged of them is that of
the first time, at the parameters before the step.
"""

from __future__ import annotations

from torch import Tensor

from fbopt import FullBatchClosure


class FirstEvaluation:
    """Tells the first evaluation of a step from the others, and keeps its loss.

    Attributes:
        loss: of the parameters before the step; None until the first evaluation is done.
    """

    def __init__(self, closure: FullBatchClosure) -> None:
        self._closure, self._before = closure, -1
        self.loss: Tensor | None = None

    def begin(self) -> None:
        """Begin a step."""
        self._before, self.loss = self._closure.step, None

    @property
    def is_running(self) -> bool:
        """Whether the first evaluation of the step is not done yet."""
        return self._closure.step == self._before

    def note(self) -> None:
        """Keep the loss of the first evaluation, before the second or after the step."""
        if self.loss is None and not self.is_running:
            self.loss = self._closure.loss
