"""Batch sharpness E_B[g_B.H_B g_B / |g_B|^2]: the curvature of a mini-batch's loss along its own
gradient, which SGD with batches of that size holds at 2/lr.

Andreyev, Beneventano, "Edge of Stochastic Stability: Revisiting the Edge of Stability for SGD"
(arXiv 2412.20553).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fbopt._checks import check_number
from fbopt.analysis.batches import Batches, check_sizes
from fbopt.analysis.hessian import Trace
from fbopt.analysis.objective import Objective


@dataclass(frozen=True)
class BatchSharpness:
    """The batch sharpness for one batch size.

    Attributes:
        size: B, the number of samples of a batch.
        value: the mean over batches of ``g_B.H_B g_B/|g_B|^2``.
        error: its standard error.
        ratio: the ratio of the means of ``g_B.H_B g_B`` and ``|g_B|^2``, in which batches of large
            gradients weigh more.
        samples: the number of batches.
    """

    size: int
    value: float
    error: float
    ratio: float
    samples: int


def batch_sharpness(
    objective: Objective, sizes: Sequence[int], samples: int = 32, *, seed: int = 0
) -> list[BatchSharpness]:
    """Measure the batch sharpness for several batch sizes.

    Batches are drawn without replacement from the samples of all chunks, at the parameters as they
    are. For the batch of all samples it is the :func:`directional_sharpness`. Each batch costs two
    forward and three backward passes over its samples; they are not in ``objective.cost``, which
    counts passes over all chunks. With BatchNorm by chunk a batch normalises by its own statistics.

    Args:
        objective: the full-batch loss, of chunks (input, target); under autocast g_B and H_B are
            those of the autocast forward pass.
        sizes: the batch sizes, 1 to N.
        samples: the number of batches of each size, at least 2.
        seed: of the draws.

    Returns:
        A :class:`BatchSharpness` for each size, in their order.

    Raises:
        TypeError, ValueError: an invalid argument; an objective of several processes or with
            `evaluate`; a gradient that is zero or not finite.
        RuntimeError: the loss is not deterministic, or has no second derivative.
    """
    check_number("samples", samples, least=2)
    batches, wanted = Batches(objective), list(sizes)
    check_sizes(wanted, batches.samples)
    return [_of_size(batches, size, samples, seed) for size in wanted]


def _of_size(batches: Batches, size: int, samples: int, seed: int) -> BatchSharpness:
    curvatures, squares = [], []
    for number, batch in enumerate(batches.draw(size, samples, seed)):
        gradient = batch.gradient()
        image = batch.product(gradient, check=number == 0)
        squares.append(float(gradient.double().square().sum()))
        curvatures.append(float(gradient.double() @ image.double()))
        if not 0 < squares[-1] < float("inf") or not abs(curvatures[-1]) < float("inf"):
            raise ValueError(
                f"the gradient of a batch of {size} samples has the squared norm {squares[-1]} and "
                f"the curvature {curvatures[-1]} along it: the ratio is undefined"
            )
    ratios = [c / s for c, s in zip(curvatures, squares, strict=True)]
    found = Trace.of(ratios)
    ratio = sum(curvatures) / sum(squares)
    return BatchSharpness(size, found.value, found.error, ratio, samples)
