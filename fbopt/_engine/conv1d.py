"""Convolutions over one dimension as matrix products, which a compiler fuses with what is around
them and a processor does several times as fast while they are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

from fbopt._ops.flat import DTYPES

MOST_BYTES = 2 << 20  # of the windows of one chunk: where the second level of a cache ends


class Conv1dAsProduct(TorchFunctionMode):
    """A context in which small ``conv1d`` on the CPU are computed by :func:`conv1d`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is torch.conv1d:
            found = conv1d(*args, **given)
            if found is not None:
                return found
        return func(*args, **given)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """What ``torch.conv1d`` returns, to rounding; None where that is the faster one.

        out[b, o, l] = bias[o] + Σ_k Σ_i weight[o, i, k] · input[b, i, l · stride + k · dilation]

    is a product of the weight with windows that lie in memory channel after channel.

    Args:
        input: (B, I, L).
        weight: (O, I, K).
        bias: (O,).
        stride: between windows.
        padding: zeros before and after the input.
        dilation: between the inputs of a window.
        groups: of channels; what has several is left to torch.
    """
    known = (_number(stride, 1), _number(padding, 0), _number(dilation, 1))
    if groups != 1 or None in known or not _fit(input, weight, bias):
        return None
    step, edge, spread = known
    outputs, inputs, size = weight.shape
    length = (input.shape[2] + 2 * edge - spread * (size - 1) - 1) // step + 1
    bytes_ = input.shape[0] * length * size * inputs * input.element_size()
    if length < 1 or bytes_ > MOST_BYTES:
        return None
    rows = pad(input.transpose(1, 2), (0, 0, edge, edge))
    starts = (spread * k for k in range(size))
    windows = torch.cat([rows[:, s : s + step * (length - 1) + 1 : step] for s in starts], -1)
    weights = weight.transpose(1, 2).reshape(outputs, size * inputs)
    return linear(windows, weights, bias).transpose(1, 2).contiguous()


def _fit(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is nothing that torch treats in a way of its own, or as an error."""
    tensors = [t for t in (input, weight, bias) if t is not None]
    plain = input.is_cpu and all(t.dtype in DTYPES and t.dtype == input.dtype for t in tensors)
    if not plain or input.dim() != 3 or weight.dim() != 3 or 0 in (*input.shape, *weight.shape):
        return False
    return input.shape[1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])


def _number(given: Any, least: int) -> int | None:
    """An option as a number, None for what is none."""
    if isinstance(given, (tuple, list)) and len(given) == 1:
        (given,) = given
    return given if type(given) is int and given >= least else None
