"""The groups of a list of chunks, kept for the next call: to weigh and to group a hundred small
chunks takes as long as a small model's passes over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fbopt._engine.chunk_groups import Group, Stack
from fbopt._engine.weights import Mean


class KnownGroups:
    """Groups whose stacks are views of the chunks' own memory on the CPU, and their weights.

    They are right as long as the same tensors lie in the same places, and as long as no target that
    was counted is ignored now: both are looked at in every call.
    """

    def __init__(self) -> None:
        self._facts: list[Any] | None = None
        self._groups: list[tuple[Group, Stack]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: the next call finds the groups anew."""
        return KnownGroups, ()

    def forget(self) -> None:
        """Free the groups, and the chunks that they hold."""
        self._facts, self._groups = None, []

    def find(self, chunks: Any, size: int, mean: Mean | None) -> list[tuple[Group, Stack]] | None:
        """Return the groups of the last call if they are those of these chunks, None if not."""
        if self._facts is None or self._facts != _facts(chunks, size, mean):
            self.forget()
            return None
        whole = all(_counts_whole(stack, mean) for _, stack in self._groups)
        return self._groups if whole else None

    def keep(
        self, groups: Iterable[Group], chunks: Any, size: int, mean: Mean | None
    ) -> Iterator[tuple[Group, Stack]]:
        """Yield each group and its stack, and keep them if the next call may use them."""
        facts, found, count = _facts(chunks, size, mean), list[tuple[Group, Stack]](), 0
        for group in groups:
            stack = group.stack()
            yield group, stack
            found.append((group, stack))
            count += len(group)
            if facts is not None and not (_is_view(group, stack) and _counts_whole(stack, mean)):
                facts = None
        if facts is not None and count == len(chunks):  # none of weight 0 was left out
            self._facts, self._groups = facts, found


def _is_view(group: Group, stack: Stack) -> bool:
    pairs = zip(stack.tensors, group.tensors[0], strict=True)
    return all(t.data_ptr() == own.data_ptr() for t, own in pairs)


def _counts_whole(stack: Stack, mean: Mean | None) -> bool:
    """Whether all targets count, where targets are counted."""
    if mean is None or mean.by_element or len(stack.tensors) != 2:
        return True
    target = stack.tensors[1]
    return target.is_floating_point() or target.min().item() > mean.ignored


def _facts(chunks: Any, size: int, mean: Mean | None) -> list[Any] | None:
    """What the groups of chunks depend on; None where they depend on more."""
    if type(chunks) not in (list, tuple) or (mean is not None and mean.class_weights is not None):
        return None
    found: list[Any] = [size, mean]
    for chunk in chunks:
        if type(chunk) not in (list, tuple):
            return None
        found.append(len(chunk))
        for t in chunk:
            if type(t) is not Tensor or not t.is_cpu:
                return None
            found.append((id(t), t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad))
    return found
