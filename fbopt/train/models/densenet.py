"""DenseNets for small images: torchvision's blocks after a stem without downsampling."""

from __future__ import annotations

from torch import nn

from fbopt.train.models.parts import classifier, torchvision_models

_BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32)}


def densenet(
    depth: int, channels: int, classes: int, width: int = 64, dropout: float = 0.0
) -> nn.Module:
    """DenseNet-BC-121 or 169 (Huang et al., arXiv 1608.06993, table 1) with a CIFAR stem.

    The stem is one 3×3 convolution to `width` channels, BatchNorm and ReLU, without pooling; the
    growth rate is width/2, so 32 as published; compression 1/2, bottlenecks of four times the
    growth. Initial values as in torchvision.
    """
    if width < 2:
        raise ValueError(f"--width {width}: densenet{depth} grows by half of it, so at least 2")
    network = torchvision_models(f"densenet{depth}").DenseNet(
        growth_rate=width // 2,
        block_config=_BLOCKS[depth],
        num_init_features=width,
        num_classes=classes,
    )
    features = network.features
    features.conv0 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(features.conv0.weight)
    del features.pool0
    layers = [("features", features), ("relu", nn.ReLU(inplace=True))]
    model = classifier(layers, network.classifier.in_features, classes, dropout)
    nn.init.zeros_(model.linear.bias)
    return model
