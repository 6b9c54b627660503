"""The memory limit: a triad a = b + s c over as many words as a contender moves."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from benchmarks.cases import require_close
from benchmarks.harness import Contender
from fbopt import _build
from fbopt._toolchain import BuildError

SOURCE = Path(__file__).with_name("triad.cpp")
NAMES = {True: "triad, streaming stores", False: "triad, plain stores"}


def triads(words: int) -> list[Contender]:
    """Triads that move this many float32 words in all; none where there is no compiler."""
    try:
        _build.build("triad", [SOURCE], "the memory benchmark")
        triad = _build.load("triad", [SOURCE]).triad
    except BuildError as error:
        warnings.warn(f"no memory limit: {error}", RuntimeWarning, stacklevel=2)
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
