"""A chunk of a group by itself, and whether it gives the same together with the others."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fbopt._engine.chunk import ChunkGradient, Observe
from fbopt._engine.chunk_groups import Group, Stack
from fbopt._engine.functional import Passes
from fbopt._engine.rounding import Comparison, Found
from fbopt._engine.shared_state import SharedState
from fbopt._engine.snapshot import GeneratorSnapshot


@dataclass(frozen=True)
class Visit:
    """A group at work, its stack, and the random generators; in a capture others than torch's."""

    group: Group
    stack: Stack
    draws: GeneratorSnapshot

    @property
    def is_captured(self) -> bool:
        """Whether nothing may be read, nor Python code be run for anything but its passes."""
        return not isinstance(self.draws, GeneratorSnapshot)

    @property
    def longest_sum(self) -> int:
        """How many numbers a sum over the samples and places of a chunk has: n, or n·height·width.

        Deeper layers of a network have fewer places.
        """
        leaves = [t for t in tree_leaves(self.stack.chunk(0)) if isinstance(t, Tensor)]
        counts = [t.numel() // (t.shape[1] if t.ndim > 2 else 1) for t in leaves if t.numel()]
        return max(counts, default=1)

    @property
    def kind(self) -> Hashable:
        """What functions of passes depend on."""
        return self.group.kind, self.stack.dims


@dataclass(frozen=True)
class Kind:
    """What all groups of a kind of chunks have in common.

    Attributes:
        seen: the indices of the parameters that get a gradient.
        shown: the structure of what the loss function shows besides the loss; None if nobody looks.
        places: where in it the tensors are.
    """

    seen: frozenset[int]
    shown: TreeSpec | None = None
    places: tuple[int, ...] = ()

    def shown_by(self, stack: Stack, passes: Passes, evaluates: bool) -> Iterator[tuple[Any, Any]]:
        """For each chunk what ``observe`` is called with."""
        for k in range(stack.count):
            leaves: list[Any] = [None] * self.shown.num_leaves
            for place, shown in zip(self.places, passes.shown, strict=True):
                leaves[place] = shown[k].detach()
            chunk = tree_map_only(Tensor, Tensor.detach, stack.chunk(k))
            yield tree_unflatten(leaves, self.shown), chunk if evaluates else chunk[1]


class Probe:
    """One chunk of a group by itself, at the values that the parameters have now.

    Buffers and random generators are afterwards as before; the generators begin where `draws` does.

    Args:
        work: what is done with one chunk.
        visit: the group.
        state: what chunks share.
        place: which chunk of the group.
        observed: whether somebody looks at what the loss shows.

    Attributes:
        has_drawn: whether random numbers were drawn.

    Raises:
        RuntimeError: the model writes to buffers that chunks would share, or draws numbers from
            elsewhere than from torch's generators.
    """

    def __init__(
        self,
        work: ChunkGradient,
        visit: Visit,
        state: SharedState,
        place: int = 0,
        observed: bool = False,
    ) -> None:
        self._work, self._visit, self._state, self._place = work, visit, state, place
        self._shown: list[Any] = []
        self._observe: Observe = (lambda *found: self._shown.append(found[0])) if observed else None
        names = parameter_names(work)
        self._comparison = Comparison(self._run, work.sums.params, names, visit.longest_sum)

    def _run(self) -> Found:
        work, (group, draws), k = self._work, (self._visit.group, self._visit.draws), self._place
        given = group.indices[k], self._visit.stack.chunk(k), group.weights[k]
        self._state.drop_leftovers()
        others = _drawn_elsewhere()
        with work.in_passing(draws) as rewind:
            rewind()
            before = self._state.buffers()
            found = work.probe(*given, draws, self._observe)
            self._state.refuse_writes(before)
            self.has_drawn = draws.has_moved()
        if _drawn_elsewhere() != others:
            raise RuntimeError(
                "the model or the loss draws from Python's or NumPy's random numbers, of which "
                "chunks that are worked on at once would get the same: draw from torch's, or pass "
                "vectorize=1 and compile=False"
            )
        return found

    def kind(self) -> Kind:
        """What is known of the group's kind.

        Raises:
            TypeError: what is observed is no tensor.
        """
        grads = self._comparison.expected.grads
        seen = frozenset(i for i, g in enumerate(grads) if g is not None)
        return Kind(seen, *_structure(self._visit, self._shown[0])) if self._shown else Kind(seen)

    def compare(self, passes: Passes) -> None:
        """Raise RuntimeError if the chunk together with others gives something else.

        Where numbers are drawn, which are others then, only gradients that do not depend on the
        chunk are looked at: such ones are zero where none reaches the parameter.
        """
        k, expected = self._place, self._comparison.expected
        if not self.has_drawn:
            vectors = [g[k] for g in passes.grads], [h[k] for h in passes.products]
            self._require_same(Found(passes.loss[k], *vectors))
            return
        pairs = zip(passes.grads, expected.grads, parameter_names(self._work), strict=True)
        for grads, wanted, name in pairs:
            if _is_lost(grads, wanted):
                raise self._differs(f"no gradient reaches {name}")

    def compare_loss(self, loss: Tensor) -> None:
        """Raise RuntimeError if this is another loss than the chunk's was before."""
        if not self.has_drawn:
            self._require_same(self._comparison.expected._replace(loss=loss.detach()))

    def _require_same(self, found: Found) -> None:
        how = self._comparison.difference(found)
        if how is not None:
            raise self._differs(how)

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"chunk {self._visit.group.indices[self._place]} gives something else together with "
            f"others than by itself: {how}; the model, the loss or a layer does not compute each "
            "chunk on its own under torch.func (recurrent layers, caches, custom functions, random "
            "numbers that are not from torch's generators): pass vectorize=1 and compile=False"
        )


def parameter_names(work: ChunkGradient) -> list[str]:
    """The names of the parameters that gradients are by."""
    names = {id(p): name for name, p in work.forward.model.named_parameters()}
    return [names.get(id(p), "unnamed") for p in work.sums.params]


def _is_lost(grads: Tensor, wanted: Tensor | None) -> bool:
    """Whether K gradients are the zeros that vmap repeats where a parameter is not used."""
    repeated = len(grads) > 1 and grads.stride(0) == 0
    return bool(repeated and wanted is not None and wanted.any() and not grads[0].any())


def _drawn_elsewhere() -> tuple[Any, ...]:
    """The states of random generators that torch.func knows nothing of."""
    _, numbers, position, *_ = np.random.get_state()
    return random.getstate(), np.asarray(numbers).tobytes(), position


def _structure(visit: Visit, shown: Any) -> tuple[TreeSpec, tuple[int, ...]]:
    leaves, structure = tree_flatten(shown)
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and leaf is not None:
            raise TypeError(
                f"what is observed of chunk {visit.group.indices[0]} holds a {type(leaf).__name__}:"
                " with vectorize= or compile= an output, or aux of evaluate, is made of tensors "
                "alone; take it from the chunk in observe, or pass vectorize=1 and compile=False"
            )
    return structure, tuple(i for i, leaf in enumerate(leaves) if leaf is not None)
