"""Random draws that depend on what they are for, not on the process or on what came before.

Dropout masks are a function of (seed, step, chunk), the order of samples of (seed, epoch): a
resumed run, another order of the chunks or another process draws the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mix(seed: int, *key: int) -> int:
    """A seed for torch's generators from a seed and what it is for, below 2**63."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_chunk(device: torch.device, seed: int, step: int, chunk: int = 0) -> None:
    """Seed the generators that the model draws from, before a chunk's or mini-batch's first pass.

    Nothing waits for the device: its generator is a number on the host.
    """
    number = mix(seed, step, chunk)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, int64 (samples,): a function of seed and epoch."""
    # Not mix(seed, epoch): published results were made with this order.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
    return torch.randperm(samples, generator=generator)
