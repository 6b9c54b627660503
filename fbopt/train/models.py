"""Two networks: a small CNN without BatchNorm, and the paper's ResNet-18 for 32×32 images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

NAMES = ("cnn", "resnet18")
WIDTHS = {"cnn": 25, "resnet18": 64}


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    width: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """The network `name` for samples of `shape` (channels, length) or (channels, height, width).

    It maps float32 (n, *shape) to logits (n, classes); `dropout` is the probability with which an
    input of the last layer is dropped. Raises ValueError for a shape that the network cannot take.
    """
    channels, space = shape[0], tuple(shape[1:])
    width = WIDTHS[name] if width is None else width
    if name == "cnn":
        return cnn(channels, space, classes, width, dropout)
    if len(space) != 2:
        raise ValueError(
            f"--model resnet18 takes images, not samples of shape {tuple(shape)}; use --model cnn"
        )
    return resnet18(channels, classes, width, dropout)


def cnn(
    channels: int, space: tuple[int, ...], classes: int, width: int = 25, dropout: float = 0.0
) -> nn.Module:
    """Three convolutions of stride 2 and a linear layer, in one or two dimensions, no BatchNorm.

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


def resnet18(channels: int, classes: int, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """ResNet-18 as in Geiping et al. (arXiv 2109.14119, appendix A), for images of 32×32.

    A 3×3 stem without pooling; shortcuts downsample by an average pool, a 1×1 convolution and
    BatchNorm; convolutions start Kaiming-normal (fan-out), the last BatchNorm of a block at zero.
    11,173,962 parameters for 3 channels, 10 classes and width 64.
    """

    def stage(inner: int, outer: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1:
            # ceil_mode: odd sides stay as long as the strided 3×3 convolution leaves them.
            shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inner, outer, 1, bias=False),
                nn.BatchNorm2d(outer),
            )
        return nn.Sequential(BasicBlock(inner, outer, stride, shortcut), BasicBlock(outer, outer))

    layers: list[tuple[str, nn.Module]] = [
        ("stem", nn.Conv2d(channels, width, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    inner = width
    for index, outer in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers.append((f"stage{index + 1}", stage(inner, outer, stride=1 if index == 0 else 2)))
        inner = outer
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    if dropout:
        layers.append(("dropout", nn.Dropout(dropout)))
    model = nn.Sequential(OrderedDict([*layers, ("linear", nn.Linear(inner, classes))]))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
    return model


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


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns (shared ones once)."""
    parameters: list[Tensor] = list(model.parameters())
    return sum(p.numel() for p in parameters)
