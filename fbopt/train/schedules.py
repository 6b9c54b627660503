"""The learning rate by pass, as a share of its peak: linear warm-up, then what `--schedule` says.

With p the passes since the warm-up:

    cosine       floor + (1 − floor)·(1 + cos(π·min(1, p/cosine)))/2
    step         gamma^(milestones that have passed)
    exponential  gamma^p
    constant     1
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fbopt.train.config.options import Options


def build_scheduler(options: Options, optimizer: Optimizer) -> LambdaLR:
    """The schedule of resolved options."""
    return LambdaLR(optimizer, lambda done: lr_factor(done, options))


def lr_factor(done: int, options: Options) -> float:
    """The learning rate after `done` passes, as a share of its peak, with resolved options.

    A milestone is a share of all passes, the warm-up's included. The cosine is the paper's (arXiv
    2109.14119, section 4); its floor, the milestones and gammas are those of the authors' release.
    """
    if done < options.warmup:
        return (done + (options.first_rate != "zero")) / options.warmup
    after = done - options.warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "exponential":
        return options.gamma**after
    if options.schedule == "step":
        return options.gamma ** sum(
            done >= round(share * options.passes, 6) for share in options.milestone_shares
        )
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, after / options.cosine)))
    return options.floor + (1 - options.floor) * share
