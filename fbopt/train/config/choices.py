"""What options with a fixed set of values can be."""

from __future__ import annotations

from typing import Literal

RecipeName = Literal[
    "sgd", "fb", "fb-long", "fb-clip", "fb-penalty", "fb-strong",
    "sgd-aug", "fb-aug", "fb-long-aug", "fb-clip-aug", "fb-penalty-aug", "fb-strong-aug",
    "fb-shuffled-aug",
    "sgd-x10", "fb-x10", "fb-long-x10", "fb-clip-x10", "fb-penalty-x10", "fb-strong-x10",
    "fb-penalty-x40",
]  # fmt: skip
ModelName = Literal[
    "cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnet20", "resnet32", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19",
    "densenet121", "densenet169",
]  # fmt: skip
Method = Literal["forward", "central", "exact"]
Accumulation = Literal["float32", "exact"]
Augment = Literal["none", "random", "fixed"]
Sampling = Literal["fixed", "shuffled", "replacement"]
Precision = Literal["fp32", "tf32", "bf16"]
TRACKED = ("sharpness", "noise")
