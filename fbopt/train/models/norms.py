"""Normalisation layers of the ResNets, and what stands for them in a network without any.

ghost:     (x − mean_b)/std_b, with moments of sub-batches b of a chunk
skipinit:  x + a f(x), with a learnable number a from 0 on, and no normalisation in f
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # Wu & He (arXiv 1803.08494), section 4


def norm_layer(kind: str = "batch", ghost_size: int = 32) -> Callable[[int], nn.Module]:
    """What makes the layer of a kind from a number of channels.

    Args:
        kind: "batch"; "group", with 32 groups, or as many as divide both 32 and the channels;
            "ghost"; "skipinit", whose layers do nothing: see `skip_init`.
        ghost_size: samples per sub-batch of a "ghost".
    """
    kinds = {
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(math.gcd(GROUPS, channels), channels),
        "ghost": partial(GhostBatchNorm2d, ghost_size),
        "skipinit": lambda channels: nn.Identity(),
    }
    return kinds[kind]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over sub-batches of a batch (Hoffer et al. 2017, arXiv 1705.08741, algorithm 1).

    n samples make max(1, ⌊n/size⌋) sub-batches of consecutive samples, as equal as possible: none
    is smaller than `size`, unless n is. Running statistics follow the mean over the sub-batches of
    their means and variances, by their numbers of samples.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__(channels)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return each sub-batch normalised by itself; in evaluation as BatchNorm does."""
        count = max(1, len(x) // self.size)
        if count == 1 or not self.training:
            return super().forward(x)
        found, mean, var = [], 0.0, 0.0
        for part in x.tensor_split(count):
            moments = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            found.append(F.batch_norm(part, *moments, self.weight, self.bias, True, 1.0, self.eps))
            mean = mean + moments[0] * (len(part) / len(x))
            var = var + moments[1] * (len(part) / len(x))
        self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        self.running_var.mul_(1 - self.momentum).add_(var, alpha=self.momentum)
        self.num_batches_tracked.add_(1)
        return torch.cat(found)

    def extra_repr(self) -> str:
        """The size beside what BatchNorm shows."""
        return f"{super().extra_repr()}, size={self.size}"


class Scale(nn.Module):
    """A learnable number from 0 on that multiplies its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return weight·x."""
        return self.weight * x


def skip_init(model: nn.Module, block: type[nn.Module], last: str) -> None:
    """Give the blocks of a network without normalisation SkipInit's number, in place.

    The residual branch of a block ends in a `Scale`, named `last`, and every convolution has a bias
    (De & Smith 2020, arXiv 2002.10444, section 3). They write of blocks that begin with their
    activation; here these end with it.
    """
    for module in list(model.modules()):
        if isinstance(module, block):
            setattr(module, last, Scale())
        elif isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
