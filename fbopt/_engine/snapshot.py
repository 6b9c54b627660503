"""Snapshots of what a pass over a chunk changes besides the gradient: the model's buffers and the
states of random generators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fbopt._ops.flat import by_device_and_dtype, overlaps_itself
from fbopt._random import default_generators
from fbopt._sharding import locals_of


class BufferSnapshot:
    """A copy of a model's buffers; restores their values, and tensors that were replaced."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.follow(model.modules())
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: list[Tensor] = []
        self._groups: list[list[int]] = []

    def follow(self, modules: Iterable[torch.nn.Module]) -> None:
        """Note which modules may have buffers, which may be others than before."""
        self._modules = [m for m in modules if m._buffers]

    def save(self) -> None:
        """Copy all buffers."""
        if not self._modules:
            return
        self._places = [
            (m._buffers, name, b)
            for m in self._modules
            for name, b in m._buffers.items()
            if b is not None and not overlaps_itself(b)  # which cannot be written to
        ]
        now = locals_of([b for _, _, b in self._places])
        fits = len(now) == len(self._copies) and all(
            b.shape == c.shape and b.dtype == c.dtype and b.device == c.device
            for b, c in zip(now, self._copies, strict=True)
        )
        if not fits:
            self._copies = [torch.empty_like(b) for b in now]
            self._groups = by_device_and_dtype(now)
        self._copy(self._copies, now)

    def restore(self) -> None:
        """Put back what :meth:`save` copied."""
        for table, name, b in self._places:
            table[name] = b
        if self._places:
            self._copy(locals_of([b for _, _, b in self._places]), self._copies)

    @torch.no_grad()
    def _copy(self, to: list[Tensor], source: list[Tensor]) -> None:
        # By device and dtype: a mixed list would be copied one by one.
        for group in self._groups:
            torch._foreach_copy_([to[i] for i in group], [source[i] for i in group])


class GeneratorSnapshot:
    """The states of torch's default generators, of the CPU and of the devices of a model."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._generators = default_generators(devices)

    def begin(self) -> None:
        """Save the states from which :meth:`rewind` repeats the draws."""
        self._start = self._get()

    def rewind(self) -> None:
        """Go back to the states that :meth:`begin` saved."""
        self._set(self._start)

    def has_moved(self) -> bool:
        """Whether anything has been drawn since :meth:`begin`."""
        return not all(map(torch.equal, self._start, self._get()))

    def repeated(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A context that gives :meth:`rewind`, and restores the current states when left."""
        return _Restoring(self, self._get())

    def _get(self) -> list[Tensor]:
        return [g.get_state() for g in self._generators]

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class _Restoring:
    """Restores the states of generators; a class, as every chunk enters it: a third of the time."""

    def __init__(self, snapshot: GeneratorSnapshot, after: list[Tensor]) -> None:
        self._snapshot, self._after = snapshot, after

    def __enter__(self) -> Callable[[], None]:
        return self._snapshot.rewind

    def __exit__(self, *raised: object) -> None:
        self._snapshot._set(self._after)
