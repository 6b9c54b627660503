"""The facts about a run's surroundings that its last bits may depend on, kept in its folder."""

from __future__ import annotations

import platform
from typing import Any

import torch

import fbopt
from fbopt._ops import dispatch, reference
from fbopt.train.trainer import Run

# What two runs with different values of a fact may differ by.
WHY = {
    "fbopt": "versions may round in another order",
    "torch": "versions may round in another order",
    "python": "only the programs around torch",
    "processor": "other instructions round sums in another order",
    "device": "another device sums in another order",
    "threads": "torch splits some sums by the number of threads",
    "processes": "float32 sums depend on how the chunks are spread over them",
    "precision": "products are rounded to another precision",
    "deterministic": "without it some of torch's kernels sum in an order that chance decides",
    "kernels": "the compiled kernels and plain torch sum in another order",
    "accumulation": "sums over the chunks are rounded differently",
    "chunk_order": "float32 sums depend on the order of the chunks",
    "data": "other samples or labels",
}


def facts(run: Run, data: str) -> dict[str, Any]:
    """What there is to know, as plain types; `data` is the data's SHA-256."""
    closure, order = run.closure, run.chunks.order
    return {
        "fbopt": fbopt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": _device(run.device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "precision": _precision(run.device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "kernels": _kernels(run),
        "accumulation": None if closure is None else closure.accumulation,
        "chunk_order": "natural" if order is None else list(order),
        "data": data,
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _precision(device: torch.device) -> str:
    """What float32 products are rounded to; none is torch's default."""
    backends = torch.backends  # the older getters raise where somebody has used the newer setters
    matmul, convolution = backends.mkldnn.matmul, backends.mkldnn.conv
    if device.type == "cuda":
        matmul, convolution = backends.cuda.matmul, backends.cudnn.conv
    return f"matmul {matmul.fp32_precision}, convolution {convolution.fp32_precision}"


def _kernels(run: Run) -> str:
    """Whether the compiled kernels or plain torch do the work (torch's own optimizer, for SGD)."""
    if run.closure is None:
        return "none"
    return "reference" if dispatch.table(run.device.type) is reference else "compiled"
