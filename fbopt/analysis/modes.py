"""Evaluation modes: BatchNorm by chunk or frozen, dropout off or seeded."""

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
    """Set the modes of a model's BatchNorm and dropout layers, and restore them.

    Args:
        model: whose other modules keep their modes.
        batchnorm: "chunk": BatchNorm layers in training mode, "frozen": in evaluation mode.
        dropout: "off": dropout layers in evaluation mode, "seeded": in the mode that they have.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            if isinstance(module, _BatchNorm):
                module.training = batchnorm == "chunk"
            elif isinstance(module, _DropoutNd) and dropout == "off":
                module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
