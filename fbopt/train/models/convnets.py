"""The small CNN, VGG and DenseNet."""

from __future__ import annotations

from torch import nn

from fbopt.train.config.dataspec import require
from fbopt.train.models.resnet import classifier

_VGG_LAYERS = {  # 3×3 convolutions before each of five max-pools
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_DENSENET_BLOCKS = {
    121: (6, 12, 24, 16),
    161: (6, 12, 36, 24),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
}


def cnn(
    channels: int, space: tuple[int, ...], classes: int, width: int = 25, dropout: float = 0.0
) -> nn.Module:
    """Three convolutions of stride 2 with ReLU, and a linear layer, in one or two dimensions.

    In one dimension this is MNIST-1D's own convolutional baseline (Greydanus & Kobak 2020,
    arXiv 2011.14439); the kernels are 5, 3 and 3 wide, the padding 1. There is no BatchNorm.
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


def vgg(
    depth: int, channels: int, classes: int, width: int = 64, dropout: float = 0.0
) -> nn.Module:
    """VGG-11, 13, 16 or 19 (Simonyan & Zisserman, arXiv 1409.1556, table 1: A, B, D, E).

    BatchNorm follows every convolution. As is usual for CIFAR there is one linear layer instead of
    ImageNet's three, from the 512 features of the last pixel (for images above 32×32 the mean over
    pixels). Starts as torchvision's: Kaiming-normal (fan-out), the linear layer at 0.01.
    """
    layers: list[tuple[str, nn.Module]] = []
    inner = channels
    for stage, count in enumerate(_VGG_LAYERS[depth]):
        outer = width * min(2**stage, 8)
        modules: list[nn.Module] = []
        for _ in range(count):
            convolution = nn.Conv2d(inner, outer, 3, padding=1)
            modules += [convolution, nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
            inner = outer
        layers.append((f"stage{stage + 1}", nn.Sequential(*modules, nn.MaxPool2d(2))))
    model = classifier(layers, inner, classes, dropout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return model


def densenet(
    depth: int,
    channels: int,
    classes: int,
    width: int = 64,
    dropout: float = 0.0,
    *,
    stem: str = "cifar",
) -> nn.Module:
    """DenseNet-BC-121, 161, 169 or 201 (Huang et al., arXiv 1608.06993, table 1).

    With a CIFAR stem: one 3×3 convolution to `width` channels, BatchNorm and ReLU, without pooling;
    or ImageNet's 7×7 convolution of stride 2 and max-pool. The growth rate is width/2, so 32 as
    published, and 48 for DenseNet-161 with its width of 96; compression 1/2, bottlenecks of four
    times the growth. Blocks and initial values are torchvision's.
    """
    if width < 2:
        raise ValueError(f"--width {width}: densenet{depth} grows by half of it, so at least 2")
    torchvision = require(f"--model densenet{depth}", "torchvision", "torchvision.models.densenet")
    network = torchvision.DenseNet(
        growth_rate=width // 2,
        block_config=_DENSENET_BLOCKS[depth],
        num_init_features=width,
        num_classes=classes,
    )
    features = network.features
    size, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
    features.conv0 = nn.Conv2d(channels, width, size, stride, padding, bias=False)
    nn.init.kaiming_normal_(features.conv0.weight)
    if stem == "cifar":
        del features.pool0
    layers = [("features", features), ("relu", nn.ReLU(inplace=True))]
    model = classifier(layers, network.classifier.in_features, classes, dropout)
    nn.init.zeros_(model.linear.bias)
    return model
