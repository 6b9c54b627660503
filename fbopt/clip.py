"""clip_grad_norm_: torch's, in two passes over memory, or in one if nothing is clipped.

Clipping is part of the training in Geiping et al., ICLR 2022, section 4.
"""

from __future__ import annotations

import math
import types
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fbopt._checks import check_number, check_scalar, check_storage, refuse_flattened
from fbopt._ops import dispatch
from fbopt._ops.flat import accumulator_dtype, by_device_and_dtype, scalar_on
from fbopt._ops.reference import CLIP_EPS
from fbopt._sharding import Groups, all_groups, any_sharded, combine, locals_of, summed

BLOCK = 16384


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their joint norm is at most ``max_norm``.

    ``g <- g min(1, max_norm / (||g|| + 1e-6))`` over all parameters' gradients taken as one vector;
    parameters without a gradient are skipped. A drop-in for ``torch.nn.utils.clip_grad_norm_``
    that reads 1 word per parameter for the norm and, only if it exceeds ``max_norm``, reads 1 and
    writes 1 more. In a function that ``torch.compile`` traces it is one operator. Of DTensors each
    process scales its shards; the norm, of all shards, is a plain tensor.

    Args:
        parameters: tensors with ``.grad`` of float32, float64, bfloat16 or float16, on any devices.
        max_norm: the bound, at least 0; ``inf`` only measures. A tensor of one element is read on
            the device; where it is negative there, the gradients become NaN.
        norm_type: the p of the p-norm, ``inf`` (or ``"inf"``) for the maximum.
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
    listed = _listed(parameters)
    refuse_flattened(listed, "clip_grad_norm_", "call model.clip_grad_norm_(max_norm)")
    grads = [p.grad for p in listed if p.grad is not None]
    if grads and torch.compiler.is_compiling():
        tensor, number = (max_norm, 0.0) if isinstance(max_norm, Tensor) else (None, max_norm)
        norm: Tensor = _traced_clip(
            grads, tensor, float(number), float(norm_type), error_if_nonfinite
        )
        return norm
    return _clip(grads, max_norm, norm_type, error_if_nonfinite)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not found and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "parameters is a generator without any element left: nothing is clipped. Pass "
            "model.parameters() anew, or a list",
            stacklevel=4,  # torch.no_grad adds one
        )
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(p).__name__}")
    return found


def _clip(
    grads: list[Tensor],
    max_norm: float | Tensor,
    norm_type: float | str,
    error_if_nonfinite: bool,
) -> Tensor:
    if isinstance(max_norm, Tensor) or max_norm != math.inf:
        on_host = isinstance(max_norm, Tensor) and max_norm.device.type == "cpu"
        check_scalar("max_norm", max_norm, read=on_host, least=0, finite=False)
    p = norm_order(norm_type)
    for i, g in enumerate(grads):
        check_storage(g, f"gradient {i}")
    if any_sharded(grads):
        whole = summed(grads)
        norm = total_norm(locals_of(whole), p, all_groups(whole))
        grads = locals_of(grads)
    else:
        norm = total_norm(grads, p)
    if error_if_nonfinite:
        check_finite(norm)
    scaled, bound = clip_operands(norm, max_norm)
    for group in by_device_and_dtype(grads):
        part = [grads[i] for i in group]
        for distinct in _rounds(part):
            dispatch.clip_(distinct, scaled.to(part[0].device), bound)
    return norm


