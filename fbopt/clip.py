"""clip_grad_norm_: torch's, in two passes over memory, or in one if nothing is clipped.

Clipping is part of the training in Geiping et al., ICLR 2022, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fbopt._checks import check_number, check_storage
from fbopt._ops import dispatch
from fbopt._ops.flat import accumulator_dtype, by_device_and_dtype

BLOCK = 16384


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their joint norm is at most ``max_norm``.

    ``g <- g min(1, max_norm / (||g|| + 1e-6))`` over all parameters' gradients taken as one vector;
    parameters without a gradient are skipped. A drop-in for ``torch.nn.utils.clip_grad_norm_``
    that reads 1 word per parameter for the norm and, only if it exceeds ``max_norm``, reads 1 and
    writes 1 more.

    Args:
        parameters: tensors with ``.grad`` of float32, float64, bfloat16 or float16, on any devices.
        max_norm: the bound, at least 0; ``inf`` only measures.
        norm_type: the p of the p-norm, ``inf`` for the maximum.
        error_if_nonfinite: raise instead of scaling when the norm is NaN or infinite; reads the
            norm on the host.
        foreach: accepted for compatibility; there is one implementation.

    Returns:
        The norm before clipping, 0-dim, float64 if any gradient is, else float32, on the device of
        the first gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything is changed.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; nothing was changed.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(p).__name__}")
    if max_norm != math.inf:
        check_number("max_norm", max_norm, least=0)
    check_norm_type(norm_type)
    grads = [p.grad for p in parameters if p.grad is not None]
    for i, g in enumerate(grads):
        check_storage(g, f"gradient {i}")
    norm = total_norm(grads, norm_type)
    if error_if_nonfinite:
        check_finite(norm)
    for group in by_device_and_dtype(grads):
        part = [grads[i] for i in group]
        dispatch.clip_(part, norm.to(part[0].device), max_norm)
        torch.autograd.graph.increment_version(part)
    return norm


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector: 0-dim, float64 if any is, else float32."""
    if not grads:
        return torch.zeros(())
    wide = any(g.dtype == torch.float64 for g in grads)
    dtype = torch.float64 if wide else torch.float32
    if norm_type != 2:
        exact = [g.to(accumulator_dtype(g.dtype)).reshape(-1) for g in grads]
        # Torch reduces a block on one thread, so that the bits do not depend on their number.
        blocks = [b for g in exact for b in torch.split(g, BLOCK) if b.numel()]
        return torch.nn.utils.get_total_norm(blocks, norm_type).to(dtype)
    return dispatch.squared_norm(grads).sqrt().to(dtype)


def check_norm_type(norm_type: float) -> None:
    """Raise for a p that does not make a norm."""
    if norm_type != math.inf:
        check_number("norm_type", norm_type, above=0)


def check_finite(norm: Tensor) -> None:
    """Raise if a gradient norm is NaN or infinite. Reads it on the host."""
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"the gradient norm is {norm.item()}: the gradient holds NaN or infinite values. "
            "Nothing was changed. Lower lr or check the data; error_if_nonfinite=False lets it pass"
        )
