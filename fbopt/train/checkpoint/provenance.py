"""The facts about a run's environment that its last bits may depend on, kept in its folder."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

import fbopt
from fbopt._ops import dispatch, reference
from fbopt.train.trainer import Trainer

# Why another value of a fact may change the last bits of a run.
WHY = {
    "fbopt": "versions may round in another order",
    "torch": "versions may round in another order",
    "python": "only the programs around torch",
    "processor": "other instructions round sums in another order",
    "device": "another device sums in another order",
    "threads": "torch splits some sums by the number of threads",
    "processes": "float32 sums depend on how the chunks are spread over them",
    "precision": "products are rounded to another precision",
    "deterministic": "without it some of torch's kernels sum in a nondeterministic order",
    "kernels": "the compiled kernels and plain torch sum in another order",
    "accumulation": "sums over the chunks are rounded differently",
    "chunk_order": "float32 sums depend on the order of the chunks",
    "data": "other samples or labels",
}


def environment(trainer: Trainer, data: str) -> dict[str, Any]:
    """The facts, as plain types; `data` is the data's SHA-256."""
    closure, order, device = trainer.closure, trainer.chunks.order, trainer.device
    cuda, kernels = device.type == "cuda", "none"
    # The older getters of precision raise where somebody has used the newer setters.
    matmul, convolution = (
        (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        if cuda
        else (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    )
    if closure is not None:
        kernels = "reference" if dispatch.table(device.type) is reference else "compiled"
    return {
        "fbopt": fbopt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
        "processes": trainer.context.world_size,
        "precision": f"matmul {matmul.fp32_precision}, convolution {convolution.fp32_precision}",
        "deterministic": torch.are_deterministic_algorithms_enabled()
        or (cuda and torch.backends.cudnn.deterministic),
        "kernels": kernels,  # none: torch's own SGD
        "accumulation": None if closure is None else closure.accumulation,
        "chunk_order": "natural" if order is None else list(order),
        "data": data,
    }


def changed(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The facts that both environments have and that differ: name, old value, new value.

    Without those that leave no trace: with exact sums, how chunks are spread and ordered.
    """
    both_exact = made.get("accumulation") == now.get("accumulation") == "exact"
    without = ("processes", "chunk_order") if both_exact else ()
    names = [n for n in now if n in made and made[n] != now[n] and n not in without]
    return [(name, made[name], now[name]) for name in names]
