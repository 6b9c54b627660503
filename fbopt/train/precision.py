"""The arithmetic of a run: float64, or forward and backward passes in float32, TF32 or bfloat16.

With TF32 (on CUDA) and bfloat16 (by autocast) parameters, sums over chunks, the loss and the update
are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def set_arithmetic(precision: str, device: torch.device) -> None:
    """Let CUDA multiply float32 numbers as `--precision` says, and cuDNN add in a fixed order.

    It holds for the whole process. The CPU's settings are not changed: its sums have an order.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        kind = "ieee" if precision in ("fp32", "fp64") else "tf32"
        torch.backends.cuda.matmul.fp32_precision = kind
        torch.backends.cudnn.conv.fp32_precision = kind


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that `--precision` autocasts forward passes to, None for no autocast."""
    return torch.bfloat16 if precision == "bf16" else None


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of data, parameters and updates."""
    return torch.float64 if precision == "fp64" else torch.float32


def cross_entropy(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    over_others: bool = False,
) -> Tensor:
    """Cross-entropy of logits (n, classes) and labels (n,), in float32 for bfloat16 logits.

    Label smoothing spreads its share ε over all n classes; `over_others`, over all but the right
    one, which is the same as ε n/(n − 1) over all.
    """
    if output.dtype == torch.bfloat16:
        output = output.float()
    if over_others and label_smoothing:
        logs, count = output.log_softmax(1), output.shape[1]
        share = label_smoothing * count / max(1, count - 1)  # may be above 1
        spread = -logs.mean(1)
        spread = {"mean": spread.mean, "sum": spread.sum}.get(reduction, lambda: spread)()
        return (1 - share) * F.nll_loss(logs, target, reduction=reduction) + share * spread
    return F.cross_entropy(output, target, reduction=reduction, label_smoothing=label_smoothing)
