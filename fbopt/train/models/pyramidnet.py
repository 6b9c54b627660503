"""PyramidNets for small images: residual networks whose channels grow a little in every block.

D_k = D_{k−1} + α/N for block k of N, from D_0 = `width`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fbopt.train.models.resnet import classifier

WIDENING = {110: 84, 272: 200}  # α, as in the release of Geiping et al. (2021)
_EXPANSION = {110: 1, 272: 4}


def pyramidnet(
    depth: int,
    channels: int,
    classes: int,
    width: int = 16,
    dropout: float = 0.0,
    *,
    widening: int | None = None,
) -> nn.Module:
    """PyramidNet-110, or 272 of bottlenecks (Han et al. 2017, arXiv 1610.02915, table 1).

    Shortcuts are the input itself, averaged over 2×2 pixels where the side is halved, with zeros
    for the new channels; there is no ReLU after an addition, nor before a block's first
    convolution. α is `widening`, by default 84 or 200, times width/16; D_k is rounded;
    convolutions start Kaiming-normal (fan-out). For 10 classes PyramidNet-110 has 3.90 million
    parameters with α = 84 and 28.49 with 270, PyramidNet-272 has 26.21 with 200, like the authors'
    code; their table says 3.8, 28.3 and 26.0.
    """
    expansion = _EXPANSION[depth]
    blocks = (depth - 2) // (6 if expansion == 1 else 9)  # of each of three stages
    added = (WIDENING[depth] if widening is None else widening) * width / 16 / (3 * blocks)
    layers: list[tuple[str, nn.Module]] = [
        ("stem", nn.Conv2d(channels, width, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
    ]
    inner = width
    for stage in range(3):
        made: list[nn.Module] = []
        for index in range(stage * blocks, (stage + 1) * blocks):
            planes = round(width + added * (index + 1))
            stride = 2 if stage and index == stage * blocks else 1
            made.append(PyramidBlock(inner, planes, stride, expansion))
            inner = planes * expansion
        layers.append((f"stage{stage + 1}", nn.Sequential(*made)))
    layers += [("last_norm", nn.BatchNorm2d(inner)), ("relu", nn.ReLU(inplace=True))]
    model = classifier(layers, inner, classes, dropout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class PyramidBlock(nn.Module):
    """x + f(x), with f two 3×3 convolutions, or a bottleneck (`expansion` 4)."""

    def __init__(self, inner: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        shapes = [(inner, planes, 3, stride), (planes, planes, 3, 1)]
        if expansion > 1:
            outer = planes * expansion
            shapes = [(inner, planes, 1, 1), (planes, planes, 3, stride), (planes, outer, 1, 1)]
        self.residual = nn.Sequential(*_residual(shapes))
        pool = [nn.AvgPool2d(2, ceil_mode=True)] if stride > 1 else []
        more = nn.ConstantPad3d((0, 0, 0, 0, 0, planes * expansion - inner), 0.0)
        self.shortcut = nn.Sequential(*pool, more)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual beside the input, widened with zeros."""
        return self.residual(x) + self.shortcut(x)


def _residual(shapes: Sequence[tuple[int, int, int, int]]) -> list[nn.Module]:
    """BatchNorm and convolution in turn, ReLU before all but the first, BatchNorm at the end."""
    layers: list[nn.Module] = []
    for index, (inner, outer, size, stride) in enumerate(shapes):
        layers.append(nn.BatchNorm2d(inner))
        layers += [nn.ReLU(inplace=True)] if index else []
        layers.append(nn.Conv2d(inner, outer, size, stride, size // 2, bias=False))
    return [*layers, nn.BatchNorm2d(outer)]
