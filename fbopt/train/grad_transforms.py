"""Transformations of the full gradient before a step, in the order of the authors' release.

g ← g (1 − (1 − 1/N)^N)                                     running mean over N chunks
g ← g + strength·∇R(‖θ‖² − b²), with R(x) = |x| or x²/2     norm bias (Goldblum et al. 2019)
g_i ← g_i·min(1, c·max(‖w_i‖, 10⁻³)/‖g_i‖)                  adaptive clipping, unit by unit
g ← g·min(1, max_norm/‖g‖)                                  clipping, by a p-norm
g ← (g + a ξ)(1 + m ξ'), with ξ, ξ' normal                  noise (Langevin; Hoffer et al. 2017)

Their release adds sign(x) for |x|, without the factor 2θ of its gradient, and has no adaptive
clipping. Mini-batches are clipped only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt import clip_grad_norm_
from fbopt._random import mix
from fbopt.reference import clip_coefficient
from fbopt.train.config.options import Options
from fbopt.train.data.rng import NOISE
from fbopt.train.unit_clip import clip_units_


class ClipHistory:
    """The norms of the last k gradients, and the largest of them, on the device.

    Before there are k it is the largest so far; before the first, infinite.
    """

    def __init__(self, length: int, like: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.norms = torch.zeros(length, dtype=dtype, device=like.device)
        self.count = 0  # of norms so far

    def bound(self) -> Tensor | float:
        """The largest norm, infinite for one that is undefined; nothing is read on the host."""
        known = self.norms.nan_to_num(nan=math.inf, posinf=math.inf)
        return known.max() if self.count else math.inf

    def add(self, norm: Tensor) -> None:
        """Put a norm in the place of the oldest."""
        self.norms[self.count % len(self.norms)] = norm
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The norms and how many there were."""
        return {"norms": self.norms, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.norms.copy_(state["norms"])
        self.count = state["count"]


class GradientTransform:
    """Norm bias, clipping and noise on the ``p.grad`` of all parameters, as resolved options say.

    The noise is a function of (seed, step), the same on every rank. `spared` are the parameters
    that adaptive clipping leaves alone.

    Attributes:
        history: the norms that `clip_history` clips to; None without.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        options: Options,
        spared: Iterable[Tensor] = (),
        chunks: int = 1,
    ) -> None:
        self.params, self.options = list(params), options
        self.spared, self.chunks = set(spared), chunks
        length = options.clip_history
        self.history = ClipHistory(length, self.params[0]) if length else None
        self._clipped: tuple[Tensor | float, Tensor] | None = None  # the last bound and norm

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """Transform the gradient of a step in place; return its norm before clipping."""
        params = self._moved()
        if self.options.mean == "running":
            torch._foreach_mul_([p.grad for p in params], self.total)
        if self.options.norm_bias:
            self._add_norm_bias(params)
        norm = self.clip()
        if self.options.additive_noise or self.options.multiplicative_noise:
            self._add_noise(params, step)
        return norm

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Clip the gradient in place, by units, then as a whole; return its norm before."""
        params, order, before = self._moved(), self.options.norm_type, None
        if self.options.agc:
            before = clip_grad_norm_(params, math.inf, order)
            clip_units_([p for p in params if p not in self.spared], self.options.agc)
        bound = self.bound()
        norm = clip_grad_norm_(params, bound, order)
        self._clipped = bound, norm
        if self.history is not None:
            self.history.add(norm)
        return norm if before is None else before

    def bound(self) -> Tensor | float:
        """What the next gradient as a whole is clipped to; infinite for no clipping."""
        most = self.options.max_norm or math.inf
        largest = math.inf if self.history is None else self.history.bound()
        return largest.clamp(max=most) if isinstance(largest, Tensor) else min(largest, most)

    def coefficient(self) -> float:
        """The factor that the last gradient as a whole was scaled by; read from the device."""
        if self._clipped is None or self._clipped[0] == math.inf:
            return 1.0
        return float(clip_coefficient(*self._clipped))

    def _moved(self) -> list[Tensor]:
        return [p for p in self.params if p.grad is not None]

    @property
    def total(self) -> float:
        """The sum of the weights of the mean over chunks: 1, but of a running mean.

        Those weights are (1/N)(1 − 1/N)^(N − 1 − i) for chunk i, see :func:`running_weight`, and a
        closure divides by their sum.
        """
        running = self.options.mean == "running"
        return 1 - (1 - 1 / self.chunks) ** self.chunks if running else 1.0

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
