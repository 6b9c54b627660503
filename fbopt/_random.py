"""Seeds that depend on what a draw is for, not on the process or on what was drawn before."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


def mix(seed: int, first: int, *rest: int) -> int:
    """Return a seed for a generator from a base seed and a key of one or more numbers, below 2**63.

    Keys that differ only by trailing zeros give different seeds.
    """
    # As entropy alone, [seed, 1] and [seed, 1, 0] would be the same to NumPy.
    sequence = np.random.SeedSequence([seed, first], spawn_key=rest)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_generators(devices: Iterable[torch.device], seed: int, *key: int) -> None:
    """Seed torch's default generators by ``mix(seed, *key)``, on the CPU and on CUDA devices.

    Nothing waits for a device: its generator is a number on the host.
    """
    number = mix(seed, *key)
    torch.default_generator.manual_seed(number)
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(number)
