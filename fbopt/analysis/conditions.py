"""What a loss depends on besides the chunks: a copy of it, and what has changed since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbopt._engine.modes import running_statistics
from fbopt.analysis.objective import Objective


class Conditions:
    """The parameters, buffers and settings of an objective, compared bit for bit later.

    Copies rather than version counters or checksums: writes through ``p.data`` are not counted, and
    a sum of bits does not see two weights that changed places.
    """

    def __init__(self, objective: Objective) -> None:
        self._tensors = {name: t.detach().clone() for name, t in _tensors(objective).items()}
        self._settings = _settings(objective)

    def changed(self, objective: Objective) -> str | None:
        """The name of the first difference, or None."""
        now, settings = _tensors(objective), _settings(objective)
        for name in {**self._settings, **settings}:
            if self._settings.get(name) != settings.get(name):
                return name
        for name in {**self._tensors, **now}:
            old, new = self._tensors.get(name), now.get(name)
            if old is None or new is None or not _same(old, new):
                return name
        return None


def _same(one: Tensor, other: Tensor) -> bool:
    facts = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return facts and torch.equal(one, other)


def _tensors(objective: Objective) -> dict[str, Tensor]:
    model = objective.model
    found: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(p) for p in found.values()}
    extra = [p for p in objective.params if id(p) not in known]
    found |= {f"params[{i}], which is not the model's,": p for i, p in enumerate(extra)}
    # By chunk, running statistics are recorded but not used.
    unused = running_statistics(model) if objective.batchnorm == "chunk" else set()
    return found | {name: b for name, b in model.named_buffers() if id(b) not in unused}


def _settings(objective: Objective) -> dict[str, Any]:
    names = ("batchnorm", "dropout", "seed", "autocast")
    found = {f"objective.{name}": getattr(objective, name) for name in names}
    if objective.dropout == "seeded":
        modes = {name: module.training for name, module in objective.model.named_modules()}
        found["the mode (train or eval) of a module"] = modes
    return found
