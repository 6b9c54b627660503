"""The validation split: training samples that one shuffle, the same for every run, holds out."""

from __future__ import annotations

import numpy as np

from fbopt.train.config.dataspec import DataError

SEED = 1  # not the one that orders the images of folders


def hold_out(
    count: int, share: float, samples: int | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training samples that are kept, and of those that are held out, in order.

    The nearest number to share·count is held out; the first `samples` of the others are kept, by
    default all. `name` is the data set's. Raises DataError where nothing, or too little, is left.
    """
    number = round(share * count)
    if share and not 0 < number < count:
        raise DataError(
            f"--validation {share:g}: {name}: holds out {number} of {count} training samples; "
            "give a share that leaves some on both sides"
        )
    # NumPy promises the same order for ever for this generator.
    shuffled = np.random.RandomState(SEED).permutation(count)
    held, kept = np.sort(shuffled[:number]), np.sort(shuffled[number:])
    if samples is not None and samples > len(kept):
        left = f"{len(kept)} training samples" + " beside those of --validation" * bool(share)
        raise DataError(f"--samples {samples}: {name}: there are only {left}; give at most that")
    return kept[:samples], held
