"""What an observer sees of chunks that are worked on in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class InOrder:
    """Calls an observer in the order of the chunks, of which groups may hold every other one.

    Args:
        observe: the observer.
        size: K: all chunks of a group have the same index divided by it.
    """

    def __init__(self, observe: Callable[..., None], size: int) -> None:
        self._observe, self._size = observe, size
        self._indices: Iterator[int] = iter(())
        self._shown: dict[int, tuple[Any, ...]] = {}
        self._number = 0

    def begin(self, indices: Sequence[int]) -> None:
        """Begin a group with chunks of these indices."""
        if indices[0] // self._size != self._number:
            self.end()
            self._number = indices[0] // self._size
        self._indices = iter(indices)

    def __call__(self, *shown: Any) -> None:
        """Keep what is shown of the group's next chunk."""
        self._shown[next(self._indices)] = shown

    def end(self) -> None:
        """Call the observer for what is kept."""
        shown, self._shown = self._shown, {}
        for index in sorted(shown):
            self._observe(*shown[index])


def ignore(*shown: Any) -> None:
    """Observe nothing, in the same CUDA graphs as an observer."""
