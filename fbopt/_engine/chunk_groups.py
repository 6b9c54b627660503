"""Groups of chunks that are worked on at once, and their tensors with a leading dimension K.

Of the chunks whose index divided by K is the same, those of one kind form a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, register_pytree_node, tree_flatten, tree_unflatten

from fbopt._engine.kinds import describe
from fbopt._engine.refilled import Samples

Weighed = tuple[int, Any, float]


@dataclass(frozen=True)
class Template:
    """What a chunk is besides its tensors; equal for chunks of one kind.

    Attributes:
        kind: what chunks of a kind share.
        structure: tuple or list where a chunk is one of tensors alone, else of all leaves.
        leaves: numbers and other values, with None in the places of tensors.
        places: of the tensors.
        requires_grad: whether each tensor does.
    """

    kind: Hashable
    structure: Any = field(compare=False)
    leaves: tuple[Any, ...] = field(compare=False)
    places: tuple[int, ...] = field(compare=False)
    requires_grad: tuple[bool, ...] = field(compare=False)

    @classmethod
    def of(cls, kind: Hashable, chunk: Any) -> Template:
        """The template of a chunk."""
        if _is_plain(chunk):
            return cls(kind, type(chunk), (), (), tuple(t.requires_grad for t in chunk))
        leaves, structure = tree_flatten(chunk)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(kind, structure, rest, places, tuple(leaves[i].requires_grad for i in places))

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """The chunk with these tensors."""
        if not isinstance(self.structure, TreeSpec):
            return self.structure(tensors)
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


@dataclass(frozen=True, eq=False)
class Stack:
    """The tensors of K chunks: (K, ...) where `dims` is 0, one for all chunks where it is None."""

    tensors: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    count: int
    template: Template

    def chunk(self, k: int) -> Any:
        """One of the chunks."""
        pairs = zip(self.tensors, self.dims, strict=True)
        tensors = [t.detach() if dim is None else t[k] for t, dim in pairs]
        for t, requires_grad in zip(tensors, self.template.requires_grad, strict=True):
            t.requires_grad_(requires_grad)
        return self.template.fill(tensors)


register_pytree_node(
    Stack,
    lambda stack: (list(stack.tensors), (stack.dims, stack.count, stack.template)),
    lambda tensors, rest: Stack(tuple(tensors), *rest),
)


@dataclass
class Group:
    """Chunks of one kind, in order of their indices."""

    template: Template
    indices: list[int] = field(default_factory=list)
    chunks: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tensors: list[Sequence[Tensor]] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def kind(self) -> Hashable:
        """What the chunks share."""
        return self.template.kind

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
        pairs = [stacked(column) for column in zip(*self.tensors, strict=True)]
        tensors, dims = [t for t, _ in pairs], [dim for _, dim in pairs]
        if len(self) > 1 and tensors and not any(dim == 0 for dim in dims):  # all chunks are one
            tensors[0], dims[0] = tensors[0].expand(len(self), *tensors[0].shape), 0
        return Stack(tuple(tensors), tuple(dims), len(self), self.template)


def grouped(chunks: Iterable[Weighed], size: int, watched: bool = False) -> Iterator[Group]:
    """Yield groups of at most `size` chunks, whose indices divided by `size` are the same.

    A group is yielded as soon as its last chunk is there, so that random generators are in the
    state that `chunks` has left for this group, not for the next.

    Args:
        chunks: the chunks.
        size: K.
        watched: whether chunks are compared with what they were when they were fetched.
    """
    for window in _windows(chunks, size, watched):
        for group in window:
            group.samples.check(group.indices, group.tensors)
        yield from window


def _windows(chunks: Iterable[Weighed], size: int, watched: bool) -> Iterator[list[Group]]:
    window: dict[Hashable, Group] = {}
    number = 0
    for index, chunk, weight in chunks:
        if index // size != number:
            yield list(window.values())
            window, number = {}, index // size
        kind, tensors = _taken_apart(index, chunk, size)
        group = window.get(kind)
        if group is None:
            group = window[kind] = Group(Template.of(kind, chunk))
        group.indices.append(index)
        group.chunks.append(chunk)
        group.weights.append(weight)
        group.tensors.append(tensors)
        if watched and size > 1:
            group.samples.keep(tensors)
        if index % size == size - 1:
            yield list(window.values())
            window = {}
    yield list(window.values())


def _is_plain(chunk: Any) -> bool:
    """Whether a chunk is a tuple or list of plain tensors, as most are."""
    return type(chunk) in (tuple, list) and bool(chunk) and all(type(t) is Tensor for t in chunk)


def _taken_apart(index: int, chunk: Any, size: int) -> tuple[Hashable, Sequence[Tensor]]:
    """A chunk's kind and its tensors."""
    option = f"vectorize={size}", "vectorize=1"
    if _is_plain(chunk):
        return (type(chunk), *(_kind(index, t, option) for t in chunk)), chunk
    leaves, structure = tree_flatten(chunk)
    kind = structure, *(_kind(index, leaf, option) for leaf in leaves)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return kind if found else (kind, index), found  # without tensors there is nothing to stack


def _kind(index: int, leaf: Any, option: tuple[str, str]) -> Hashable:
    kind = describe(index, leaf, *option)
    return (kind, leaf.device) if isinstance(leaf, Tensor) else kind


def stacked(tensors: Sequence[Tensor]) -> tuple[Tensor, int | None]:
    """Tensors of one kind with a leading dimension, and 0; one of them, and None, if all are one.

    Consecutive slices of one tensor are not copied.
    """
    first = tensors[0].detach()
    step = _step(tensors) if len(tensors) > 1 else 0
    if step == 0:
        return first, None
    if step is None:
        return torch.stack([t.detach() for t in tensors]), 0
    size, stride = (len(tensors), *first.shape), (step, *first.stride())
    return first.as_strided(size, stride, first.storage_offset()), 0


def _step(tensors: Sequence[Tensor]) -> int | None:
    """How many elements of one storage lie between one tensor and the next, if it is constant."""
    first = tensors[0]
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return None
    if any(t.is_conj() or t.is_neg() for t in tensors):  # whose memory holds other values
        return None
    storage = first.untyped_storage().data_ptr()
    if any(t.untyped_storage().data_ptr() != storage for t in tensors):
        return None
    starts = [t.storage_offset() for t in tensors]
    steps = {b - a for a, b in itertools.pairwise(starts)}
    step = steps.pop()
    return None if steps or step < 0 else step
