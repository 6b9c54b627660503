"""Seeds derived from a base seed and a key, so that no draw depends on earlier draws."""

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
    """Seed torch's default generators of the CPU and of CUDA devices with ``mix(seed, *key)``.

    Does not wait for a device: the state of its generator is on the host.
    """
    number = mix(seed, *key)
    for generator in default_generators(devices):
        generator.manual_seed(number)


def default_generators(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Return torch's default generators: the CPU's, then those of the CUDA devices."""
    found = [torch.default_generator]
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            found.append(torch.cuda.default_generators[index])
    return found
