"""What a pass over a chunk leaves in the model besides the gradient, and how the closure keeps it
right: buffers and random draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fbopt._ops.flat import by_device_and_dtype, overlaps_itself


class BufferSnapshot:
    """The buffers of a model, to be saved and put back: by value, and which tensor stands where."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            m for m in model.modules() if any(b is not None for b in m._buffers.values())
        ]
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: list[Tensor] = []
        self._groups: list[list[int]] = []

    def save(self) -> None:
        """Remember all buffers as they are now."""
        if self._modules:
            self._save()

    @torch.no_grad()
    def _save(self) -> None:
        self._places = [
            (m._buffers, name, b)
            for m in self._modules
            for name, b in m._buffers.items()
            if b is not None and not overlaps_itself(b)  # nothing can write to those
        ]
        now = [b for _, _, b in self._places]
        fits = len(now) == len(self._copies) and all(
            b.shape == c.shape and b.dtype == c.dtype and b.device == c.device
            for b, c in zip(now, self._copies, strict=True)
        )
        if not fits:
            self._copies = [torch.empty_like(b) for b in now]
            self._groups = by_device_and_dtype(now)
        self._copy(self._copies, now)

    def restore(self) -> None:
        """Put back what :meth:`save` remembered."""
        for table, name, b in self._places:
            table[name] = b
        if self._places:
            with torch.no_grad():
                self._copy([b for _, _, b in self._places], self._copies)

    def _copy(self, to: list[Tensor], source: list[Tensor]) -> None:
        # By dtype: a mixed list would be copied one by one.
        for group in self._groups:
            torch._foreach_copy_([to[i] for i in group], [source[i] for i in group])


class GeneratorSnapshot:
    """The draws of torch's random generators, on the CPU and on the devices of a model."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._generators = [torch.default_generator]
        for device in devices:
            if device.type == "cuda":
                index = torch.cuda.current_device() if device.index is None else device.index
                self._generators.append(torch.cuda.default_generators[index])

    def begin(self) -> None:
        """Note where the draws of a chunk begin."""
        self._start = self._get()

    def rewind(self) -> None:
        """Go back to where :meth:`begin` was."""
        self._set(self._start)

    @contextlib.contextmanager
    def repeated(self) -> Iterator[Callable[[], None]]:
        """Give a function that goes back to where :meth:`begin` was; go on from here in the end."""
        after = self._get()
        try:
            yield self.rewind
        finally:
            self._set(after)

    def _get(self) -> list[Tensor]:
        return [g.get_state() for g in self._generators]

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
