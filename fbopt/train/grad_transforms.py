"""Transformations of the full gradient before a step, in the order of the authors' release.

g ← g (1 − (1 − 1/N)^N)                                     running mean over N chunks
g ← g + strength·∇R(‖θ‖² − b²), with R(x) = |x| or x²/2     norm bias (Goldblum et al. 2019)
g ← g·min(1, max_norm/‖g‖)                                  clipping
g ← (g + a ξ)(1 + m ξ'), with ξ, ξ' normal                  noise (Langevin; Hoffer et al. 2017)

Their release adds sign(x) for |x|, without the factor 2θ of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fbopt import clip_grad_norm_
from fbopt._random import mix
from fbopt.train.config.options import Options
from fbopt.train.data.rng import NOISE


class GradientTransform:
    """Norm bias, clipping and noise on the ``p.grad`` of all parameters, as resolved options say.

    The noise is a function of (seed, step), the same on every rank.
    """

    def __init__(self, params: Iterable[Tensor], options: Options, chunks: int = 1) -> None:
        self.params, self.options, self.chunks = list(params), options, chunks

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """Transform the gradient of a step in place; return its norm before clipping."""
        params = [p for p in self.params if p.grad is not None]
        if self.options.mean == "running":
            torch._foreach_mul_([p.grad for p in params], self._running_total())
        if self.options.norm_bias:
            self._add_norm_bias(params)
        norm = clip_grad_norm_(params, self.options.max_norm or math.inf)
        if self.options.additive_noise or self.options.multiplicative_noise:
            self._add_noise(params, step)
        return norm

    def _running_total(self) -> float:
        """The sum of the weights of a running mean, by which a closure divides.

        The weights are (1/N)(1 − 1/N)^(N − 1 − i) for chunk i, see :func:`running_weight`.
        """
        return 1 - (1 - 1 / self.chunks) ** self.chunks

    def _add_norm_bias(self, params: Sequence[Tensor]) -> None:
        options = self.options
        excess = sum(p.square().sum() for p in self.params) - options.norm_bias_target**2
        if options.norm_bias_power == 1:
            excess = excess.sign()
        for p in params:
            p.grad += 2 * options.norm_bias * excess * p

    def _add_noise(self, params: Sequence[Tensor], step: int) -> None:
        generator = torch.Generator(params[0].device)
        generator.manual_seed(mix(self.options.seed, NOISE, step))
        for p in params:
            additive, multiplicative = (
                torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                for _ in range(2)
            )
            p.grad += self.options.additive_noise * additive
            p.grad *= 1 + self.options.multiplicative_noise * multiplicative


def running_weight(index: int, chunks: int, *, exact: bool) -> float:
    """The weight of a chunk in a ← a + (g − a)/N, in units of the last one's.

    A closure's mean with these weights is the running mean, but for their sum. For `exact` sums,
    which take multiples of 2^-24, it is rounded to one.
    """
    weight = (1 - 1 / chunks) ** (chunks - 1 - index)
    return round(weight * 2**24) / 2**24 if exact else weight
