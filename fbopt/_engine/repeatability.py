"""Whether two visits find the same: finite parameters, and the same chunks; what it comes from
where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._sharding import local

DRAWN_ELSEWHERE = "dropout or noise that is drawn in a forward() or in the loss"


def first_nonfinite(model: nn.Module, params: Iterable[Tensor]) -> str | None:
    """The name of the first of these parameters, or of the model's buffers, with inf or NaN."""
    ids = {id(p) for p in params}
    wanted = [(name, p) for name, p in model.named_parameters() if id(p) in ids]
    tensors = [*wanted, *model.named_buffers()]
    return next((name for name, t in tensors if not torch.isfinite(local(t.detach())).all()), None)


def other_chunks(first: Sequence[Any], again: Sequence[Any]) -> tuple[str, str, str]:
    """How a second visit of all chunks differs from the first: what it did, likely cause, cure.

    Args:
        first: for each chunk a value that tells it from others.
        again: the same of the second visit.
    """
    if len(first) != len(again):
        return (
            f"had {len(again)} chunks and the first {len(first)}",
            "chunks that are used up, or drawn anew",
            "chunks must be the same each time they are iterated over",
        )
    if sorted(first) == sorted(again):
        return (
            "visited them in another order",
            "chunks are shuffled",
            "pass a list of them, or a DataLoader with shuffle=False",
        )
    return (
        "had other samples in them",
        "a DataLoader with shuffle=True, or random augmentation",
        "pass shuffle=False and leave random augmentation out, or pass a list of chunks",
    )
