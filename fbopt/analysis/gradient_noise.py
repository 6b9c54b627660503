"""Gradient norms of the full batch and of chunks, and the gradient noise scale tr(S)/|G|^2.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162),
appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._checks import check_grads
from fbopt._ops import dispatch
from fbopt.analysis.checks import check
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class GradientStatistics:
    """Norms of the gradients of one pass over the chunks, and estimates of signal and noise.

    Samples are assumed independent. If one sample's gradient has mean G and covariance S, that of
    chunk c, of n_c samples, has ``E |g_c|^2 = |G|^2 + tr(S)/n_c``, and the full-batch gradient g,
    of N samples, ``E |g|^2 = |G|^2 + tr(S)/N``. The mean over the C chunks, weighted by n_c/N,

        M = sum_c (n_c/N) |g_c|^2   has   E M = |G|^2 + tr(S) C/N,

    for ragged chunks too: the expectation for one batch of N/C samples. N/C and N are the two batch
    sizes of the paper's estimates, each unbiased:

        tr(S) ~ (M - |g|^2) N / (C - 1)          |G|^2 ~ (C |g|^2 - M) / (C - 1)

    Their ratio is the noise scale, in samples: the batch size at which noise and signal are equal.
    The ratio is not unbiased. Near a minimum, where |G|^2 is smaller than its own error, the
    estimate of |G|^2 can be negative, and the ratio is None. With BatchNorm by chunk the samples of
    a chunk are not independent; S then describes how the chunks' gradients vary.

    Attributes:
        loss: the full-batch loss.
        chunks, samples: C and N.
        gradient_norm: |g|.
        chunk_norm_mean, chunk_norm_deviation: mean and standard deviation of |g_c|, weighted by
            n_c/N.
        mean_squared_chunk_norm: M.
        squared_signal: the estimate of |G|^2; None for a single chunk.
        noise_trace: the estimate of tr(S); None for a single chunk.
        momentum_angle: angle between g and the momentum buffers in degrees, 0 if they are parallel;
            None without momentum or if either is zero.
    """

    loss: float
    chunks: int
    samples: float
    gradient_norm: float
    chunk_norm_mean: float
    chunk_norm_deviation: float
    mean_squared_chunk_norm: float
    squared_signal: float | None
    noise_trace: float | None
    momentum_angle: float | None

    @property
    def noise_scale(self) -> float | None:
        """tr(S)/|G|^2, in samples; None if the estimate of |G|^2 is not positive."""
        if self.squared_signal is None or self.noise_trace is None or self.squared_signal <= 0:
            return None
        return self.noise_trace / self.squared_signal

    @property
    def chunk_signal_to_noise(self) -> float | None:
        """|G|^2/(tr(S) C/N), of a chunk of the mean size; negative if the estimate of |G|^2 is."""
        return self._signal_to_noise(self.samples / self.chunks)

    @property
    def full_signal_to_noise(self) -> float | None:
        """|G|^2/(tr(S)/N), of the full-batch gradient as an estimate of G."""
        return self._signal_to_noise(self.samples)

    def _signal_to_noise(self, batch: float) -> float | None:
        if self.squared_signal is None or not self.noise_trace:  # a single chunk, or no noise
            return None
        return self.squared_signal * batch / self.noise_trace

    def as_json(self) -> dict[str, float | int | None]:
        """All attributes and properties as plain numbers."""
        names = ("noise_scale", "chunk_signal_to_noise", "full_signal_to_noise")
        return vars(self) | {name: getattr(self, name) for name in names}


def gradient_statistics(
    objective: Objective, momentum: Sequence[Tensor | None] | None = None
) -> GradientStatistics:
    """Measure the gradient's norms and noise in one pass, holding one chunk's gradient at a time.

    Args:
        objective: the loss.
        momentum: momentum buffers, one for each of ``objective.params`` (None: no buffer).

    Raises:
        TypeError, ValueError: momentum does not match the parameters; weights or the loss are not
            finite.
        RuntimeError: the loss is not deterministic.
    """
    if momentum is not None:
        check_grads(momentum, objective.params, "momentum")
    check(objective)
    squares: list[Tensor] = []
    objective.accumulate(lambda weight, loss, grads: squares.append(_squared_norm(grads)))
    mean = objective.sums.means()
    own = torch.zeros(2, len(squares), dtype=torch.float64)
    if squares:
        own[:] = torch.stack([torch.tensor(objective.shares.weights), torch.stack(squares).cpu()])
    weights, chunk_sqnorms = objective.shares.gather(own).cpu()
    shares = weights / weights.sum()
    norms = chunk_sqnorms.sqrt()
    norm_mean = float(shares @ norms)
    sqnorm = float(_squared_norm(mean))
    mean_sqnorm, count = float(shares @ chunk_sqnorms), len(weights)
    several = count > 1
    return GradientStatistics(
        loss=objective.shares.loss(),
        chunks=count,
        samples=float(weights.sum()),
        gradient_norm=math.sqrt(sqnorm),
        chunk_norm_mean=norm_mean,
        chunk_norm_deviation=math.sqrt(float(shares @ (norms - norm_mean).square())),
        mean_squared_chunk_norm=mean_sqnorm,
        squared_signal=(count * sqnorm - mean_sqnorm) / (count - 1) if several else None,
        noise_trace=(mean_sqnorm - sqnorm) * float(weights.sum()) / (count - 1)
        if several
        else None,
        momentum_angle=_angle(objective, mean, momentum),
    )


def _squared_norm(grads: Sequence[Tensor | None]) -> Tensor:
    return dispatch.squared_norm([g for g in grads if g is not None])


def _angle(
    objective: Objective,
    gradient: Sequence[Tensor | None],
    momentum: Sequence[Tensor | None] | None,
) -> float | None:
    """The angle in degrees, from sum and difference of the unit vectors: accurate at 0 too."""
    if momentum is None:
        return None
    one, other = (objective.flatten(side).double() for side in (gradient, momentum))
    lengths = float(one.norm()), float(other.norm())
    if 0 in lengths:
        return None
    one, other = one / lengths[0], other / lengths[1]
    return math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))
