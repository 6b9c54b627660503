"""Residual networks for small images: the paper's, and He et al.'s for CIFAR.

relu(x + f(x)), with f two 3×3 convolutions, or a bottleneck of 1×1, 3×3 and 1×1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fbopt.train.config.dataspec import require

_BLOCKS = {  # per stage, He et al. (arXiv 1512.03385), table 1
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet(
    depth: int, channels: int, classes: int, width: int = 64, dropout: float = 0.0
) -> nn.Module:
    """ResNet-18, 34, 50, 101 or 152 as in Geiping et al. (arXiv 2109.14119, appendix A).

    A 3×3 stem without pooling; shortcuts downsample by an average pool, a 1×1 convolution and
    BatchNorm; convolutions start Kaiming-normal (fan-out), the last BatchNorm of a block at zero.
    From depth 50 on the blocks are torchvision's bottlenecks, with the stride in the 3×3.
    ResNet-18: 11,173,962 parameters for 3 channels, 10 classes and width 64.
    """
    block, expansion, last = BasicBlock, 1, "bn2"
    if depth >= 50:
        torchvision = require(f"--model resnet{depth}", "torchvision", "torchvision.models.resnet")
        block, expansion, last = torchvision.Bottleneck, 4, "bn3"
    layers, features = _stages(channels, width, _BLOCKS[depth], block, expansion, _shortcut)
    model = classifier(layers, features, classes, dropout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, block):
            nn.init.zeros_(getattr(module, last).weight)
    return model


def start_branches_at_one(model: nn.Module) -> None:
    """Let the last BatchNorm of every block start with scale 1, as the authors' code does.

    It looks for parameters by a name that none has, "skip_residual" for "skip-residual".
    """
    for module in model.modules():
        if hasattr(module, "downsample"):
            last = module.bn3 if hasattr(module, "bn3") else module.bn2
            nn.init.ones_(last.weight)


def cifar_resnet(
    depth: int, channels: int, classes: int, width: int = 16, dropout: float = 0.0
) -> nn.Module:
    """ResNet-20, 32, 56 or 110 as in He et al. (arXiv 1512.03385, section 4.2).

    Three stages of (depth − 2)/6 blocks with 16, 32 and 64 channels, no parameter in a shortcut
    (option A), convolutions from Kaiming-normal (fan-in, arXiv 1502.01852, equation 10).
    """
    counts = [(depth - 2) // 6] * 3
    layers, features = _stages(channels, width, counts, BasicBlock, 1, _padded_shortcut)
    model = classifier(layers, features, classes, dropout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def classifier(
    layers: Sequence[tuple[str, nn.Module]], features: int, classes: int, dropout: float
) -> nn.Sequential:
    """`layers`, then the mean over the image, and a linear layer from `features` to `classes`."""
    tail = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    tail += [("dropout", nn.Dropout(dropout))] if dropout else []
    return nn.Sequential(OrderedDict([*layers, *tail, ("linear", nn.Linear(features, classes))]))


def _stages(
    channels: int,
    width: int,
    counts: Sequence[int],
    block: type[nn.Module],
    expansion: int,
    shortcut: Callable[[int, int, int], nn.Module | None],
) -> tuple[list[tuple[str, nn.Module]], int]:
    """The stem, a stage for each of `counts` blocks, and the number of features they end in."""
    layers = [
        ("stem", nn.Conv2d(channels, width, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    inner = width
    for index, count in enumerate(counts):
        planes, stride = width * 2**index, 1 if index == 0 else 2
        outer = planes * expansion
        blocks = [block(inner, planes, stride, shortcut(inner, outer, stride))]
        blocks += [block(outer, planes) for _ in range(count - 1)]
        layers.append((f"stage{index + 1}", nn.Sequential(*blocks)))
        inner = outer
    return layers, inner


def _shortcut(inner: int, outer: int, stride: int) -> nn.Module | None:
    """The downsampling shortcut; None where input and output have the same shape."""
    if stride == 1 and inner == outer:
        return None
    # ceil_mode: odd sides stay as long as the strided 3×3 convolution leaves them.
    pool = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
    return nn.Sequential(*pool, nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer))


def _padded_shortcut(inner: int, outer: int, stride: int) -> nn.Module | None:
    """Every other pixel, and zeros for the new channels: no parameters (option A)."""
    if inner == outer:
        return None
    return nn.Sequential(
        nn.AvgPool2d(1, stride), nn.ConstantPad3d((0, 0, 0, 0, 0, outer - inner), 0.0)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; the modules are named as in torchvision."""

    def __init__(
        self, inner: int, outer: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(residual) + shortcut)
