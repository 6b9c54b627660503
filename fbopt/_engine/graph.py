"""The autograd graph of a loss: its nodes, and the dtypes that it was computed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def nodes(loss: Tensor) -> Iterator[Any]:
    """Iterate over all nodes from a loss down to its leaves, each once."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


def dtypes(loss: Tensor) -> set[torch.dtype]:
    """The dtypes of what was computed from the parameters: under autocast, wherever it began."""
    found = {meta.dtype for node in nodes(loss) for meta in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point}
