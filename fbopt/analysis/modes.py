"""How a model is evaluated: BatchNorm by chunk or frozen, dropout off or with draws of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

BATCHNORM = ("chunk", "frozen")
DROPOUT = ("off", "seeded")


@contextlib.contextmanager
def modes(model: nn.Module, batchnorm: str, dropout: str) -> Iterator[None]:
    """Switch the layers of a model, and put their modes back.

    Args:
        model: whose other modules stay in the mode that they are in.
        batchnorm: "chunk": BatchNorm layers in training mode, "frozen": in evaluation mode.
        dropout: "off": dropout layers in evaluation mode, "seeded": as they are.
    """
    changed: list[tuple[nn.Module, bool]] = []
    for module in model.modules():
        wanted = module.training
        if isinstance(module, _BatchNorm):
            wanted = batchnorm == "chunk"
        elif isinstance(module, _DropoutNd) and dropout == "off":
            wanted = False
        if wanted != module.training:
            changed.append((module, module.training))
            module.training = wanted
    try:
        yield
    finally:
        for module, training in changed:
            module.training = training
