"""The weight n_c of a chunk, which its mean loss divides by: the number of samples or targets, or
the sum of class weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbopt._checks import check_weight
from fbopt._engine.inputs import loss_options, tensors

# Losses whose mean is over the targets that are not ignored, and over all elements.
BY_TARGET = {nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss}
BY_ELEMENT = {
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(nn.KLDivLoss, nn.PoissonNLLLoss, nn.SoftMarginLoss, F.kl_div, F.poisson_nll_loss),
    *(F.soft_margin_loss, F.binary_cross_entropy_with_logits),
}
BATCH = "batchmean"  # the mean over samples, nn.KLDivLoss alone has it


def weigh(
    index: int,
    chunk: Any,
    weight: Callable[[Any], float | Tensor] | None,
    known: Mean | None = None,
    counts: TargetCounts | None = None,
) -> float:
    """Return n_c: what `weight` returns, what a known loss divides by, or the number of samples.

    Args:
        index: the chunk's place.
        chunk: the chunk.
        weight: as for FullBatchClosure.
        known: :func:`mean_of` its loss function.
        counts: keeps the counts of targets, so that they are read from the device once.
    """
    if weight is not None:
        return check_weight(weight(chunk), f"weight(chunk) of chunk {index}")
    target = chunk[1] if isinstance(chunk, (tuple, list)) and len(chunk) == 2 else None
    if known is not None and isinstance(target, Tensor) and target.dim() > 0:
        if known.by_element or target.is_floating_point():
            return _samples(index, chunk) * _elements(target, known.by_element)
        return (counts or TargetCounts())(index, target, known)
    return _samples(index, chunk)


def _samples(index: int, chunk: Any) -> int:
    """The length of the chunk's tensors, on which they have to agree."""
    is_flat = type(chunk) in (tuple, list) and all(type(t) is Tensor for t in chunk)
    shapes = [t.shape for t in (chunk if is_flat else tensors(chunk))]
    if not shapes or not shapes[0]:
        raise ValueError(
            f"chunk {index} has no tensor whose first dimension counts its samples: pass weight=..."
        )
    lengths = [shape[0] for shape in shapes if shape]
    if lengths.count(lengths[0]) != len(lengths):
        raise ValueError(
            f"the tensors of chunk {index} have lengths {', '.join(map(str, lengths))}, so the "
            "number of its samples is not clear: pass weight=lambda chunk: ..., what its loss is "
            "the mean over"
        )
    if lengths[0] == 0:
        raise ValueError(f"chunk {index} is empty (0 samples): leave it out of chunks")
    return lengths[0]


def _elements(target: Tensor, by_element: bool) -> int:
    """How many means there are for each sample: one, or one for each of its further dimensions."""
    shape = target.shape[1:] if by_element else target.shape[2:]  # class probabilities: (n, C, ...)
    return shape.numel()


class Mean(NamedTuple):
    """What a loss function is the mean over."""

    by_element: bool
    class_weights: Tensor | None
    ignored: int | None


def mean_of(loss_fn: Any) -> Mean | None:
    """What one of torch's losses is the mean over; None for others."""
    kind, options = loss_options(loss_fn)
    try:
        by_target, by_element = kind in BY_TARGET, kind in BY_ELEMENT
    except TypeError:  # cannot be hashed
        return None
    if by_target:
        return Mean(False, options.get("weight"), options.get("ignore_index", -100))
    return Mean(True, None, None) if by_element and options.get("reduction") != BATCH else None


class TargetCounts:
    """Counts the targets that are not ignored, or sums their class weights.

    On the CPU at every visit. Elsewhere a count is read from the device, which waits for it, when a
    chunk's place is visited first; afterwards, for other tensors or such as have been written to,
    only where chunks are a list, with class weights, or once any chunk has had an ignored target: a
    loader gives the same targets in new tensors.
    """

    def __init__(self) -> None:
        self._forget(None)

    def _forget(self, chunks: Any) -> None:
        self._of = chunks
        self._known: dict[int, _Count] = {}
        self._any_ignored = False

    def follow(self, chunks: Any) -> None:
        """Forget what was counted if the chunks are another object now."""
        if chunks is not self._of:
            self._forget(chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetCounts, ()

    def __call__(self, index: int, target: Tensor, mean: Mean) -> float:
        """The count of a chunk's targets."""
        weights = mean.class_weights
        if target.is_cpu and (weights is None or weights.is_cpu):
            return _count(target, mean)  # NumPy could have written to it
        known = self._known.get(index)
        if known is not None and known.holds(target, mean):
            return known.value
        is_list = type(self._of) in (list, tuple)  # other tensors are other targets then
        assumed = known is not None and known.counts_by_one(mean) and not is_list
        if assumed and not self._any_ignored:
            return target.numel()
        _refuse_capture(index)
        versions, value = (_version(target), _version(weights)), _count(target, mean)
        self._known[index] = _Count(weakref.ref(target), mean, versions, value)
        self._any_ignored |= weights is None and value < target.numel()
        return value


def _refuse_capture(index: int) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the targets of chunk {index} have to be counted, which a CUDA graph cannot: visit "
            "these tensors once before the capture, or pass weight=lambda chunk: a number"
        )


class _Count(NamedTuple):
    """A count, and the tensors and their versions that it belongs to."""

    target: weakref.ref[Tensor]
    mean: Mean
    versions: tuple[int, int]
    value: float

    def counts_by_one(self, mean: Mean) -> bool:
        """Whether targets count by one, before and now, unless they are ignored."""
        same = self.mean.ignored == mean.ignored and mean.class_weights is None
        return same and self.mean.class_weights is None

    def holds(self, target: Tensor, mean: Mean) -> bool:
        weights = mean.class_weights
        return (
            self.target() is target
            and self.mean.class_weights is weights
            and self.mean.ignored == mean.ignored
            and self.versions == (_version(target), _version(weights))
            and -1 not in self.versions
        )


def _version(tensor: Tensor | None) -> int:
    """A number that changes with a tensor's values; -1 where torch counts no versions."""
    if tensor is None:
        return 0
    return -1 if tensor.is_inference() else tensor._version


def _count(target: Tensor, mean: Mean) -> float:
    if mean.class_weights is None:
        size = target.numel()
        if size and target.min().item() > mean.ignored:  # one operation, and the usual case
            return size
        return int((target != mean.ignored).sum())
    counted = target != mean.ignored
    classes = target[counted].to(mean.class_weights.device)
    return float(mean.class_weights.double()[classes].sum())
