"""Modes of a model's modules while its loss is measured: normalisation by chunk or by running
statistics, dropout off or as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

RUNNING = ("running_", "moving_")  # names of buffers that hold running statistics


def normalises(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with running statistics, torch's or another's."""
    if isinstance(module, _NormBase):
        return True
    return any(name.startswith(RUNNING) for name in module._buffers)


def running_statistics(model: nn.Module) -> set[int]:
    """The ids of all buffers of normalisation layers."""
    return {id(b) for m in model.modules() if normalises(m) for b in m.buffers(recurse=False)}


@contextlib.contextmanager
def measuring(model: nn.Module, batchnorm: str, dropout: str) -> Iterator[None]:
    """Set every module's mode for a measurement, and restore all modes after.

    Args:
        model: whose modules.
        batchnorm: of normalisation layers: ``"chunk"``, ``"frozen"`` (by running statistics), or
            ``"kept"``, as they are.
        dropout: ``"off"``, or anything else to leave it as it is.
    """
    with contextlib.ExitStack() as stack:
        # Its padded outputs differ from those of the passes with gradients, which never take it.
        stack.callback(torch.backends.mha.set_fastpath_enabled, _fastpath())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            if normalises(module):
                module.training = module.training if batchnorm == "kept" else batchnorm == "chunk"
            elif dropout == "off":
                _turn_off(module, stack)
        yield


def _fastpath() -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled())


def _turn_off(module: nn.Module, stack: contextlib.ExitStack) -> None:
    """Eval mode; a recurrent layer trains without its dropout, as cuDNN has gradients only then."""
    module.training = isinstance(module, nn.RNNBase)
    if isinstance(module, nn.RNNBase):
        stack.callback(setattr, module, "dropout", module.dropout)
        module.dropout = 0.0
