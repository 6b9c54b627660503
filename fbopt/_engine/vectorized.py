"""What groups of chunks that are worked on at once need from call to call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from fbopt._engine.chunk import ChunkGradient
from fbopt._engine.functional import ChunkFunction
from fbopt._engine.modules import list_parts
from fbopt._engine.shared_state import SharedState
from fbopt._engine.stacked import StackedMemory
from fbopt._engine.vectorized_errors import refuse_hooks
from fbopt._engine.vectorized_gradient import Known, VectorizedGradient


class Vectorized:
    """Functions of passes and what is known of groups, by settings; buffers for points."""

    def __init__(self) -> None:
        self._held: tuple[Any, ...] = ()
        self._known: dict[Hashable, Known] = {}
        self._memory = StackedMemory()
        self.watched: tuple[Any, int] = ((), 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: every call can make it anew."""
        return Vectorized, ()

    def is_new(self, chunks: Any, size: int) -> bool:
        """Whether chunks are to be watched, in case that memory is filled again for others.

        Those of a list are not; others are until a call with groups as large is done.
        """
        known, most = self.watched
        return type(chunks) not in (list, tuple) and (known is not chunks or most < size)

    def begin(
        self, work: ChunkGradient, compiled: bool, observed: bool, alone: bool
    ) -> VectorizedGradient:
        """Return what works on groups of chunks in a call of the closure.

        Args:
            work: what is done with one chunk.
            compiled: whether passes are compiled.
            observed: whether somebody looks at what the loss shows.
            alone: whether no code of the user runs between groups.
        """
        refuse_hooks(work)
        forward, recorded = work.forward, work.statistics.recorded
        modules, _ = list_parts(forward.model)
        tables = [table for m in modules for table in (m._modules, m._parameters)]
        names = [part for table in tables for item in table.items() for part in item]
        held = work.sums.buckets, forward.model, forward.loss_fn, forward.evaluate, *names
        if [*map(id, held)] != [*map(id, self._held)]:
            self._known.clear()
            self._memory.clear()
            self._held = held
        self._memory.begin(work.sums)
        modes = tuple(m.training for m in modules)
        places = tuple((id(module), name) for module, name in recorded)
        direction = work.penalty.direction if work.is_exact else None
        settings = forward.autocast, forward.is_observed, direction, compiled, observed
        key = places, modes, *settings
        if key not in self._known:
            options = {"direction": direction, "shows": observed, "compiled": compiled}
            function = ChunkFunction(forward, work.sums.params, recorded, **options)
            self._known[key] = Known(function)
        self._known[key].function.begin(alone)
        state = SharedState(forward.model, modules, recorded)
        return VectorizedGradient(work, self._memory, state, self._known[key])
