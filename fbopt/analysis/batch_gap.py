"""How far mini-batch losses and gradients are from those of the full batch: L_B - L, g_B - g."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis.batches import Batches, check_sizes
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class LossGap:
    """Losses and gradients of random batches of one size beside those of the full batch.

    Attributes:
        size: B, the number of samples of a batch.
        samples: the number of batches.
        loss, gradient_norm: L and |g| of the full batch, in the objective's chunks.
        loss_mean, loss_deviation: mean and standard deviation of L_B over the batches.
        gap: ``(mean of L_B - L)/|L|``: 0 but for the draws, unless samples are not independent, as
            with BatchNorm. None if L is 0.
        distance_mean, distance_deviation: mean and standard deviation of ``|g_B - g|/|g|``. None if
            g is 0.
        cosine: the mean cosine of the angle between g_B and g. None if one of them is 0.
    """

    size: int
    samples: int
    loss: float
    gradient_norm: float
    loss_mean: float
    loss_deviation: float
    gap: float | None
    distance_mean: float | None
    distance_deviation: float | None
    cosine: float | None


def loss_gap(
    objective: Objective, sizes: Sequence[int], samples: int = 32, *, seed: int = 0
) -> list[LossGap]:
    """Compare mini-batch losses and gradients with the full batch, at the same parameters.

    With independent samples ``E |g_B - g|^2 = tr(S)/B (N - B)/(N - 1)``, for batches drawn without
    replacement from N samples whose gradients have the covariance S: ``distance_mean`` is about 1
    where the batch has the size of the noise scale. Costs one full gradient, and for each batch one
    gradient over its samples, which ``objective.cost`` does not count.

    Args:
        objective: the full-batch loss, of chunks (input, target); under autocast losses and
            gradients are those of the autocast forward pass.
        sizes: the batch sizes, 1 to N.
        samples: the number of batches of each size, at least 2.
        seed: of the draws, which are those of :func:`batch_sharpness`.

    Returns:
        A :class:`LossGap` for each size, in their order.

    Raises:
        TypeError, ValueError: an invalid argument; an objective of several processes or with
            `evaluate`.
        RuntimeError: the loss is not deterministic.
    """
    check_number("samples", samples, least=2)
    batches, wanted = Batches(objective), list(sizes)
    check_sizes(wanted, batches.samples)
    gradient = objective.gradient().double()
    loss = objective.shares.loss()
    return [_of_size(batches, size, samples, seed, loss, gradient) for size in wanted]


def _of_size(
    batches: Batches, size: int, samples: int, seed: int, loss: float, gradient: Tensor
) -> LossGap:
    norm = float(gradient.norm())
    losses, distances, cosines = [], [], []
    for batch in batches.draw(size, samples, seed):
        found = batch.gradient().double()
        losses.append(batch.shares.loss())
        length = float(found.norm())
        if not math.isfinite(losses[-1]) or not math.isfinite(length):
            raise ValueError(
                f"a batch of {size} samples has the loss {losses[-1]} and a gradient of norm "
                f"{length}: check its samples and the loss function"
            )
        if norm:
            distances.append(float((found - gradient).norm()) / norm)
        if norm and length:
            cosines.append(float(found @ gradient) / (length * norm))
    return LossGap(
        size=size,
        samples=samples,
        loss=loss,
        gradient_norm=norm,
        loss_mean=statistics.fmean(losses),
        loss_deviation=statistics.stdev(losses),
        gap=(statistics.fmean(losses) - loss) / abs(loss) if loss else None,
        distance_mean=statistics.fmean(distances) if norm else None,
        distance_deviation=statistics.stdev(distances) if norm else None,
        cosine=statistics.fmean(cosines) if len(cosines) == samples else None,
    )
