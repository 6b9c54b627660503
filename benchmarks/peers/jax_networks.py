"""The losses of the workloads in plain JAX, with the weights in the layouts that suit XLA.

Convolutions are (space, in, out) on samples (n, space, channels), linear layers (in, out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Params = dict[str, Array]
Loss = Callable[[Params, tuple[Array, ...]], tuple[Array, Any]]


def from_torch(value: np.ndarray) -> np.ndarray:
    """A weight (out, in, *space) as (*space, in, out)."""
    return value.transpose(*range(2, value.ndim), 1, 0) if value.ndim > 1 else value


def to_torch(value: np.ndarray) -> np.ndarray:
    """The reverse."""
    last = value.ndim - 1
    return value.transpose(last, last - 1, *range(last - 1)) if value.ndim > 1 else value


def inputs(value: np.ndarray) -> np.ndarray:
    """Samples (n, channels, *space) as (n, *space, channels)."""
    if value.dtype.kind != "f":
        return value.astype(np.int32)
    return np.moveaxis(value, 1, -1) if value.ndim > 2 else value


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over samples."""
    chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, 1) - chosen).mean()


def linear(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def cnn(params: Params, chunk: tuple[Array, ...]) -> tuple[Array, tuple[()]]:
    """The small CNN for MNIST-1D."""
    x, labels = chunk
    for name in ("0", "2", "4"):
        x = jax.lax.conv_general_dilated(
            x, params[f"{name}.weight"], (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = jax.nn.relu(x + params[f"{name}.bias"])
    x = x.transpose(0, 2, 1).reshape(len(x), -1)  # the order of torch's linear layer
    return cross_entropy(linear(params, "7", x), labels), ()


def tanh_network(params: Params, x: Array) -> Array:
    """Linear layers with tanh between them, on any leading dimensions."""
    last = max(int(name.partition(".")[0]) for name in params)
    for index in range(0, last, 2):
        x = jnp.tanh(linear(params, str(index), x))
    return linear(params, str(last), x)


def mlp(params: Params, chunk: tuple[Array, ...]) -> tuple[Array, tuple[()]]:
    """A tanh network with cross-entropy."""
    x, labels = chunk
    return cross_entropy(tanh_network(params, x), labels), ()


LOSSES: dict[str, Loss] = {"cnn": cnn, "mlp": mlp}
