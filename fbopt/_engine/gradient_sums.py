"""The sum of a step's gradients, sum_c w_c g_c over chunks, that closure, optimizer and
GradientAccumulator share: in flat buffers by device and dtype, in floating point or as integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_params
from fbopt._ops import dispatch
from fbopt._ops.buckets import FlatBuckets
from fbopt._ops.sums import FloatSums, make_sums
from fbopt._sharding import any_sharded, groups_of, local, placed_as, sharded_as

# The most passes until the units of exact sums fit; two suffice unless gradients change.
MOST_PASSES = 4
Parts = list[list[Tensor]]


class GradientSums:
    """Weighted sums of gradients, and their means.

    Gradients are added in the form that :meth:`gather` returns. The caller adds their weight to
    ``total_weight``, as a weight on the device is not read.

    Args:
        params: the parameters, each once.
        accumulation: ``"float32"`` or ``"exact"``.

    Attributes:
        params: the parameters.
        accumulation: as given.
        store: the strategy that keeps the sums.
        buckets: groups the parameters for kernels; a new object once they have changed.
        views: for each parameter its sum and later its mean: of its shape, or of that of its shard
            on this process, in the sums' dtype.
        unseen: the indices of parameters for which no gradient was added.
        total_weight: the sum of the weights.
        is_mean: whether ``views`` are means already.
    """

    def __init__(self, params: Iterable[Tensor], accumulation: str = "float32") -> None:
        self.store = make_sums(accumulation)
        self.params, self.accumulation = check_params(params), accumulation
        self._layout: list[tuple[Any, ...]] | None = None
        self._scalars: dict[tuple[float, torch.device], Tensor] = {}
        self.reset()

    def reset(self, params: Sequence[Tensor] | None = None) -> None:
        """Start over, with other parameters if given. Buffers are kept where nothing changed."""
        if params is not None and [*map(id, params)] != [*map(id, self.params)]:
            self.params = check_params(params)
        if self._describe() != self._layout:
            self.buckets = FlatBuckets(self.params)
            self._allocate()
        self.store.zero_()
        self.total_weight = 0.0
        self.unseen = set(range(len(self.params)))
        self.is_mean = False

    def _describe(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [
            (id(p), p.device, p.dtype, p.shape, p.stride()) for p in self.params
        ]
        if any_sharded(self.params):
            found += [(groups_of(p), local(p).shape) for p in self.params]
        return found

    @torch.no_grad()
    def _allocate(
        self, flats: Sequence[Tensor] = (), memory: Sequence[Sequence[Tensor]] = ()
    ) -> None:
        """Make buffers and views, or the views alone of buffers that hold sums."""
        self._flats = flats or self.buckets.buffers(wide=True)
        self.views = self.buckets.views(self._flats)
        self.parts: Parts = self.buckets.operands(self._flats, self.views)
        self.store.allocate(self.parts, self._flats, memory)
        self._layout = self._describe()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle flat buffers once, and only if they hold sums; views would come back as copies."""
        made_anew = ("store", "views", "parts", "_flats", "_layout", "_scalars")
        state = {name: value for name, value in vars(self).items() if name not in made_anew}
        state["units"] = self.store.state_dict()
        if self.total_weight:
            state["flats"] = self._flats if self._describe() == self._layout else self._relaid()
            state["memory"] = () if self.is_mean else self.store.memory
        return state

    @torch.no_grad()
    def _relaid(self) -> list[Tensor]:
        """Copy sums to flat buffers for the parameters as they lie in memory now."""
        buckets = FlatBuckets(self.params)
        flats = buckets.buffers(wide=True)
        pairs = list(zip(buckets.views(flats), self.views, strict=True))
        unfinished = self.accumulation == "exact" and not self.is_mean
        if unfinished or any(new.shape != old.shape for new, old in pairs):
            raise RuntimeError(
                "parameters have got other memory (p.data, model.to) since their gradients were "
                "added, and the sums cannot be copied with them: take mean(), or call reset(), "
                "before copying or pickling"
            )
        for new, old in pairs:
            new.copy_(old)
        return flats

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Only views are made here: torch.load may read the tensors' values later.
        flats, memory = state.pop("flats", ()), state.pop("memory", ())
        units = state.pop("units")
        vars(self).update(state)
        self._scalars, self.store = {}, make_sums(self.accumulation)
        self.store.load_state_dict(units)
        self._allocate(flats, memory)

    def gather(self, grads: Sequence[Tensor | None], slot: str = "grads") -> Parts:
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

    def add(self, parts: Parts, weight: float | Tensor) -> None:
        """Add ``weight * g``."""
        for k, part in enumerate(parts):
            self.store.add(k, part, self.scalar(weight, self.buckets.device(k)))

    def add_some(self, grads: Mapping[int, Tensor], weight: float | Tensor) -> None:
        """Add ``weight * g`` for some of the parameters, given by their indices."""
        if self.buckets.sharding is not None:
            grads = {
                i: local(placed_as(g, self.params[i], f"the gradient of parameter {i}"))
                for i, g in grads.items()
            }
        self.add_shards(grads, weight)

    def add_shards(self, grads: Mapping[int, Tensor], weight: float | Tensor) -> None:
        """:meth:`add_some` for tensors that are local already."""
        self.unseen.difference_update(grads)
        for k, group in enumerate(self.buckets.indices):
            if members := [i for i in group if i in grads]:
                scale = self.scalar(weight, self.params[group[0]].device)
                self._add_members(k, {i: grads[i] for i in members}, scale)

    def _add_members(self, part: int, grads: Mapping[int, Tensor], scale: Tensor) -> None:
        if isinstance(self.store, FloatSums):
            dispatch.accumulate_([self.views[i] for i in grads], list(grads.values()), scale)
        elif len(self.parts[part]) == len(self.buckets.indices[part]):
            place = {i: j for j, i in enumerate(self.buckets.indices[part])}
            for i, g in grads.items():
                self.store.add_one(part, place[i], g, scale)
        else:  # packed: one sum, with one unit, for all of them
            group = self.buckets.indices[part]
            like = self.buckets.locals
            whole = [grads[i] if i in grads else torch.zeros_like(like[i]) for i in group]
            self.store.add(part, self.buckets.pack(part, whole, "grads"), scale)

    def add_penalised(
        self,
        grads: Parts,
        plus: Parts,
        minus: Parts,
        weight: float | Tensor,
        coefficient: Tensor,
        squared_norm: Tensor,
        radius: float,
    ) -> None:
        """Add ``weight * (g + coefficient H g)``, H g from gradients at perturbed parameters.

        `minus` is empty for forward differences; see :func:`fbopt.reference.accumulate_penalty_`.
        """
        for k, part in enumerate(grads):
            device = self.buckets.device(k)
            passes = part, plus[k], minus[k] if minus else []
            if len(grads) > 1:  # one list has its numbers where it is
                coefficient, squared_norm = coefficient.to(device), squared_norm.to(device)
            scale = self.scalar(weight, device)
            self.store.add_penalised(k, *passes, scale, coefficient, squared_norm, radius)

    def squared_norm(self, parts: Parts) -> Tensor:
        """Return ``||g||^2`` of a gathered gradient, over all shards: 0-dim, float64."""
        return self.buckets.squared_norm(parts)

    def maxima(self) -> Tensor:
        """Return what :meth:`fit` of the store needs, over all shards."""
        return self.buckets.maxima(self.store.maxima())

    def partial(self) -> list[Tensor | None]:
        """Copies of unfinished float32 sums, None where no gradient was added."""
        return [None if i in self.unseen else v.clone() for i, v in enumerate(self.views)]

    def resume(self, partial: Sequence[Tensor | None]) -> None:
        """Go on from :meth:`partial`, of as many parameters; the caller adds the weight."""
        for i, saved in enumerate(partial):
            if saved is not None:
                self.views[i].copy_(saved)
                self.unseen.discard(i)

    def finish(self) -> None:
        """End the sum: exact sums become means, float sums are left to be divided."""
        self.is_mean = self.store.finish(self.total_weight)

    def settle(self, done: set[int] | None = None) -> None:
        """Turn sums into means, except those that the optimizer's step has divided already."""
        if self.is_mean:
            return
        self.is_mean = True
        if not done:
            self.store.mean_(self.total_weight)
            return
        for i, view in enumerate(self.views):
            if i not in done:
                view.div_(self.scalar(self.total_weight, view.device).to(view.dtype))

    def means(self) -> list[Tensor | None]:
        """For each parameter the mean in its dtype, None where no gradient was added.

        The tensors share the buffers' memory, but in half precision, where they are copies. Of
        sharded parameters they are DTensors.
        """
        self.settle()
        means = [
            None if i in self.unseen else view if view.dtype == p.dtype else view.to(p.dtype)
            for i, (view, p) in enumerate(zip(self.views, self.params, strict=True))
        ]
        if self.buckets.sharding is None:
            return means
        return [
            None if mean is None else sharded_as(p, mean)
            for mean, p in zip(means, self.params, strict=True)
        ]

    def holding(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """The indices of the tensors that lie in the sums' memory."""
        spans = [(flat.data_ptr(), flat.data_ptr() + flat.nbytes) for flat in self._flats]
        given = [(i, t) for i, t in enumerate(tensors) if t is not None]
        if self.buckets.sharding is not None:
            given = [(i, local(t)) for i, t in given]
        places = [(i, t.data_ptr()) for i, t in given]
        return [i for start, end in spans for i, place in places if start <= place < end]

    def divisor(self, device: torch.device) -> Tensor | None:
        """The weight that the sums still have to be divided by, a 0-dim tensor; None for means."""
        return None if self.is_mean else self.scalar(self.total_weight, device)

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
