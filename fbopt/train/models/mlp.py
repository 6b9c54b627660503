"""A multilayer perceptron: h ← σ(W h + b), `depth` times, then the logits W h + b."""

from __future__ import annotations

import math

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def mlp(
    shape: tuple[int, ...],
    classes: int,
    width: int = 64,
    dropout: float = 0.0,
    *,
    depth: int = 2,
    activation: str = "relu",
) -> nn.Module:
    """Linear layers of `width` outputs, each with an activation, on the numbers of a sample in a
    row, and a linear layer; for samples of any shape, without BatchNorm.

    It starts as torch's linear layers do: weights and biases uniform within ±1/√fan-in.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inner = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(inner, width), ACTIVATIONS[activation]()]
        inner = width
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(inner, classes))
