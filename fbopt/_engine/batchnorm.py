"""Running statistics of normalisation layers: means over a step's chunks, for each layer over those
that ran it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fbopt._ops import dispatch
from fbopt._ops.fixed_point import FixedPoint
from fbopt._ops.flat import accumulator_dtype, by_device_and_dtype

if TYPE_CHECKING:
    from fbopt._distributed import Collectives


class RunningStatistics:
    """Running statistics that are the weighted mean over all chunks of a step.

    While :meth:`averaging` is on, every normalisation layer in training mode records with momentum
    1, so that after a pass its running statistics are that chunk's own; :meth:`record` adds them
    up, and :meth:`commit` writes the mean, for each layer over the chunks that ran it. Layers in
    eval mode, and those that no chunk ran, are left alone.

    Args:
        model: whose layers these are.
        exact: keep the sums in fixed point.

    Attributes:
        sums: the sums of all layers, in float64; none if they are kept in fixed point.
        fixed: the sums in fixed point of the layers in training mode, None without.
        weights: for each device the weights of the chunks that ran its layers, 1-D, float64.
    """

    def __init__(self, model: torch.nn.Module, exact: bool = False) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, _NormBase)]
        self._exact = exact
        self._running: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.fixed: FixedPoint | None = None
        self._wide: list[Tensor] = []
        self._active: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        self._exponents: Sequence[int] = ()
        self._counters: list[_Counter] = []

    @property
    def weights(self) -> list[Tensor]:
        """See above."""
        return [counter.weights for counter in self._counters]

    @property
    def kept(self) -> object:
        """Another object when the sums have moved to another place in memory."""
        return self.fixed if self._exact else self.sums

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        """Let the layers in training mode record each pass alone."""
        layers = [m for m in self._layers if m.running_mean is not None]
        active = [m for m in layers if m.training]
        momenta = [m.momentum for m in active]
        self._begin([t for m in layers for t in (m.running_mean, m.running_var)])
        self._count(active)
        self._choose([i for k, m in enumerate(layers) if m.training for i in (2 * k, 2 * k + 1)])
        try:
            for m in active:
                m.momentum = 1.0
            yield
        finally:
            for m, momentum in zip(active, momenta, strict=True):
                m.momentum = momentum

    def _begin(self, running: list[Tensor]) -> None:
        if [id(t) for t in running] != [id(t) for t in self._running]:
            self._running = running
            self._wide = [torch.empty_like(t, dtype=self._wide_dtype(t)) for t in running]
            self.sums = [] if self._exact else [torch.zeros_like(t) for t in self._wide]
        elif self.sums:
            torch._foreach_zero_(self.sums)

    def _wide_dtype(self, tensor: Tensor) -> torch.dtype:
        return accumulator_dtype(tensor.dtype) if self._exact else torch.float64

    def _count(self, active: list[_NormBase]) -> None:
        """Note what the layers in training mode hold, and which runs they have counted."""
        by_device: dict[torch.device, list[_NormBase]] = {}
        for m in active:
            by_device.setdefault(m.running_mean.device, []).append(m)
        if [c.layers for c in self._counters] != list(by_device.values()):
            self._counters = [_Counter(layers) for layers in by_device.values()]
        for counter in self._counters:
            counter.begin()

    def _choose(self, indices: list[int]) -> None:
        """Keep sums and statistics of the layers in training mode, by device and dtype."""
        before = [[id(t) for t in running] for _, _, running in self._active]
        self._active = []
        for group in by_device_and_dtype([self._running[i] for i in indices]):
            chosen = [indices[k] for k in group]
            lists = (self.sums or self._running, self._wide, self._running)
            self._active.append(tuple([x[i] for i in chosen] for x in lists))
        if not self._exact or not indices:
            return
        if self.fixed is None or before != [[id(t) for t in now] for _, _, now in self._active]:
            self._exponents = self.state_dict()
            self.fixed = FixedPoint([running for _, _, running in self._active])
            self.fixed.load_state_dict(self._exponents)
        self.fixed.reset()

    def clear(self) -> None:
        """Make ready for a chunk: a layer that it does not run has nothing to add.

        With momentum 1 the old value enters times zero, which NaN would survive.
        """
        for _, _, running in self._active:
            torch._foreach_zero_(running)

    def record(self, weight: Callable[[torch.device], Tensor]) -> None:
        """Add the statistics of the pass that has just been made.

        Args:
            weight: returns the chunk's weight on a device, 0-dim.
        """
        for k, (sums, wide, running) in enumerate(self._active):
            scale = weight(running[0].device)
            if self._exact:
                self.fixed.add(k, running, scale)
            else:
                torch._foreach_copy_(wide, running)
                dispatch.accumulate_(sums, wide, scale)
        for counter in self._counters:
            counter.record(weight(counter.weights.device))

    @property
    def width(self) -> int:
        """The length of :meth:`maxima`, the same whichever layers are in training mode."""
        return 2 * sum(m.running_mean is not None for m in self._layers) if self._exact else 0

    def maxima(self) -> Tensor:
        """Return the largest contributions (:meth:`FixedPoint.maxima`) and zeros: 1-D, float64."""
        found = self.fixed.maxima() if self._active else torch.zeros(0, dtype=torch.float64)
        return torch.nn.functional.pad(found, (0, self.width - len(found)))

    def fit(self, maxima: Tensor, additions: int) -> bool:
        """See :meth:`FixedPoint.fit`."""
        return not self._active or self.fixed.fit(maxima[: len(self.fixed)], additions)

    def all_reduce_(self, collectives: Collectives) -> None:
        """Replace exact sums by those of all processes."""
        if self._exact and self._active:
            self.fixed.all_reduce_(collectives)

    def commit(self, total_weight: float) -> None:
        """Write the means over all passes recorded."""
        if self._exact and self._active:
            self.fixed.means_([wide for _, wide, _ in self._active], total_weight)
        for sums, wide, running in self._active:
            if not self._exact:
                torch._foreach_div_(sums, total_weight)
            torch._foreach_copy_(running, wide if self._exact else sums)
        for counter in self._counters:
            counter.commit(total_weight)

    def state_dict(self) -> list[int]:
        """See :meth:`FixedPoint.state_dict`."""
        return list(self._exponents) if self.fixed is None else self.fixed.state_dict()

    def load_state_dict(self, exponents: Sequence[int]) -> None:
        """See :meth:`FixedPoint.load_state_dict`; kept until there are sums."""
        self._exponents = exponents
        if self.fixed is not None:
            self.fixed.load_state_dict(exponents)


class _Counter:
    """Which chunks ran which normalisation layers of a device, without asking the device."""

    def __init__(self, layers: list[_NormBase]) -> None:
        self.layers, device = layers, layers[0].running_mean.device
        # Others than BatchNorm do not count their passes: they are taken to run in every chunk.
        always = [not isinstance(m, _BatchNorm) or m.num_batches_tracked is None for m in layers]
        self._always = torch.tensor(always, device=device)
        self._before = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self.weights = torch.zeros(len(layers), dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Begin a step."""
        self._running = [t for m in self.layers for t in (m.running_mean, m.running_var)]
        self._old = [t.clone() for t in self._running]
        self._before.copy_(self._now())
        self.weights.zero_()

    def _now(self) -> Tensor:
        counts = [m.num_batches_tracked for m in self.layers]
        none = torch.zeros_like(self._before[0])
        return torch.stack([none if c is None else c for c in counts])

    def record(self, weight: Tensor) -> None:
        """Add the weight of a chunk to those of the layers that it ran."""
        now = self._now()
        self.weights.add_(((now != self._before) | self._always) * weight)
        self._before.copy_(now)

    def commit(self, total_weight: float) -> None:
        """Turn means over all chunks, in the running statistics, into those over a layer's own."""
        ratios = total_weight / self.weights  # one, where every chunk ran the layer
        for k, (now, old) in enumerate(zip(self._running, self._old, strict=True)):
            ratio = ratios[k // 2]
            now.copy_(torch.where(ratio.isfinite(), now * ratio.to(now.dtype), old))
