"""The ops as the rest of the library calls them: the compiled kernels where there are some for the
device, fbopt.reference elsewhere. The only file that says torch.ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from fbopt._build import load as _build
from fbopt._ops import reference
from fbopt._ops.flat import by_device_and_dtype

NAMES = (
    "pack_",
    "squared_norm",
    "perturb_",
    "accumulate_",
    "accumulate_penalty_",
    "accumulate_exact_",
    "accumulate_exact_penalty_",
    "exact_mean_",
    "clip_",
    "sgd_step_",
)
LIBRARIES = {"cpu": _build.kernels, "cuda": _build.cuda_kernels}


@functools.cache
def table(device_type: str) -> SimpleNamespace | ModuleType:
    """The ops for a device, by name. The first call for a compiled device may build them."""
    if device_type not in LIBRARIES or LIBRARIES[device_type]() is None:
        return reference
    _register_fakes()
    return SimpleNamespace(**{name: getattr(torch.ops.fbopt, name).default for name in NAMES})


@functools.cache
def _register_fakes() -> None:
    """Tell torch.compile and fake tensors what the ops return; the schema says the rest."""
    for name in NAMES:
        returns = name in ("squared_norm", "perturb_")
        torch.library.register_fake(f"fbopt::{name}", _fake_norm if returns else _fake_none)


def _fake_norm(first: Tensor | list[Tensor], *args: object) -> Tensor:
    like = first if isinstance(first, Tensor) else first[0]
    return like.new_empty((), dtype=torch.float64)


def _fake_none(*args: object) -> None:
    return None


def pack_(out: Tensor, tensors: list[Tensor]) -> None:
    """See :func:`fbopt.reference.pack_`."""
    table(out.device.type).pack_(out, tensors)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`fbopt.reference.squared_norm`; here over several devices and dtypes, or none."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    groups = by_device_and_dtype(tensors)
    parts = [[tensors[i] for i in group] for group in groups]
    squares = [table(part[0].device.type).squared_norm(part) for part in parts]
    if len(squares) == 1:
        return squares[0]
    return torch.stack([s.to(tensors[0].device) for s in squares]).sum()


def perturb_(
    out: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    radius: float,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """See :func:`fbopt.reference.perturb_`."""
    return table(out.device.type).perturb_(out, params, grads, radius, squared_norm)


def accumulate_(sums: list[Tensor], grads: list[Tensor], weight: Tensor) -> None:
    """See :func:`fbopt.reference.accumulate_`."""
    table(weight.device.type).accumulate_(sums, grads, weight)


def accumulate_penalty_(
    sums: list[Tensor],
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    weight: Tensor,
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> None:
    """See :func:`fbopt.reference.accumulate_penalty_`."""
    table(weight.device.type).accumulate_penalty_(
        sums, grads, plus, minus, weight, coefficient, squared_norm, radius
    )


def accumulate_exact_(
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    grads: list[Tensor],
    weight: Tensor,
    scales: Tensor,
) -> None:
    """See :func:`fbopt.reference.accumulate_exact_`."""
    table(weight.device.type).accumulate_exact_(sums, carries, maxima, grads, weight, scales)


def accumulate_exact_penalty_(
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    grads: list[Tensor],
    plus: list[Tensor],
    minus: list[Tensor],
    weight: Tensor,
    scales: Tensor,
    coefficient: Tensor,
    squared_norm: Tensor,
    radius: float,
) -> None:
    """See :func:`fbopt.reference.accumulate_exact_penalty_`."""
    table(weight.device.type).accumulate_exact_penalty_(
        sums,
        carries,
        maxima,
        grads,
        plus,
        minus,
        weight,
        scales,
        coefficient,
        squared_norm,
        radius,
    )


def exact_mean_(
    means: list[Tensor],
    sums: list[Tensor],
    carries: list[Tensor],
    maxima: Tensor,
    scales: Tensor,
    divisor: Tensor,
) -> None:
    """See :func:`fbopt.reference.exact_mean_`."""
    table(divisor.device.type).exact_mean_(means, sums, carries, maxima, scales, divisor)


def clip_(grads: list[Tensor], total_norm: Tensor, max_norm: float) -> None:
    """See :func:`fbopt.reference.clip_`."""
    table(total_norm.device.type).clip_(grads, total_norm, max_norm)


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    divisor: Tensor | None,
    total_norm: Tensor | None,
    max_norm: float | None,
    **rule: float | bool,
) -> None:
    """See :func:`fbopt.reference.sgd_step_`."""
    table(lr.device.type).sgd_step_(
        params, grads, momentum_buffers, lr, divisor, total_norm, max_norm, **rule
    )
