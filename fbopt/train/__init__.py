"""The training program: data, models, recipes, one loop, a report. The library never imports it.

from fbopt.train import Options, train
result = train(Options(data="digits", recipe="fb-penalty", steps=100))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fbopt.train.config.options import Options
    from fbopt.train.loop import train

__all__ = ["Options", "train"]
_MODULES = {"Options": "fbopt.train.config.options", "train": "fbopt.train.loop"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `fbopt train --help` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
