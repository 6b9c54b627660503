"""A network and its chunks for tests of line searches."""

from __future__ import annotations

import torch
from torch import nn

SEARCHES = ["strong_wolfe", "armijo", "nonmonotone"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(count=50):
    """Inputs that say nothing of their labels: the least loss is not zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator).double()
    y = torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))
