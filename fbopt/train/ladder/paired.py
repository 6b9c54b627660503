"""Differences between a row and the sgd of its table, seed by seed, with a confidence interval.

    d_s = accuracy of the row − accuracy of sgd, both with seed s;  mean ± t(n − 1)·deviation/√n

Runs of one seed share their initial weights and crops, so that their difference varies less.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fbopt.train.config.recipes import split

CONFIDENCE = 0.95


def baseline(row: str) -> str:
    """The row of sgd in the same table: "sgd-aug" for "fb-clip-aug"."""
    return "sgd" + split(row)[1]


def difference(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], key: str
) -> dict[str, Any] | None:
    """The paired difference of a result between two rows' runs; None without a seed in common.

    Returns:
        mean, the 95 % interval from `low` to `high` by Student's t (None for one pair, and where
        SciPy is not installed), n, and `pairs`, the difference of each seed.
    """
    other = {run["seed"]: run[key] for run in base}
    pairs = {run["seed"]: run[key] - other[run["seed"]] for run in runs if run["seed"] in other}
    if not pairs:
        return None
    mean, low, high = statistics.mean(pairs.values()), None, None
    if len(pairs) > 1 and (quantile := _quantile(len(pairs) - 1)) is not None:
        half = quantile * statistics.stdev(pairs.values()) / math.sqrt(len(pairs))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "n": len(pairs), "pairs": pairs}


@functools.cache
def _quantile(freedom: int) -> float | None:
    """The 97.5 % quantile of Student's t; None, after a message, where SciPy is not installed."""
    try:
        from scipy.stats import t
    except ImportError:
        print("no intervals: pip install scipy")
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
