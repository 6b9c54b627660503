"""Random draws that depend on their purpose, not on the process or on earlier draws.

Dropout masks are a function of (seed, step, chunk), or of (seed, step, group) for chunks that go
through the model at once; the order of samples of (seed, pass), an image's crop of (seed, draw,
sample): a resumed run, another order of the chunks or another process draws the same.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fbopt._random import mix

DROPOUT, CROPS, REPLACEMENT, NOISE, POLICY = range(5)  # the purposes, a part of every seed


@lru_cache(maxsize=1)  # every chunk of a pass asks for it
def epoch_order(samples: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of the samples in an epoch, int64 (samples,): a function of seed and epoch."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(samples, generator=generator).to(device)


@lru_cache(maxsize=1)
def replacements(samples: int, seed: int, number: int, device: torch.device) -> Tensor:
    """Draws with replacement for pass `number`, as many as there are samples: int64 (samples,)."""
    index = torch.arange(samples, device=device)
    bits = hashed(mix(seed, REPLACEMENT), torch.full_like(index, number), index)
    return below(samples, bits)


_GAMMA, _FIRST, _SECOND = (  # as int64
    word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def hashed(key: int, *counters: Tensor) -> Tensor:
    """64 random bits (as int64) for each tuple of counters: the same on CPU and CUDA.

    h ← splitmix64(h + (counter + 1)·γ), starting at h = key, in arithmetic modulo 2**64 (Steele,
    Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 5; Vigna's
    constants).

    Args:
        key: a number below 2**63, from `mix`.
        counters: int64, of shapes that broadcast.
    """
    state: Tensor | int = key
    for counter in counters:
        z = state + (counter + 1) * _GAMMA
        z = (z ^ _shifted(z, 30)) * _FIRST
        z = (z ^ _shifted(z, 27)) * _SECOND
        state = z ^ _shifted(z, 31)
    return state


def _shifted(word: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic, which keeps the sign."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def below(bound: int | Tensor, bits: Tensor, start: int = 0) -> Tensor:
    """Integers 0 … bound − 1 from the 31 bits from bit `start` on; their bias is < bound/2**31.

    A tensor of bounds broadcasts against the bits.
    """
    return ((_shifted(bits, start) if start else bits) & (2**31 - 1)) * bound >> 31
