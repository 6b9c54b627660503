"""NFNet-F0 (Brock et al. 2021, arXiv 2102.06171): a residual network without BatchNorm.

x_{k+1} = shortcut(x_k) + α a_k f(x_k/β_k), with β_k² = β_{k−1}² + α² the expected variance, a_k a
learnable number from 0 on, and weights of zero mean and variance 1/fan-in (times a learnable gain).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbopt.train.models.norms import Scale
from fbopt.train.models.resnet import classifier

ALPHA = 0.2
_DEPTHS, _WIDTHS = (1, 2, 6, 3), (2, 4, 12, 12)  # blocks; channels as multiples of the stem's 128
GELU_GAIN = 1.7015043497085571  # after it the GELU of a normal variable has variance 1


def nfnet(
    channels: int,
    classes: int,
    width: int = 128,
    dropout: float = 0.0,
    *,
    stem: str = "cifar",
) -> nn.Module:
    """NFNet-F0 with a CIFAR stem of one 3×3 convolution, or the published one for "imagenet".

    Stages of `width` times 2, 4, 12 and 12 channels; the 3×3 convolutions are in groups of `width`
    channels. No dropout or stochastic depth unless told to. With the published stem and 1,000
    classes: 71.5 million parameters.
    """
    layers: list[tuple[str, nn.Module]] = [("stem", nn.Sequential(*_stem(stem, channels, width)))]
    inner, variance = width, 1.0
    for stage, (count, times) in enumerate(zip(_DEPTHS, _WIDTHS, strict=True)):
        blocks: list[nn.Module] = []
        for index in range(count):
            stride = 2 if stage and index == 0 else 1
            blocks.append(NFBlock(inner, times * width, width, stride, variance**-0.5))
            inner = times * width
            variance = (1.0 if index == 0 else variance) + ALPHA**2  # a transition starts anew
        layers.append((f"stage{stage + 1}", nn.Sequential(*blocks)))
    layers += [("last", ScaledConv2d(inner, 2 * inner, 1)), ("gelu", ScaledGELU())]
    model = classifier(layers, 2 * inner, classes, dropout)
    nn.init.normal_(model.linear.weight, std=0.01)
    nn.init.zeros_(model.linear.bias)
    return model


def _stem(kind: str, channels: int, width: int) -> list[nn.Module]:
    if kind == "cifar":
        return [ScaledConv2d(channels, width, 3)]
    layers: list[nn.Module] = []
    inner = channels
    for part, stride in ((8, 2), (4, 1), (2, 1), (1, 2)):
        outer = max(1, width // part)
        layers += [ScaledConv2d(inner, outer, 3, stride), ScaledGELU()]
        inner = outer
    return layers[:-1]


class ScaledConv2d(nn.Conv2d):
    """A convolution with scaled weight standardisation: W ← gain (W − mean)/√(variance·fan-in).

    Mean and variance are those of an output channel (Brock et al. 2021, equation 2).
    """

    def __init__(self, inner: int, outer: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inner, outer, size, stride, size // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(outer, 1, 1, 1))
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with the standardised weights."""
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        scale = self.gain * (var * self.weight[0].numel()).clamp_min(1e-4).rsqrt()
        return self._conv_forward(x, (self.weight - mean) * scale, self.bias)


class ScaledGELU(nn.Module):
    """GELU, scaled to keep the variance of a normal variable."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1.7015·gelu(x)."""
        return F.gelu(x) * GELU_GAIN


class NFBlock(nn.Module):
    """A bottleneck of 1×1, two grouped 3×3 and 1×1, with squeeze and excitation."""

    def __init__(self, inner: int, outer: int, group: int, stride: int, beta: float) -> None:
        super().__init__()
        half = outer // 2
        groups = half // group
        self.beta, self.gelu = beta, ScaledGELU()
        self.convolutions = nn.Sequential(
            ScaledConv2d(inner, half, 1), ScaledGELU(),
            ScaledConv2d(half, half, 3, stride, groups), ScaledGELU(),
            ScaledConv2d(half, half, 3, 1, groups), ScaledGELU(),
            ScaledConv2d(half, outer, 1),
        )  # fmt: skip
        self.excitation = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(outer, half), nn.ReLU(inplace=True), nn.Linear(half, outer), nn.Sigmoid(),
        )  # fmt: skip
        self.scale = Scale()
        self.shortcut = None
        if stride > 1 or inner != outer:
            # ceil_mode: odd sides stay as long as the strided 3×3 convolution leaves them.
            pool = [nn.AvgPool2d(2, ceil_mode=True)] if stride > 1 else []
            self.shortcut = nn.Sequential(*pool, ScaledConv2d(inner, outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut and the scaled residual."""
        active = self.gelu(x) * self.beta
        shortcut = x if self.shortcut is None else self.shortcut(active)
        residual = self.convolutions(active)
        residual = 2 * self.excitation(residual)[:, :, None, None] * residual
        return ALPHA * self.scale(residual) + shortcut
