"""The memory limit: what moves as many words as a contender and computes next to nothing. On the
CPU a triad a = b + s c, on a GPU a copy from device to device.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import require_close
from benchmarks.devices import CPU, sets_beyond_cache
from benchmarks.harness import Contender, in_turn
from fbopt._build import load as _build
from fbopt._build.compiler import BuildError

SOURCE = Path(__file__).with_name("triad.cpp")
NAMES = {True: "triad, streaming stores", False: "triad, plain stores"}
COPY = "device-to-device copy"
MOST_COPIES = 64


def limits(words: int, device: torch.device = CPU) -> list[Contender]:
    """What moves this many float32 words in all, read and written."""
    return triads(words) if device.type == "cpu" else [copy(words, device)]


def is_limit(name: str) -> bool:
    """Whether a contender of this name is a memory limit."""
    return name in NAMES.values() or name.startswith(COPY)


def copy(words: int, device: torch.device, label: str = COPY) -> Contender:
    """A copy between buffers that are no longer in the cache when their turn comes again."""
    half = max(1, words // 2)
    sets = sets_beyond_cache(device, 8 * half, MOST_COPIES)
    pairs = [(torch.randn(half, device=device), torch.zeros(half, device=device))]
    pairs += [tuple(t.clone() for t in pairs[0]) for _ in range(sets - 1)]
    run = in_turn([functools.partial(_copy, *pair) for pair in pairs])
    for _ in pairs:
        run()
    require_close(label, "the copy", [to for _, to in pairs], [pairs[0][0].double()] * sets, 0)
    return Contender(label, run, words=2 * half)


def _copy(source: Tensor, to: Tensor) -> None:
    to.copy_(source)


def triads(words: int) -> list[Contender]:
    """Triads that move this many float32 words in all; none where there is no compiler."""
    try:
        _build.build("triad", [SOURCE], "the memory benchmark")
        triad = _build.load("triad", [SOURCE]).triad
    except BuildError as error:
        warnings.warn(f"no memory limit: {error}", RuntimeWarning, stacklevel=3)
        return []
    n = max(1, words // 3)
    a, b, c = torch.zeros(n), torch.randn(n), torch.randn(n)

    def run(streams: bool) -> None:
        triad(a.data_ptr(), b.data_ptr(), c.data_ptr(), 0.5, n, streams)

    contenders = []
    for streams, name in NAMES.items():
        a.zero_()
        run(streams)
        require_close(name, "the sum", [a], [b.double() + 0.5 * c.double()], 1e-6)
        contenders.append(Contender(name, lambda streams=streams: run(streams), words=words))
    return contenders
