"""Refusal of calls whose results would be written over each other or over what they are made of:
csrc/overlap.h for plain torch, with the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_begin = attrgetter("begin")


class Span(NamedTuple):
    """The memory of a tensor, from its first element to the end of its last one."""

    begin: int
    end: int
    tensor: Tensor
    name: str
    index: int
    is_output: bool
    is_dense: bool

    def is_same(self, other: Span, names: tuple[str, str] | None) -> bool:
        """Whether both are one tensor, at one place of the two lists of these names."""
        if names is None or {self.name, other.name} != set(names) or self.index != other.index:
            return False
        facts = [
            (s.begin, s.tensor.shape, s.tensor.stride(), s.tensor.dtype) for s in (self, other)
        ]
        return facts[0] == facts[1]


def check_apart(
    outputs: Iterable[tuple[str, Any]],
    inputs: Iterable[tuple[str, Any]],
    same: tuple[str, str] | None = None,
) -> None:
    """Check that the elements of all outputs lie apart from each other, and from the inputs'.

    Args:
        outputs: the name and the value of each argument that is written: a tensor or a list of
            tensors. Values of other kinds, and tensors without addresses, are passed over.
        inputs: the same of those that are read.
        same: a list of outputs and one of inputs, whose tensors may be the same, each as a whole.

    Raises:
        RuntimeError: two share memory, or an element of an output is written more than once.
    """
    spans = [*_spans(outputs, True), *_spans(inputs, False)]
    spans.sort(key=_begin)
    for span in spans:
        if span.is_output and not span.is_dense and _repeats(_places(span.tensor)):
            raise RuntimeError(
                f"{span.name}: an element of it is written to more than once, as it is expanded"
            )
    touching = list(_touching(spans))
    for a, b in touching:
        if a.is_output and b.is_output and _share_memory(a, b):
            raise RuntimeError(f"{a.name} and {b.name} share memory, and both are written to")
    for a, b in touching:
        if a.is_output != b.is_output and not a.is_same(b, same) and _share_memory(a, b):
            written, read = (a, b) if a.is_output else (b, a)
            raise RuntimeError(
                f"{written.name} is written to and shares memory with {read.name}, which is read: "
                "give one of them memory of its own"
            )


def _spans(arguments: Iterable[tuple[str, Any]], is_output: bool) -> Iterator[Span]:
    for name, value in arguments:
        for index, t in enumerate(value if isinstance(value, list | tuple) else (value,)):
            # Elsewhere data_ptr() is a handle, or 0.
            if not isinstance(t, Tensor) or not (t.is_cpu or t.is_cuda or t.is_xpu):
                continue
            if isinstance(t, FakeTensor) or torch._is_functional_tensor(t):  # without memory
                continue
            try:
                begin = t.data_ptr()
            except RuntimeError:  # of a tensor without memory: a fake one, a batched one
                continue
            if t.is_contiguous():
                yield Span(begin, begin + t.nbytes, t, name, index, is_output, True)
            else:
                pairs = zip(t.shape, t.stride(), strict=True)
                size = (1 + sum((n - 1) * stride for n, stride in pairs)) * t.element_size()
                yield Span(begin, begin + size, t, name, index, is_output, _is_dense(t))


def _touching(spans: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """Pairs whose spans meet, one of them an output, of a list in the order of their begins."""
    for i, a in enumerate(spans):
        k = i + 1
        while k < len(spans) and spans[k].begin < a.end:
            b = spans[k]
            if (a.is_output or b.is_output) and b.begin < b.end:
                yield a, b
            k += 1


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill their span, each with a place of its own."""
    expected = 1
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1:
            if stride != expected:
                return False
            expected *= n
    return True


def _places(t: Tensor) -> Tensor:
    """Where every element begins, in order."""
    found = torch.tensor([t.data_ptr()], device="cpu")
    for n, stride in zip(t.shape, t.stride(), strict=True):
        steps = torch.arange(n, device="cpu") * (stride * t.element_size())
        found = (found[:, None] + steps).flatten()
    return found.sort().values


def _repeats(places: Tensor) -> bool:
    return bool((places[1:] == places[:-1]).any())


def _share_memory(a: Span, b: Span) -> bool:
    """Whether two tensors whose spans meet share an element."""
    if a.is_dense and b.is_dense:
        return True
    x, y = _places(a.tensor), _places(b.tensor)
    # For each element of b the last of a that does not begin behind it, and the next one.
    after = torch.searchsorted(x, y, right=True)
    before, following = x[(after - 1).clamp(min=0)], x[after.clamp(max=len(x) - 1)]
    held = (after > 0) & (before + a.tensor.element_size() > y)
    holds = (after < len(x)) & (following < y + b.tensor.element_size())
    return bool((held | holds).any())
