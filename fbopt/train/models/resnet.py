"""Residual networks for small images: the paper's, and He et al.'s for CIFAR.

relu(x + f(x)), with f two 3×3 convolutions, or a bottleneck of 1×1, 3×3 and 1×1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from fbopt.train.config.dataspec import require
from fbopt.train.models.norms import norm_layer, skip_init

_BLOCKS = {  # per stage, He et al. (arXiv 1512.03385), table 1
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet(
    depth: int,
    channels: int,
    classes: int,
    width: int = 64,
    dropout: float = 0.0,
    *,
    stem: str = "cifar",
    norm: str = "batch",
    ghost_size: int = 32,
    shortcut: str = "pool",
) -> nn.Module:
    """ResNet-18, 34, 50, 101 or 152 as in Geiping et al. (arXiv 2109.14119, appendix A).

    A 3×3 stem without pooling; shortcuts downsample by an average pool, a 1×1 convolution and
    BatchNorm; convolutions start Kaiming-normal (fan-out), the last BatchNorm of a block at zero.
    From depth 50 on the blocks are torchvision's bottlenecks, with the stride in the 3×3.
    ResNet-18: 11,173,962 parameters for 3 channels, 10 classes and width 64. The stem "imagenet" is
    a 7×7 convolution of stride 2 and a max-pool, `norm` as in `norm_layer`, `shortcut` A, B, C or
    pool.
    """
    block, expansion, last = BasicBlock, 1, "bn2"
    if depth >= 50:
        torchvision = require(f"--model resnet{depth}", "torchvision", "torchvision.models.resnet")
        block, expansion, last = torchvision.Bottleneck, 4, "bn3"
    make_norm = norm_layer(norm, ghost_size)
    layers = _stem(stem, channels, width, make_norm)
    stages, features = _stages(width, _BLOCKS[depth], block, expansion, make_norm, shortcut)
    model = classifier([*layers, *stages], features, classes, dropout)
    if norm == "skipinit":
        skip_init(model, block, last)
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
    depth: int,
    channels: int,
    classes: int,
    width: int = 16,
    dropout: float = 0.0,
    *,
    norm: str = "batch",
    ghost_size: int = 32,
    shortcut: str = "A",
) -> nn.Module:
    """ResNet-20, 32, 56 or 110 as in He et al. (arXiv 1512.03385, section 4.2).

    Three stages of (depth − 2)/6 blocks with 16, 32 and 64 channels, no parameter in a shortcut
    (option A), convolutions from Kaiming-normal (fan-in, arXiv 1502.01852, equation 10). `norm` and
    `shortcut` as in `resnet`.
    """
    counts, make_norm = [(depth - 2) // 6] * 3, norm_layer(norm, ghost_size)
    stages, features = _stages(width, counts, BasicBlock, 1, make_norm, shortcut)
    model = classifier(
        [*_stem("cifar", channels, width, make_norm), *stages], features, classes, dropout
    )
    if norm == "skipinit":
        skip_init(model, BasicBlock, "bn2")
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


def _stem(
    kind: str, channels: int, width: int, norm: Callable[[int], nn.Module]
) -> list[tuple[str, nn.Module]]:
    """The layers before the stages: 3×3, or ImageNet's 7×7 of stride 2 and max-pool."""
    large = kind == "imagenet"
    size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
    layers = [
        ("stem", nn.Conv2d(channels, width, size, stride, padding, bias=False)),
        ("norm", norm(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    return layers + ([("maxpool", nn.MaxPool2d(3, 2, 1))] if large else [])


def _stages(
    width: int,
    counts: Sequence[int],
    block: type[nn.Module],
    expansion: int,
    norm: Callable[[int], nn.Module],
    kind: str,
) -> tuple[list[tuple[str, nn.Module]], int]:
    """A stage for each of `counts` blocks, and the number of features they end in."""
    make, shortcut = partial(block, norm_layer=norm), partial(_shortcut, kind, norm)
    layers, inner = [], width
    for index, count in enumerate(counts):
        planes, stride = width * 2**index, 1 if index == 0 else 2
        outer = planes * expansion
        blocks = [make(inner, planes, stride, shortcut(inner, outer, stride))]
        blocks += [make(outer, planes, 1, shortcut(outer, outer, 1)) for _ in range(count - 1)]
        layers.append((f"stage{index + 1}", nn.Sequential(*blocks)))
        inner = outer
    return layers, inner


def _shortcut(
    kind: str, norm: Callable[[int], nn.Module], inner: int, outer: int, stride: int
) -> nn.Module | None:
    """The shortcut of a block; None for the input itself.

    He et al. (arXiv 1512.03385, section 4.1): A, every other pixel and zeros for new channels; B,
    a 1×1 convolution where the shape changes; C, one in every block. "pool" is B with an average
    pool before the convolution instead of its stride.
    """
    if kind != "C" and stride == 1 and inner == outer:
        return None
    if kind == "A":
        more = nn.ConstantPad3d((0, 0, 0, 0, 0, outer - inner), 0.0)
        return nn.Sequential(nn.AvgPool2d(1, stride), more)
    # ceil_mode: odd sides stay as long as the strided 3×3 convolution leaves them.
    pool = [nn.AvgPool2d(stride, ceil_mode=True)] if kind == "pool" and stride > 1 else []
    convolution = nn.Conv2d(inner, outer, 1, 1 if pool else stride, bias=False)
    return nn.Sequential(*pool, convolution, norm(outer))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; the modules are named as in torchvision."""

    def __init__(
        self,
        inner: int,
        outer: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = norm_layer(outer)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(residual) + shortcut)
