"""The memory limit: code that only reads and writes so many words, and hardly computes.

On the CPU a triad a = b + s c, with streaming and with plain stores; on a GPU a copy.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import require_close
from benchmarks.timing import Contender
from fbopt._build import load
from fbopt._build.compiler import BuildError

SOURCE = Path(__file__).with_name("triad.cpp")
NAMES = {True: "triad, streaming stores", False: "triad, plain stores"}


def limits(words: int, device: torch.device) -> list[Contender]:
    """Contenders that read and write this many float32 words in all."""
    if device.type == "cpu":
        return _triads(words)
    half = max(1, words // 2)
    source, to = torch.randn(half, device=device), torch.zeros(half, device=device)
    to.copy_(source)
    name = "device-to-device copy"
    require_close(name, "the copy", [to], [source], 0)
    return [Contender(name, lambda: to.copy_(source), words=2 * half, is_limit=True)]


def _triads(words: int) -> list[Contender]:
    """Triads compiled for this machine; none where there is no compiler."""
    try:
        load.build("triad", [SOURCE], "the memory benchmark")
        triad = load.load("triad", [SOURCE]).triad
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
        contenders.append(Contender(name, partial(run, streams), words=words, is_limit=True))
    return contenders
