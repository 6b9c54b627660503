"""GradientAccumulator: the weighted mean of gradients over chunks, sum_c w_c g_c / sum_c w_c."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbopt._checks import check_grads, check_number, check_params
from fbopt._ops import dispatch
from fbopt._ops.buckets import FlatBuckets
from fbopt._ops.fixed_point import FixedPoint
from fbopt._ops.fixed_point import check_weight as check_exact_weight

if TYPE_CHECKING:
    from fbopt._distributed import Collectives

ACCUMULATIONS = ("float32", "exact")
# Passes until the units of exact sums must fit: the second does, unless the gradients change.
MOST_PASSES = 4


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

    **Exact sums.** ``w_c g_c`` is rounded to a multiple of a unit u, a power of two for each tensor
    (of many small tensors, which are kept as one, for all of them), and added as an integer of 96
    bits. With M the largest ``|w_c g_c|`` in the tensor, the sum's error is at most ``2^-49 M``,
    for up to 2^21 additions; the mean in float32 is that sum's, to one unit in the last place. (For
    float64 parameters ``w_c g_c`` is rounded to float64 first, and the mean in float64 is not as
    near as sums in float64 are.) Units follow from the M of the last pass. Where they turn out not
    to fit, and often in the first pass, all gradients have to be added once more, see
    :meth:`passes`. A tensor with a contribution that is NaN or infinite has NaN for its whole mean.
    Memory: 16 bytes per parameter rather than 4.

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
        if accumulation not in ACCUMULATIONS:
            raise ValueError(f"accumulation must be one of {ACCUMULATIONS}, got {accumulation!r}")
        self.params = check_params(params)
        self.accumulation = accumulation
        self.fixed: FixedPoint | None = None
        self._exponents: Sequence[int] = ()  # of a state that was loaded
        self._signature: list[tuple] | None = None
        self._scalars: dict[tuple[float, torch.device], Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Start over: forget every gradient added so far. Buffers are kept, and cleared."""
        signature = [(p.device, p.dtype, p.shape, p.stride()) for p in self.params]
        if signature != self._signature:
            self._allocate()
            self._signature = signature
        else:
            self._clear()
        self.total_weight, self.additions = 0.0, 0
        self.unseen = set(range(len(self.params)))
        self._is_mean = False

    @torch.no_grad()
    def _allocate(self) -> None:
        self.buckets = FlatBuckets(self.params)
        self._flat = self.buckets.buffers(wide=True)
        self.sums = self.buckets.views(self._flat)
        self._operands = self.buckets.operands(self._flat, self.sums)
        if self.accumulation == "exact":
            known = self._exponents if self.fixed is None else self.fixed.state_dict()
            self.fixed = FixedPoint(self._operands)
            self.fixed.load_state_dict(known if len(known) == len(self.fixed) else self._exponents)
            self.fixed.reset()

    def _clear(self) -> None:
        if self.fixed is not None:
            self.fixed.reset()
            return
        for flat in self._flat:
            flat.zero_()

    def passes(self) -> Iterator[int]:
        """Yield 0, and 1 and so on as long as all gradients have to be added once more.

        Begins each pass with :meth:`reset`. With ``accumulation="float32"`` there is one.

        Raises:
            RuntimeError: the gradients change so much from pass to pass that no unit fits.
        """
        for attempt in range(MOST_PASSES):
            self.reset()
            yield attempt
            if self.fixed is None or not self.additions or self._settle_exact():
                return
        raise _unsettled()

    def _settle_exact(self) -> bool:
        fits = self.fixed.fit(self.fixed.maxima(), self.additions)
        if fits:
            self.settle(set())
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
        self.check_weight(weight)
        if self._is_mean:
            self.reset()
        self.add_parts(self.gather(grads), weight)
        self.total_weight += weight
        self.additions += 1

    def check_weight(self, weight: float) -> None:
        """Raise TypeError or ValueError for a weight that cannot be used."""
        check_number("weight", weight, above=0)
        if self.fixed is not None:
            check_exact_weight(weight)

    def gather(self, grads: Sequence[Tensor | None], slot: str = "grads") -> list[list[Tensor]]:
        """Return the gradients as the kernels take them, zeros where there is none.

        Notes which parameters have one.
        """
        if type(None) in map(type, grads):  # `None in grads` would compare tensors
            self.unseen.difference_update(i for i, g in enumerate(grads) if g is not None)
            pairs = zip(grads, self.params, strict=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        else:
            self.unseen.clear()
        return self.buckets.gather(grads, slot)

    def add_parts(
        self, parts: list[list[Tensor]], weight: float | Tensor, coefficient: Tensor | None = None
    ) -> None:
        """:meth:`add` for gradients that autograd has just made and :meth:`gather` has gathered.

        With a coefficient: add ``weight * coefficient * grads``, which exact sums do not do. The
        caller counts the weight in ``total_weight``: one on the device is not read.
        """
        for k, part in enumerate(parts):
            scale = self.scalar(weight, part[0].device)
            if self.fixed is not None:
                self.fixed.add(k, part, scale)
                continue
            if coefficient is not None:
                scale = scale * coefficient.to(scale.device)
            dispatch.accumulate_(self._operands[k], part, scale)

    def add_products(
        self,
        grads: list[list[Tensor]],
        products: list[list[Tensor]],
        weight: float | Tensor,
        coefficient: Tensor,
    ) -> None:
        """Add ``weight * (g + lambda H g)`` from gradients and Hessian products, both gathered.

        The caller counts the weight, as for :meth:`add_parts`.
        """
        if self.fixed is None:
            self.add_parts(grads, weight)
            self.add_parts(products, weight, coefficient)
            return
        # One contribution, so that it is rounded once: lambda H g is the penalised update's
        # difference from zero where ||g|| / (2 radius) is one.
        one = torch.ones_like(coefficient)
        zeros = [[torch.zeros_like(h) for h in part] for part in products]
        self.add_penalised(grads, products, zeros, weight, coefficient, one, 0.5)

    def add_penalised(
        self,
        grads: list[list[Tensor]],
        plus: list[list[Tensor]],
        minus: list[list[Tensor]],
        weight: float | Tensor,
        coefficient: Tensor,
        squared_norm: Tensor,
        radius: float,
    ) -> None:
        """Add ``weight * (g + lambda H g)``, H g from the gradients at the shifted points.

        The gradients are gathered, and the caller counts the weight, as for :meth:`add_parts`; see
        :func:`fbopt.reference.accumulate_penalty_`.
        """
        for k, sums in enumerate(self._operands):
            device = sums[0].device
            passes = grads[k], plus[k], minus[k] if minus else []
            scale = self.scalar(weight, device)
            penalty = coefficient.to(device), squared_norm.to(device), radius
            if self.fixed is not None:
                self.fixed.add_penalised(k, *passes, scale, *penalty)
            else:
                dispatch.accumulate_penalty_(sums, *passes, scale, *penalty)

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
        if not self._is_mean and self.fixed is not None and not self._settle_exact():
            self.reset()
            raise _unsettled()
        if not self._is_mean:
            self.settle(set())
        return [
            None if i in self.unseen else view if view.dtype == p.dtype else view.to(p.dtype)
            for i, (view, p) in enumerate(zip(self.sums, self.params, strict=True))
        ]

    @torch.no_grad()
    def settle(self, done: set[int]) -> None:
        """Turn the sums into means, except those that the optimizer's step has turned already."""
        if self._is_mean:
            return
        self._is_mean = True
        if self.fixed is not None:
            self.fixed.means_(self._operands, self.total_weight)
            return
        for flat, group in zip(self._flat, self.buckets.indices, strict=True):
            weight = self.scalar(self.total_weight, flat.device).to(flat.dtype)
            left = [i for i in group if i not in done]
            for tensor in [flat] if len(left) == len(group) else [self.sums[i] for i in left]:
                tensor.div_(weight)

    def all_reduce_(self, collectives: Collectives) -> None:
        """Replace the sums by those of all processes; the caller counts weights and ``unseen``."""
        if self.fixed is not None:
            self.fixed.all_reduce_(collectives)
        else:
            collectives.all_reduce_(self._flat)

    def state_dict(self) -> dict[str, Any]:
        """Return the units of exact sums: the bits of the next mean depend on them."""
        return {} if self.fixed is None else {"exponents": self.fixed.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`, and start over as :meth:`reset` does."""
        self._exponents = state.get("exponents", ())
        if self.fixed is not None:
            self.fixed.load_state_dict(self._exponents)
        self.reset()

    def successor(self, params: Iterable[Tensor]) -> GradientAccumulator:
        """Return an accumulator for other parameters, which keeps a loaded state that fits them."""
        new = GradientAccumulator(params, self.accumulation)
        new.load_state_dict({"exponents": self._exponents})
        return new

    def has_grad(self, index: int) -> bool:
        """Whether any gradient was added for this parameter."""
        return index not in self.unseen

    def divisor(self, device: torch.device) -> Tensor | None:
        """The weight that the sums still have to be divided by, a 0-dim tensor; None for means."""
        return None if self._is_mean else self.scalar(self.total_weight, device)

    def scalar(self, value: float | Tensor, device: torch.device) -> Tensor:
        """A 0-dim float64 tensor; chunks come in few sizes, so that most are made once."""
        if isinstance(value, Tensor):
            return value.to(device)
        if len(self._scalars) > 64:
            self._scalars.clear()
        key = (value, device)
        if key not in self._scalars:
            self._scalars[key] = torch.full((), value, dtype=torch.float64, device=device)
        return self._scalars[key]


def _unsettled() -> RuntimeError:
    """Return the error for exact sums whose units do not fit."""
    return RuntimeError(
        'the units of accumulation="exact" did not fit the size of the gradients, and are adapted '
        "now: add all gradients once more, as `for _ in accumulator.passes():` does by itself; "
        "where that does not help, the gradients change from one pass to the next (random draws "
        "without a seed)"
    )
