"""Running statistics of normalisation layers: after a step the mean sum_c w_c s_c / sum_c w_c, for
each layer over the chunks c that ran it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fbopt._ops.flat import by_device_and_dtype, flat_size, flat_views
from fbopt._ops.sums import make_sums
from fbopt._sharding import any_sharded

if TYPE_CHECKING:
    from fbopt._distributed import Collectives


RECORDED = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """Running statistics that are the weighted mean over all chunks of a step.

    While :meth:`averaging` is on, every normalisation layer in training mode records with momentum
    1, so that after a pass its running statistics are that chunk's own; :meth:`record` adds them
    up, and :meth:`commit` writes the mean, for each layer over the chunks that ran it. Layers in
    eval mode, and those that no chunk ran, are left alone.

    Args:
        model: whose layers these are.
        accumulation: how the sums are kept, ``"float32"`` (here in float64) or ``"exact"``.

    Attributes:
        store: the strategy that keeps the sums.
        means: the memory of the sums; a new list once they have moved.
    """

    def __init__(self, model: torch.nn.Module, accumulation: str = "float32") -> None:
        self.follow(model.modules())
        self._accumulation = accumulation
        self._forget()

    def follow(self, modules: Iterable[torch.nn.Module]) -> None:
        """Note the layers, which may be others than before; refuse DTensors as statistics."""
        self._layers = [m for m in modules if isinstance(m, _NormBase)]
        if any_sharded([b for m in self._layers for b in m._buffers.values()]):
            raise TypeError(
                "the running statistics of a normalisation layer are DTensors (distribute_module?)"
                ", which are not averaged over chunks: leave its buffers plain tensors"
            )

    def _forget(self) -> None:
        self.store = make_sums(self._accumulation)
        self._running: list[Tensor] = []
        self._lists: list[list[Tensor]] = []  # the running statistics by device and dtype
        self._wide: list[list[Tensor]] = []  # their copies in float64
        self.means: list[list[Tensor]] = []
        self._active: list[tuple[list[Tensor], list[Tensor]]] = []
        self._counters: list[_Counter] = []
        self._passes: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the layers and the units of exact sums: the rest is made anew in every call."""
        state = {name: vars(self)[name] for name in ("_layers", "_accumulation")}
        return state | {"units": self.store.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        units = state.pop("units")
        vars(self).update(state)
        self._forget()
        self.store.load_state_dict(units)

    @property
    def modes(self) -> str:
        """E for each layer in eval mode, T for each one in training mode."""
        return "".join("ET"[m.training] for m in self._layers)

    def averaging(self) -> contextlib.AbstractContextManager[None]:
        """A context that makes layers in training mode record each pass by itself."""
        return self._averaging() if self._layers or self._running else contextlib.nullcontext()

    @contextlib.contextmanager
    def _averaging(self) -> Iterator[None]:
        layers = [m for m in self._layers if m.running_mean is not None]
        active = [m for m in layers if m.training]
        momenta = [m.momentum for m in active]
        self._begin(layers)
        self._choose({id(t) for m in active for t in (m.running_mean, m.running_var)})
        if self._active:
            for counter in self._counters:
                counter.begin()
        try:
            for m in active:
                m.momentum = 1.0
            yield
        finally:
            for m, momentum in zip(active, momenta, strict=True):
                m.momentum = momentum

    def _begin(self, layers: list[_NormBase]) -> None:
        running = [t for m in layers for t in (m.running_mean, m.running_var)]
        if [id(t) for t in running] != [id(t) for t in self._running]:
            self._running = running
            self._lists = [[running[i] for i in group] for group in by_device_and_dtype(running)]
            self._wide = [
                [torch.empty_like(t, dtype=torch.float64) for t in part] for part in self._lists
            ]
            flats = [wide[0].new_zeros(flat_size(wide)) for wide in self._wide]
            self.means = [
                flat_views(flat, wide) for flat, wide in zip(flats, self._wide, strict=True)
            ]
            self.store.allocate(self.means, flats)
            # For all layers: a CUDA graph keeps using this memory when modes change.
            groups = by_device_and_dtype([m.running_mean for m in layers])
            self._counters = [_Counter([layers[i] for i in group]) for group in groups]
        self.store.zero_()

    def _choose(self, wanted: set[int]) -> None:
        """Note which statistics are to be written: those of layers in training mode."""
        self._active = []
        for running, means in zip(self._lists, self.means, strict=True):
            chosen = [i for i, t in enumerate(running) if id(t) in wanted]
            if chosen:
                self._active.append(([running[i] for i in chosen], [means[i] for i in chosen]))

    def clear(self) -> None:
        """Zero the running statistics before a pass that is recorded.

        With momentum 1 the old value is multiplied by zero, but zero times NaN is NaN.
        """
        for running, _ in self._active:
            torch._foreach_zero_(running)

    def record(self, weight: Callable[[torch.device], Tensor]) -> None:
        """Add the statistics of the pass that has just been made.

        Args:
            weight: returns the chunk's weight on a device, 0-dim.
        """
        if not self._active:
            return
        for k, (running, wide) in enumerate(zip(self._lists, self._wide, strict=True)):
            torch._foreach_copy_(wide, running)
            self.store.add(k, wide, weight(wide[0].device))
        for counter in self._counters:
            counter.record(weight(counter.weights.device))

    @property
    def recorded(self) -> list[tuple[_NormBase, str]]:
        """The buffers that a pass is recorded in: a layer and the name of its buffer."""
        layers = [m for m in self._layers if m.running_mean is not None and m.training]
        return [(m, name) for m in layers for name in RECORDED if m._buffers[name] is not None]

    def record_stacks(self, stacks: Mapping[int, Tensor], weights: Tensor) -> None:
        """Add the statistics of K passes at once.

        Args:
            stacks: for the id of each buffer in `recorded` its values after each pass, (K, ...).
            weights: of the chunks, (K,).
        """
        if not self._active:
            return
        for k, running in enumerate(self._lists):
            found = [stacks.get(id(t), t.expand(len(weights), *t.shape)) for t in running]
            device = running[0].device
            self.store.add(k, [t.to(torch.float64) for t in found], weights.to(device))
        for count in self._counts():
            if id(count) in stacks:
                count += (stacks[id(count)] - count).sum()
        for counter in self._counters:
            counter.record(weights.to(counter.weights.device).sum())

    def count_passes(self) -> None:
        """Note how many passes the layers have counted, for :meth:`all_reduce_`."""
        self._passes = [count.clone() for count in self._counts()]

    def all_reduce_(self, collectives: Collectives) -> None:
        """Replace sums, weights and the layers' counts of passes by those of all processes."""
        if collectives.is_single or not self._layers:
            return
        counts = self._counts()
        new = [now - before for now, before in zip(counts, self._passes, strict=True)]
        self.store.all_reduce_(collectives, [*(c.weights for c in self._counters), *new])
        for count, before, passes in zip(counts, self._passes, new, strict=True):
            count.copy_(before + passes)

    def _counts(self) -> list[Tensor]:
        found = (m.num_batches_tracked for m in self._layers)
        return [count for count in found if count is not None]

    def commit(self, total_weight: float) -> None:
        """Write the means over all passes recorded."""
        if not self._active:
            return
        self.store.mean_(total_weight)
        for running, means in self._active:
            torch._foreach_copy_(running, means)
        for counter in self._counters:
            counter.commit(total_weight)


class _Counter:
    """Counts on one device which chunks ran which normalisation layers, without a host sync."""

    def __init__(self, layers: list[_NormBase]) -> None:
        self.layers, device = layers, layers[0].running_mean.device
        # Layers other than BatchNorm count no passes: they are assumed to run in every chunk.
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
        """Turn each layer's mean over all chunks into its mean over the chunks that ran it."""
        ratios = total_weight / self.weights  # one, where every chunk ran the layer
        for k, (now, old) in enumerate(zip(self._running, self._old, strict=True)):
            ratio = ratios[k // 2]
            now.copy_(torch.where(ratio.isfinite(), now * ratio.to(now.dtype), old))
