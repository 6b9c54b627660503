"""The training program: data, models, recipes, one loop, a report. The library never imports it.

from fbopt.train import Options, train
result = train(Options(data="digits", recipe="fb-penalty", steps=100))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fbopt.train.config.dataspec import DataError
    from fbopt.train.config.options import Options, OptionsError
    from fbopt.train.config.parser import parse
    from fbopt.train.config.resolve import resolve
    from fbopt.train.ensemble.start import train_many
    from fbopt.train.loop import train
    from fbopt.train.signals import Interrupted
    from fbopt.train.trainer import Diverged

_MODULES = {
    "DataError": "fbopt.train.config.dataspec",
    "Diverged": "fbopt.train.trainer",
    "Interrupted": "fbopt.train.signals",
    "Options": "fbopt.train.config.options",
    "OptionsError": "fbopt.train.config.options",
    "parse": "fbopt.train.config.parser",
    "resolve": "fbopt.train.config.resolve",
    "train": "fbopt.train.loop",
    "train_many": "fbopt.train.ensemble.start",
}
__all__ = [
    "DataError", "Diverged", "Interrupted", "Options", "OptionsError", "parse", "resolve", "train",
    "train_many",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `fbopt train --help` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
