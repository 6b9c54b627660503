"""A small CNN without BatchNorm, for signals or images."""

from __future__ import annotations

from torch import nn


def cnn(
    channels: int, space: tuple[int, ...], classes: int, width: int = 25, dropout: float = 0.0
) -> nn.Module:
    """Three convolutions of stride 2 with ReLU, and a linear layer, in one or two dimensions.

    In one dimension this is MNIST-1D's own convolutional baseline (Greydanus & Kobak 2020,
    arXiv 2011.14439); the kernels are 5, 3 and 3 wide, the padding 1.
    """
    if len(space) not in (1, 2) or min(space) < 3:
        raise ValueError(
            f"--model cnn takes signals or images of at least 3 points a side, not "
            f"samples of shape {(channels, *space)}"
        )
    convolution = (nn.Conv1d, nn.Conv2d)[len(space) - 1]
    layers: list[nn.Module] = []
    for inner, kernel in ((channels, 5), (width, 3), (width, 3)):
        layers += [convolution(inner, width, kernel, stride=2, padding=1), nn.ReLU()]
        space = tuple((side + 2 - kernel) // 2 + 1 for side in space)
    features = width * space[0] * (space[1] if len(space) == 2 else 1)
    layers.append(nn.Flatten())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(features, classes))
