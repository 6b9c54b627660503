"""The networks by name: `build("resnet18", (3, 32, 32), classes=10)`.

A small CNN and a multilayer perceptron without BatchNorm, the paper's ResNets, He et al.'s ResNets
for CIFAR, VGGs, DenseNets, PyramidNets and NFNet-F0. All but the first two are for images, of about
32×32 unless the stem is ImageNet's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from fbopt.train.models.convnets import cnn, densenet, vgg
from fbopt.train.models.mlp import mlp
from fbopt.train.models.nfnet import nfnet
from fbopt.train.models.pyramidnet import pyramidnet
from fbopt.train.models.resnet import cifar_resnet, resnet, start_branches_at_one

_IMAGES = {
    **{f"resnet{depth}": (partial(resnet, depth), 64) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": (partial(cifar_resnet, depth), 16) for depth in (20, 32, 56, 110)},
    **{f"vgg{depth}": (partial(vgg, depth), 64) for depth in (11, 13, 16, 19)},
    **{
        f"densenet{depth}": (partial(densenet, depth), width)
        for depth, width in ((121, 64), (161, 96), (169, 64), (201, 64))
    },
    **{f"pyramidnet{depth}": (partial(pyramidnet, depth), 16) for depth in (110, 272)},
    "nfnet-f0": (nfnet, 128),
}
__all__ = ["NAMES", "WIDTHS", "build", "count_parameters", "decay_groups", "start_branches_at_one"]
WIDTHS = {"cnn": 25, "mlp": 64, **{name: width for name, (_, width) in _IMAGES.items()}}
NAMES = tuple(WIDTHS)
_SMALLEST = {"vgg": 32, "densenet": 8}  # the side of which pooling leaves one pixel


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    width: int | None = None,
    dropout: float = 0.0,
    **layers: Any,
) -> nn.Module:
    """The network `name` for samples of `shape` (channels, length) or (channels, height, width).

    It maps float32 (n, *shape) to logits (n, classes). `width` is the number of output channels of
    its first layer, `dropout` the probability of dropping an input of the last layer; `layers` are
    those of stem, norm, ghost_size, shortcut, widening, depth and activation that the network has
    and that are not to be its own. Raises ValueError for a shape or width that it cannot take.
    """
    channels, space = shape[0], tuple(shape[1:])
    width = WIDTHS[name] if width is None else width
    if name == "cnn":
        return cnn(channels, space, classes, width, dropout)
    if name == "mlp":
        return mlp(tuple(shape), classes, width, dropout, **layers)
    if len(space) != 2:
        raise ValueError(
            f"--model {name} takes images, not samples of shape {tuple(shape)}; use --model cnn or "
            "mlp"
        )
    smallest = _SMALLEST.get(name.rstrip("0123456789"), 1)
    smallest *= 4 if layers.get("stem") == "imagenet" else 1
    if min(space) < smallest:
        raise ValueError(
            f"--model {name} takes images of at least {smallest} pixels a side, not of "
            f"{space[0]}×{space[1]}; use larger ones, or a resnet"
        )
    return _IMAGES[name][0](channels, classes, width, dropout, **layers)


def count_parameters(model: nn.Module) -> int:
    """The number of elements of all parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def decay_groups(
    model: nn.Module, weight_decay: float, only_weights: bool = False
) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer, all with weight decay, or `only_weights`.

    Those are the weights of convolutions and linear layers; biases and BatchNorm's scales and
    shifts are then in a second group without decay.
    """
    parameters = list(model.parameters())
    if not only_weights:
        return [{"params": parameters, "weight_decay": weight_decay}]
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    weights = {m.weight for m in model.modules() if isinstance(m, layers)}
    return [
        {"params": [p for p in parameters if p in weights], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in weights], "weight_decay": 0.0},
    ]
