"""Fingerprints: the SHA-256 of a run's parameters, momentum and buffers, tensor by tensor.

Momentum is all that the update rule keeps, such as Adam's means, and the norms of --clip-history.

A tensor's digest is of its dtype, shape and bytes; a group's is of its tensors' names and digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fbopt.train.data.dataset import sha256

GROUPS = ("parameters", "momentum", "buffers")
SHORT = 16  # hexadecimal digits kept of a single tensor's digest


def fingerprint(state: Mapping[str, Any]) -> dict[str, Any]:
    """One line of fingerprints.jsonl, computed from the content of a checkpoint.

    {"step", "parameters", "momentum", "buffers": 64 digits each, "tensors": {group: {name: 16}}}
    """
    record: dict[str, Any] = {"step": state["step"]}
    short: dict[str, dict[str, str]] = {}
    for group, tensors in groups(state).items():
        digests = {name: sha256(tensor) for name, tensor in tensors.items()}
        lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        record[group] = hashlib.sha256(lines.encode()).hexdigest()
        short[group] = {name: digest[:SHORT] for name, digest in digests.items()}
    return record | {"tensors": short}


def groups(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The parameters, momenta and buffers in a checkpoint, by the model's names."""
    model, names = state["model"], state["parameters"]
    kept = state["optimizer"]["state"]
    momenta = {
        name if key == "momentum_buffer" else f"{name} {key}": tensor
        for i, name in enumerate(names)
        for key, tensor in sorted(kept.get(i, {}).items())
        if isinstance(tensor, Tensor)
    }
    if "clip_history" in state:
        momenta["clip_history"] = state["clip_history"]["norms"]
    return {
        "parameters": {name: model[name] for name in names},
        "momentum": momenta,
        "buffers": {name: tensor for name, tensor in model.items() if name not in set(names)},
    }
