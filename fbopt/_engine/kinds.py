"""Kinds of chunks: those of one kind differ in the values of their tensors alone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

# What a chunk may hold besides tensors: values that all chunks of a kind share.
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def describe(index: int, leaf: Any, option: str, off: str) -> Hashable:
    """What a tensor or value in a chunk contributes to the chunk's kind.

    Args:
        index: the chunk's place.
        leaf: the tensor or value.
        option: what needs kinds, for an error, such as ``"vectorize=8"``.
        off: how to do without.
    """
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    if isinstance(leaf, VALUES):
        return type(leaf), repr(leaf)
    what = f"{leaf.layout} tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise TypeError(
        f"chunk {index} holds a {what}: with {option} chunks are dense tensors, numbers and "
        f"strings in tuples, lists and dicts; take it apart, or pass {off}"
    )
