"""The trace of the Hessian by Hutchinson's estimator: tr(H) = E z.(H z) for random signs z."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fbopt._checks import check_number
from fbopt.analysis.hessian import Hessian


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace with its standard error.

    Attributes:
        value: the mean of ``z.(H z)`` over the samples.
        error: its standard error, the samples' standard deviation divided by the square root of
            their number.
        samples: the number of samples, of one product each.
    """

    value: float
    error: float
    samples: int


def hessian_trace(hessian: Hessian, samples: int = 32, seed: int = 0) -> Trace:
    """Estimate the trace of the full-batch Hessian.

    With Rademacher vectors the variance of one sample is ``2 sum_{i != j} H_ij^2``, the least among
    independent entries (Hutchinson 1990; Avron and Toledo, JACM 2011).

    Args:
        hessian: the operator.
        samples: the number of random vectors, with one product each; at least 2.
        seed: of the vectors; sample i is the same however many there are.

    Raises:
        TypeError, ValueError: `samples` is not a number or too small.
    """
    check_number("samples", samples, least=2)
    objective = hessian.objective
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        signs = torch.randint(2, (objective.size,), generator=generator, dtype=torch.int8)
        vector = (2 * signs - 1).to(objective.device, objective.dtype)
        values.append(float(vector.double() @ hessian(vector).double()))
    found = torch.tensor(values, dtype=torch.float64)
    return Trace(float(found.mean()), float(found.std()) / math.sqrt(samples), samples)
