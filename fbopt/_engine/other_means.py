"""Losses that are no mean over samples, as far as their autograd graph shows: with losses L_c that
divide by d_c, chunks have to count by w_c = d_c, so that d_c / w_c is one number for all chunks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fbopt._engine.autograd_graph import nodes

CROSS_ENTROPIES = {"NllLossBackward0", "NllLoss2DBackward0"}
MEAN, SUM = 1, 2  # at::Reduction


class Divisor(NamedTuple):
    """What a loss divides by, how to say that, and what `weight` would have to return."""

    value: float
    what: str
    cure: str


class SampleMeans:
    """Refuses losses of which chunks that count by their samples give another mean.

    That is a cross-entropy, wherever it was computed, with class weights or ignored targets, a loss
    of torch that is itself the mean over other things, and one that is a sum.

    Args:
        is_whole: whether all chunks come here. If not, what depends on the chunks is refused.
    """

    def __init__(self, is_whole: bool = True) -> None:
        self._is_whole = is_whole
        self._first: dict[int, tuple[int, float, Divisor]] = {}

    def check(self, index: int, loss: Tensor, weight: float) -> None:
        """Raise ValueError for the loss of a chunk, where its divisor is known and does not fit.

        Before the backward pass, which frees what the graph saved; reads from the device.
        """
        for k, node in enumerate(nodes(loss)):
            divisor = _divisor(index, node, is_loss=k == 0)
            if divisor is None:
                continue
            if not self._is_whole and divisor.what:
                raise ValueError(_message(index, divisor))
            before, unit, other = self._first.setdefault(k, (index, weight, divisor))
            if math.isclose(divisor.value * unit, other.value * weight, rel_tol=1e-5):
                continue
            shown = divisor if divisor.what else other
            raise ValueError(
                _message(index if divisor.what else before, shown)
                if shown.what
                else f"the loss of chunk {index} is the mean over {divisor.value:g} values for "
                f"{weight:g} samples, that of chunk {before} over {other.value:g} for {unit:g}: "
                f"pass weight=lambda chunk: {divisor.cure}, what the loss divides by"
            )


def refuse_other_means(index: int, loss: Tensor) -> None:
    """Raise ValueError for a loss of which a part is a cross-entropy by another mean."""
    SampleMeans(is_whole=False).check(index, loss, 1)


def _divisor(index: int, node: Any, *, is_loss: bool) -> Divisor | None:
    """What a loss of torch divides by; of one within another only where targets differ."""
    reduction = getattr(node, "_saved_reduction", None)
    if is_loss and reduction == SUM:
        raise ValueError(
            f"the loss of chunk {index} is a sum (reduction='sum'), and means are averaged: use "
            "reduction='mean'"
        )
    if reduction != MEAN or not hasattr(node, "_saved_target"):
        return None
    size = node._saved_target.numel()
    if node.name() not in CROSS_ENTROPIES:
        return Divisor(size, "", "chunk[1].numel()") if is_loss else None
    total = float(node._saved_total_weight)
    if node._saved_weight is not None:
        return Divisor(total, "class weights", "weights[chunk[1]].sum()")
    if int(total) != size:
        ignored = (node._saved_ignore_index + 2**63) % 2**64 - 2**63  # unsigned in Python
        return Divisor(total, f"ignored targets ({ignored})", f"(chunk[1] != {ignored}).sum()")
    return Divisor(size, "", "chunk[1].numel()")


def _message(index: int, divisor: Divisor) -> str:
    return (
        f"the loss of chunk {index} is a cross-entropy with {divisor.what}, so not the mean over "
        f"its samples, by which chunks count: pass weight=lambda chunk: {divisor.cure}, what the "
        "loss divides by (or loss_fn=torch.nn.CrossEntropyLoss(...) itself)"
    )