def _rounds(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Lists without a repetition: a tensor that is there twice is scaled twice, in turn."""
    if len(set(map(id, tensors))) == len(tensors):
        return [tensors]
    rounds: list[list[Tensor]] = []
    seen: Counter[int] = Counter()
    for tensor in tensors:
        if (count := seen[id(tensor)]) == len(rounds):
            rounds.append([])
        rounds[count].append(tensor)
        seen[id(tensor)] += 1
    return rounds


@torch.library.custom_op("fbopt::clip_grad_norm_", mutates_args={"grads"})
def _traced_clip(
    grads: list[Tensor],
    max_norm_tensor: Tensor | None,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor:
    """:func:`_clip` as one operator for torch.compile: the checks need real tensors."""
    bound = max_norm if max_norm_tensor is None else max_norm_tensor
    return _clip(grads, bound, norm_type, error_if_nonfinite)


@_traced_clip.register_fake
def _(grads: list[Tensor], *args: object) -> Tensor:
    return grads[0].new_empty((), dtype=_norm_dtype(grads))


def clip_operands(norm: Tensor, max_norm: float | Tensor) -> tuple[Tensor, float]:
    """Return a norm and a bound, a number, that the kernels clip by as by these.

    For a bound M that is a tensor: 1 and n' with 1 / (n' + eps) = M / (n + eps).
    """
    if not isinstance(max_norm, Tensor):
        return norm, max_norm
    bound = scalar_on(norm.device, max_norm)
    bound = torch.where(bound < 0, math.nan, bound)
    return (norm.double() + CLIP_EPS) / bound - CLIP_EPS, 1.0


def total_norm(
    grads: Sequence[Tensor], norm_type: float = 2.0, groups: Sequence[Groups] | None = None
) -> Tensor:
    """Return the norm of all tensors as one vector: 0-dim, float64 if any is, else float32.

    Args:
        grads: plain tensors.
        norm_type: the p of the norm.
        groups: for each tensor the processes over which it is spread, if any is.
    """
    if groups is not None and any(groups):
        return _spread_norm(grads, norm_type, groups)
    if not grads:
        return torch.zeros(())
    dtype = _norm_dtype(grads)
    if norm_type != 2:
        exact = [g.to(accumulator_dtype(g.dtype)).reshape(-1) for g in grads]
        # Torch reduces a block on one thread, so that the bits do not depend on their number.
        blocks = [b for g in exact for b in torch.split(g, BLOCK) if b.numel()]
        return torch.nn.utils.get_total_norm(blocks, norm_type).to(dtype)
    return dispatch.squared_norm(grads).sqrt().to(dtype)


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    wide = torch.float64 in {g.dtype for g in grads}
    return torch.float64 if wide else torch.float32


def norm_order(norm_type: float | str) -> float:
    """Return the p of a norm as a number; as in torch it may be a string, such as ``"inf"``."""
    try:
        p = float(norm_type) if isinstance(norm_type, str) else norm_type
    except ValueError:
        raise ValueError(f'norm_type must be a number or "inf", got {norm_type!r}') from None
    if p != math.inf:
        check_number("norm_type", p, above=0)
    return float(p)


def _spread_norm(grads: Sequence[Tensor], p: float, groups: Sequence[Groups]) -> Tensor:
    """The norm of sharded tensors: a number for each kind of sharding is summed over processes."""
    kinds: dict[Groups, list[Tensor]] = {}
    for g, names in zip(grads, groups, strict=True):
        kinds.setdefault(names, []).append(g)
    if p == 2:
        parts = [dispatch.squared_norm(part) for part in kinds.values()]
    else:
        norms = [total_norm([g for g in part if g.numel()], p).double() for part in kinds.values()]
        parts = norms if p == math.inf else [norm**p for norm in norms]
    values = torch.stack([x.to(grads[0].device) for x in parts])
    if p == math.inf:
        broken = combine(values.isnan().double(), list(kinds), largest=True).any()
        found = combine(values.nan_to_num(posinf=math.inf), list(kinds), largest=True).max()
        norm = torch.where(broken, math.nan, found)
    else:
        norm = combine(values, list(kinds)).sum() ** (1 / p)
    return norm.to(_norm_dtype(grads))


def check_finite(norm: Tensor) -> None:
    """Raise if a gradient norm is NaN or infinite. Reads it on the host."""
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"the gradient norm is {norm.item()}: the gradient holds NaN or infinite values. "
            "Nothing was changed. Lower lr or check the data; error_if_nonfinite=False lets it pass"
        )
