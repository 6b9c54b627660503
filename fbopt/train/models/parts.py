"""The classifier that the networks for images end in, and the import of torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType

from torch import nn


def classifier(
    layers: Sequence[tuple[str, nn.Module]], features: int, classes: int, dropout: float
) -> nn.Sequential:
    """`layers`, then the mean over the image, and a linear layer from `features` to `classes`."""
    tail: list[tuple[str, nn.Module]] = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    if dropout:
        tail.append(("dropout", nn.Dropout(dropout)))
    return nn.Sequential(OrderedDict([*layers, *tail, ("linear", nn.Linear(features, classes))]))


def torchvision_models(name: str) -> ModuleType:
    """torchvision.models, for the network `name`. Raises ValueError where it is not installed."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"--model {name} needs the package torchvision: pip install torchvision"
        ) from error
    return models
