"""Norms of the full-batch and of the chunks' gradients, and the gradient noise scale tr(S)/|G|^2.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162),
appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbopt._ops import dispatch
from fbopt.analysis.checks import check
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class GradientStatistics:
    """What one pass over the chunks says about the gradient.

    Samples are taken as independent draws; one sample's gradient has the mean G and the covariance
    S, so that chunk c, of n_c samples, has ``E |g_c|^2 = |G|^2 + tr(S)/n_c``, and the full-batch
    gradient g, of N, ``E |g|^2 = |G|^2 + tr(S)/N``. The mean over the C chunks, weighted by n_c/N,

        M = sum_c (n_c/N) |g_c|^2   has   E M = |G|^2 + tr(S) C/N,

    also if chunks are ragged: it is the mean square of a batch of N/C samples. These are the two
    batch sizes of the paper's estimates, each unbiased:

        tr(S) ~ (M - |g|^2) N / (C - 1)          |G|^2 ~ (C |g|^2 - M) / (C - 1)

    Their ratio is the noise scale, in samples: the batch size at which noise and signal are equal.
    It is not unbiased itself, and near a minimum, where |G|^2 is smaller than its own error, the
    estimate of |G|^2 can be negative: there is no ratio then (None). With BatchNorm by chunk the
    samples of a chunk depend on each other, and S is what its gradients vary by all the same.

    Attributes:
        loss: the full-batch loss.
        chunks, samples: C and N.
        gradient_norm: |g|.
        chunk_norm_mean, chunk_norm_deviation: of |g_c|, weighted by n_c/N.
        mean_squared_chunk_norm: M.
        squared_signal: the estimate of |G|^2; None for a single chunk.
        noise_trace: the estimate of tr(S); None for a single chunk.
        momentum_angle: between g and the momentum buffers, in degrees; 0 if they are parallel, None
            without momentum or where either is zero.
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
        """tr(S)/|G|^2, in samples; None where the estimate of |G|^2 is not positive."""
        if self.squared_signal is None or self.squared_signal <= 0:
            return None
        return self.noise_trace / self.squared_signal

    @property
    def chunk_signal_to_noise(self) -> float | None:
        """|G|^2/(tr(S) C/N), of a chunk of the mean size; negative where that of |G|^2 is."""
        return self._signal_to_noise(self.samples / self.chunks)

    @property
    def full_signal_to_noise(self) -> float | None:
        """|G|^2/(tr(S)/N), of the full-batch gradient as an estimate of G."""
        return self._signal_to_noise(self.samples)

    def _signal_to_noise(self, batch: float) -> float | None:
        if not self.noise_trace:  # a single chunk, or no noise at all
            return None
        return self.squared_signal * batch / self.noise_trace

    def as_json(self) -> dict[str, float | int | None]:
        """All of it as plain numbers."""
        names = ("noise_scale", "chunk_signal_to_noise", "full_signal_to_noise")
        return vars(self) | {name: getattr(self, name) for name in names}


def gradient_statistics(
    objective: Objective, momentum: Sequence[Tensor | None] | None = None
) -> GradientStatistics:
    """Measure the gradient in one pass over the chunks, of whose gradients only one is held.

    Args:
        objective: the loss.
        momentum: momentum buffers, one for each of ``objective.params`` (None: no buffer).

    Raises:
        ValueError: momentum does not fit the parameters; weights or the loss are not finite.
        RuntimeError: the loss is not deterministic.
    """
    _check_momentum(objective, momentum)
    check(objective)
    weights: list[float] = []
    squares: list[Tensor] = []
    losses: list[Tensor] = []

    def observe(weight: float, loss: Tensor, grads: list[Tensor | None]) -> None:
        weights.append(weight)
        losses.append(loss.double())
        squares.append(dispatch.squared_norm([g for g in grads if g is not None]))

    objective.accumulate(observe)
    mean = objective.accumulator.mean()
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    squared_chunks = torch.stack(squares).cpu()
    norms = squared_chunks.sqrt()
    average = float(shares @ norms)
    squared = float(dispatch.squared_norm([g for g in mean if g is not None]))
    mean_squared, count = float(shares @ squared_chunks), len(weights)
    several = count > 1
    return GradientStatistics(
        loss=float(shares @ torch.stack(losses).cpu()),
        chunks=count,
        samples=sum(weights),
        gradient_norm=math.sqrt(squared),
        chunk_norm_mean=average,
        chunk_norm_deviation=math.sqrt(float(shares @ (norms - average).square())),
        mean_squared_chunk_norm=mean_squared,
        squared_signal=(count * squared - mean_squared) / (count - 1) if several else None,
        noise_trace=(mean_squared - squared) * sum(weights) / (count - 1) if several else None,
        momentum_angle=_angle(objective, mean, momentum),
    )


def _check_momentum(objective: Objective, momentum: Sequence[Tensor | None] | None) -> None:
    if momentum is None:
        return
    if len(momentum) != len(objective.params):
        raise ValueError(
            f"momentum has {len(momentum)} entries for {len(objective.params)} parameters: pass "
            "one each"
        )
    for i, (m, p) in enumerate(zip(momentum, objective.params, strict=True)):
        if m is not None and m.shape != p.shape:
            raise ValueError(
                f"momentum[{i}] has shape {tuple(m.shape)}, its parameter {tuple(p.shape)}"
            )


def _angle(
    objective: Objective,
    gradient: Sequence[Tensor | None],
    momentum: Sequence[Tensor | None] | None,
) -> float | None:
    """The angle in degrees; by the difference of unit vectors, exact also if it is tiny."""
    if momentum is None:
        return None
    one, other = (objective.flatten(side).double() for side in (gradient, momentum))
    lengths = float(one.norm()), float(other.norm())
    if 0 in lengths:
        return None
    one, other = one / lengths[0], other / lengths[1]
    return math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))
