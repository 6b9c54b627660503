"""The losses of the workloads in plain JAX, with the weights in the layouts that suit XLA.

Convolutions are (*space, in, out) on samples (n, *space, channels), linear layers (in, out). A loss
returns the mean over the chunk, and the statistics that BatchNorm keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Params = dict[str, Array]
Loss = Callable[[Params, Any], tuple[Array, Any]]
# As in benchmarks.peers.burgers, which needs torch, and in torch's BatchNorm.
NU, KNOWN_WEIGHT, EPS = 0.01 / np.pi, 10.0, 1e-5


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
    chosen = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return (jax.nn.logsumexp(logits, 1) - (logits * chosen).sum(1)).mean()


def linear(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def convolution(params: Params, name: str, x: Array, stride: int, padding: int) -> Array:
    """In one or two dimensions, with a bias where there is one."""
    space = "HW"[4 - x.ndim :]
    layouts = (f"N{space}C", f"{space}IO", f"N{space}C")
    strides, padded = (stride,) * len(space), [(padding, padding)] * len(space)
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    y = jax.lax.conv_general_dilated(x, weight, strides, padded, dimension_numbers=layouts)
    return y if bias is None else y + bias


def cnn(params: Params, chunk: tuple[Array, Array]) -> tuple[Array, Any]:
    """The small CNN for MNIST-1D."""
    x, labels = chunk
    for name in ("0", "2", "4"):
        x = jax.nn.relu(convolution(params, name, x, stride=2, padding=1))
    x = x.transpose(0, 2, 1).reshape(len(x), -1)  # the order of torch's linear layer
    return cross_entropy(linear(params, "7", x), labels), ()


def tanh_network(params: Params, x: Array) -> Array:
    """Linear layers with tanh between them."""
    last = 2 * (len(params) // 2 - 1)
    for index in range(0, last, 2):
        x = jnp.tanh(linear(params, str(index), x))
    return linear(params, str(last), x)


def mlp(params: Params, chunk: tuple[Array, Array]) -> tuple[Array, Any]:
    """A tanh network with cross-entropy."""
    x, labels = chunk
    return cross_entropy(tanh_network(params, x), labels), ()


def pinn(params: Params, chunk: tuple[Array, Array, Array]) -> tuple[Array, Any]:
    """Burgers' equation; the second derivative forward over reverse, the fastest in JAX."""
    points, known, values = chunk

    def slopes(points: Array) -> tuple[Array, Array]:
        u, pull_back = jax.vjp(partial(tanh_network, params), points)
        return u, pull_back(jnp.ones_like(u))[0]

    along_x = jnp.zeros_like(points).at[:, 0].set(1)
    (u, first), (_, second) = jax.jvp(slopes, (points,), (along_x,))
    residual = first[:, 1] + u[:, 0] * first[:, 0] - NU * second[:, 0]
    data = tanh_network(params, known)[:, 0] - values
    return (residual**2).mean() + KNOWN_WEIGHT * (data**2).mean(), ()


def halved(x: Array) -> Array:
    """The mean over squares of two by two pixels."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def resnet18(params: Params, chunk: tuple[Array, Array]) -> tuple[Array, Any]:
    """Fbopt's ResNet-18 for small images."""
    x, labels = chunk
    statistics: list[tuple[Array, Array]] = []

    def normalised(name: str, x: Array) -> Array:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        count = x.size // x.shape[-1]
        statistics.append((mean, variance * (count / (count - 1))))
        scale = params[f"{name}.weight"] * jax.lax.rsqrt(variance + EPS)
        return (x - mean) * scale + params[f"{name}.bias"]

    def block(name: str, x: Array, stride: int) -> Array:
        y = convolution(params, f"{name}.conv1", x, stride, 1)
        y = jax.nn.relu(normalised(f"{name}.bn1", y))
        y = normalised(f"{name}.bn2", convolution(params, f"{name}.conv2", y, 1, 1))
        if stride > 1:
            x = convolution(params, f"{name}.downsample.1", halved(x), 1, 0)
            x = normalised(f"{name}.downsample.2", x)
        return jax.nn.relu(y + x)

    x = jax.nn.relu(normalised("norm", convolution(params, "stem", x, 1, 1)))
    for stage in (1, 2, 3, 4):
        x = block(f"stage{stage}.0", x, 1 if stage == 1 else 2)
        x = block(f"stage{stage}.1", x, 1)
    return cross_entropy(linear(params, "linear", x.mean((1, 2))), labels), statistics


LOSSES: dict[str, Loss] = {"cnn": cnn, "mlp": mlp, "pinn": pinn, "resnet18": resnet18}
