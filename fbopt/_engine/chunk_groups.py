"""Groups of chunks that are worked on at once, and their tensors with a leading dimension K.

Of the chunks whose index divided by K is the same, those of one kind form a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fbopt._engine.kinds import describe

Weighed = tuple[int, Any, float]


class Template(NamedTuple):
    """What a chunk is besides its tensors, in which None stands for them; equal for equal ones."""

    structure: Hashable
    leaves: tuple[Any, ...]
    places: tuple[int, ...]

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """The chunk with these tensors."""
        if not isinstance(self.structure, TreeSpec):
            return self.structure(tensors)
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


class Stack(NamedTuple):
    """The tensors of K chunks: (K, ...) where `dims` is 0, one for all chunks where it is None."""

    tensors: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    template: Template


@dataclass
class Group:
    """Chunks of one kind, in order of their indices."""

    kind: Hashable
    template: Template
    indices: list[int] = field(default_factory=list)
    chunks: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tensors: list[Sequence[Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def members(self) -> list[Weighed]:
        """Each chunk with its index and weight."""
        return list(zip(self.indices, self.chunks, self.weights, strict=True))

    @property
    def where(self) -> str:
        """The chunks as an error names them."""
        first, last = self.indices[0], self.indices[-1]
        return f"chunk {first}" if first == last else f"chunks {first} to {last}"

    def stack(self) -> Stack:
        """The tensors of all chunks with a leading dimension; of a single one as they are."""
        columns = list(zip(*self.tensors, strict=True))
        tensors = [stacked(column) for column in columns]
        dims = [None if t is c[0] else 0 for t, c in zip(tensors, columns, strict=True)]
        if len(self) > 1 and tensors and not any(dim == 0 for dim in dims):  # all chunks are one
            tensors[0], dims[0] = tensors[0].expand(len(self), *tensors[0].shape), 0
        return Stack(tuple(tensors), tuple(dims), self.template)


def grouped(chunks: Iterable[Weighed], size: int) -> Iterator[Group]:
    """Yield groups of at most `size` chunks, whose indices divided by `size` are the same."""
    window: dict[Hashable, Group] = {}
    number = 0
    for index, chunk, weight in chunks:
        if index // size != number:
            yield from window.values()
            window, number = {}, index // size
        kind, tensors, template = _taken_apart(index, chunk, size)
        group = window.get(kind)
        if group is None:
            group = window[kind] = Group(kind, template)
        group.indices.append(index)
        group.chunks.append(chunk)
        group.weights.append(weight)
        group.tensors.append(tensors)
    yield from window.values()


def _taken_apart(index: int, chunk: Any, size: int) -> tuple[Hashable, Sequence[Tensor], Template]:
    """A chunk's kind, its tensors, and the rest."""
    option = f"vectorize={size}", "vectorize=1"
    if type(chunk) in (tuple, list) and all(type(t) is Tensor for t in chunk):  # most chunks
        template = Template(type(chunk), (), ())
        return (type(chunk), *(_kind(index, t, option) for t in chunk)), chunk, template
    leaves, structure = tree_flatten(chunk)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    kind = structure, *(_kind(index, leaf, option) for leaf in leaves)
    return kind, [leaves[i] for i in places], Template(structure, rest, places)


def _kind(index: int, leaf: Any, option: tuple[str, str]) -> Hashable:
    kind = describe(index, leaf, *option)
    return (kind, leaf.device) if isinstance(leaf, Tensor) else kind


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one kind with a leading dimension, or the tensor itself where all are the same.

    Consecutive slices of one tensor are not copied.
    """
    first = tensors[0]
    step = _step(tensors)
    if step == 0:
        return first
    if step is None:
        return torch.stack([t.detach() for t in tensors])
    size, stride = (len(tensors), *first.shape), (step, *first.stride())
    return first.detach().as_strided(size, stride, first.storage_offset())


def _step(tensors: Sequence[Tensor]) -> int | None:
    """How many elements of one storage lie between one tensor and the next, if it is constant."""
    first = tensors[0]
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return None
    storage = first.untyped_storage().data_ptr()
    if any(t.untyped_storage().data_ptr() != storage for t in tensors):
        return None
    starts = [t.storage_offset() for t in tensors]
    steps = {b - a for a, b in itertools.pairwise(starts)} or {0}
    step = steps.pop()
    return None if steps or step < 0 else step
