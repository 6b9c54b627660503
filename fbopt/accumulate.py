"""GradientAccumulator: the weighted mean of gradients over chunks, sum_c w_c g_c / sum_c w_c."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_grads
from fbopt._engine.gradient_sums import MOST_PASSES, GradientSums


class GradientAccumulator:
    """Weighted mean of gradients, one flat buffer per device and dtype.

    ``mean = sum_c w_c g_c / sum_c w_c``: with w_c the number of samples in chunk c and g_c the
    gradient of its mean loss this is the gradient of the mean loss over all samples, whatever the
    sizes of the chunks. One read of the gradient, one read and one write of the sum per parameter
    and chunk (3 words; 5 for exact sums).

    Args:
        params: the parameters, float32, float64, bfloat16 or float16, of any shapes and on any
            devices.
        accumulation: ``"float32"``: sums are kept in float32, for float64 parameters in float64,
            and their last bits depend on the order of the chunks. ``"exact"``: in integers, so that
            the mean has the same bits in any order, see below.

    Attributes:
        params: the parameters, each once.
        accumulation: as given.
        total_weight: the sum of the weights since the last :meth:`reset`.

    **Exact sums.** ``w_c g_c`` is rounded to a multiple of a unit u, a power of two for each tensor
    (many small tensors share one), and added as an integer of 96 bits. With M the largest
    ``|w_c g_c|`` in the tensor the sum's error is at most ``2^-49 M``, for up to 2^21 additions;
    the mean in float32 is that sum's, to one unit in the last place. (For float64 parameters
    ``w_c g_c`` is rounded to float64 first, and sums in float64 are more accurate.) Units follow
    from the M of the last pass. If they do not fit, as often in the first pass, all gradients have
    to be added once more, see :meth:`passes`. A tensor with a contribution that is NaN or infinite
    has NaN for its whole mean. Memory: 16 bytes per parameter rather than 4.

    Example:
        >>> accumulator = GradientAccumulator(model.parameters(), accumulation="exact")
        >>> for _ in accumulator.passes():  # one, or two if the units did not fit
        ...     for x, y in chunks:
        ...         loss = loss_fn(model(x), y)
        ...         accumulator.add(torch.autograd.grad(loss, accumulator.params), weight=len(x))
        >>> for p, g in zip(accumulator.params, accumulator.mean()):
        ...     p.grad = g
    """

    def __init__(self, params: Iterable[Tensor], accumulation: str = "float32") -> None:
        self._sums = GradientSums(params, accumulation)
        self.accumulation = accumulation
        self._additions = 0

    @property
    def params(self) -> list[Tensor]:
        """The parameters, each once."""
        return self._sums.params

    @property
    def total_weight(self) -> float:
        """The sum of the weights since the last :meth:`reset`."""
        return self._sums.total_weight

    def reset(self) -> None:
        """Start over: forget every gradient added so far. Buffers are kept, and cleared."""
        self._sums.reset()
        self._additions = 0

    def passes(self) -> Iterator[int]:
        """Yield 0, then 1, 2, ... as long as all gradients have to be added once more.

        Begins each pass with :meth:`reset`. With ``accumulation="float32"`` there is one pass.

        Raises:
            RuntimeError: the gradients change so much from pass to pass that no unit fits.
        """
        for attempt in range(MOST_PASSES):
            self.reset()
            yield attempt
            if not self._additions or self._finish():
                return
        raise _unsettled()

    def _finish(self) -> bool:
        store = self._sums.store
        fits = store.fit(self._sums.maxima(), self._additions)
        if fits:
            self._sums.finish()
        return fits

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight * grads``.

        Args:
            grads: one gradient for each of ``params``, of its shape, dtype and device; None counts
                as zero.
            weight: the number of samples that the gradients are the mean over; positive.

        Raises:
            TypeError, ValueError: an argument that does not fit, before anything is added.
        """
        grads = grads if isinstance(grads, Tensor) else list(grads)
        check_grads(grads, self.params)
        sums = self._sums
        sums.check_weight(weight)
        if sums.is_mean:
            self.reset()
        sums.add(sums.gather(grads), weight)
        sums.total_weight += weight
        self._additions += 1

    def mean(self) -> list[Tensor | None]:
        """Return the weighted mean: for each parameter a tensor of its shape and dtype.

        None where no gradient was ever added. The tensors share the accumulator's memory (for half
        precision they are rounded copies) and hold their values until the next :meth:`add` or
        :meth:`reset`, which begin a new sum.

        Raises:
            RuntimeError: nothing was added, or the units of exact sums did not fit: add all
                gradients once more, or use :meth:`passes`.
        """
        if self.total_weight == 0:
            raise RuntimeError(
                "GradientAccumulator.mean(): nothing was added; call add(grads, weight)"
            )
        if not self._sums.is_mean and not self._finish():
            self.reset()
            raise _unsettled()
        return self._sums.means()

    def state_dict(self) -> dict[str, Any]:
        """Return the units of exact sums: the bits of the next mean depend on them."""
        return self._sums.store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`, and start over as :meth:`reset` does."""
        self._sums.store.load_state_dict(state)
        self.reset()


def _unsettled() -> RuntimeError:
    """Return the error for exact sums whose units do not fit."""
    return RuntimeError(
        'the units of accumulation="exact" did not fit the size of the gradients, and are adapted '
        "now: add all gradients once more, as `for _ in accumulator.passes():` does by itself; "
        "where that does not help, the gradients change from one pass to the next (random draws "
        "without a seed)"
    )
