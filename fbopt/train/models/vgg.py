"""VGG networks with BatchNorm for images of 32×32."""

from __future__ import annotations

from torch import nn

from fbopt.train.models.parts import classifier

_LAYERS = {  # 3×3 convolutions before each of five max-pools
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


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
    for stage, count in enumerate(_LAYERS[depth]):
        outer = width * min(2**stage, 8)
        modules: list[nn.Module] = []
        for _ in range(count):
            modules += [
                nn.Conv2d(inner, outer, 3, padding=1),
                nn.BatchNorm2d(outer),
                nn.ReLU(inplace=True),
            ]
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
