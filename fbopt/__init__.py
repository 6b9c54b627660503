"""Full-batch training in PyTorch: fused kernels, a closure for any optimizer, and FullBatchGD.

After Geiping et al., "Stochastic Training is Not Necessary for Generalization" (ICLR 2022).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fbopt.accumulate import GradientAccumulator
    from fbopt.clip import clip_grad_norm_
    from fbopt.closure import FullBatchClosure
    from fbopt.diagnosis import check
    from fbopt.lbfgs import LBFGS
    from fbopt.optim import FullBatchGD
    from fbopt.penalty import GradientPenalty
    from fbopt.sharpness import SharpnessAware

__all__ = [
    "LBFGS",
    "FullBatchClosure",
    "FullBatchGD",
    "GradientAccumulator",
    "GradientPenalty",
    "SharpnessAware",
    "check",
    "clip_grad_norm_",
]
__version__ = "0.1.0"

_HOMES = {
    "LBFGS": "lbfgs",
    "FullBatchClosure": "closure",
    "FullBatchGD": "optim",
    "GradientAccumulator": "accumulate",
    "GradientPenalty": "penalty",
    "SharpnessAware": "sharpness",
    "check": "diagnosis",
    "clip_grad_norm_": "clip",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use: `fbopt doctor` has to run without torch, too."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fbopt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
