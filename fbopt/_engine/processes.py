"""Sums of gradients over several processes: the check that parameters are the same on all, and the
sums of all, once per step. Closure and GradientAccumulator share it.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fbopt._distributed import Agreement, Collectives, checksum
from fbopt._engine.gradient_sums import GradientSums
from fbopt._ops.sums import Sums


def combine_sums(
    sums: GradientSums,
    collectives: Collectives,
    counts: Sequence[float],
    empty: Exception,
    *others: Sums,
    is_joint: bool = False,
) -> Agreement | None:
    """Replace the sums by those of all processes, and finish them: exact sums become means.

    Args:
        sums: of this process.
        collectives: of the group.
        counts: this process's number of additions, their weight, and more to exchange.
        empty: the error to raise where no process has added anything.
        *others: stores of sums whose units have to fit, too.
        is_joint: whether the sums are those of all processes already.

    Returns:
        What the processes exchanged; None where the units of exact sums did not fit.
    """
    stores, device = (sums.store, *others), sums.buckets.device(0)
    seen = []
    if not collectives.is_single:
        seen = [i not in sums.unseen for i in range(len(sums.params))]
    widths, maxima = [store.width for store in stores], None
    if any(widths):
        own = sums.maxima(), *(store.maxima() for store in others)
        maxima = torch.cat([m.to(device) for m in own])
    found = collectives.agree(seen, counts, device, maxima=maxima)
    additions, weights, *_ = zip(*found.table, strict=True)
    if not any(additions):
        raise empty
    if found.maxima is not None:
        pairs = zip(stores, found.maxima.split(widths), strict=True)
        if not all([store.fit(share, int(sum(additions))) for store, share in pairs]):
            return None
    if not is_joint:
        sums.store.all_reduce_(collectives)
    if not collectives.is_single:
        sums.unseen = {i for i, by_any in enumerate(found.flags) if not by_any}
    sums.total_weight = math.fsum(weights)
    sums.finish()
    return found


class Comparison:
    """Compares what has to be the same on all processes: cheaply, and new parameters in full."""

    def __init__(
        self, collectives: Collectives, sums: GradientSums, model: nn.Module | None = None
    ) -> None:
        self._collectives, self._sums, self._model = collectives, sums, model
        devices = {p.device for p in sums.params}
        collectives.check_devices(devices)
        self.device = min(devices, key=str)
        self._compared: object = None
        self.is_joint = False  # then processes hold different shards

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an error in this process to the others, which would wait in the comparison."""
        try:
            yield
        except Exception as error:
            self._collectives.report_error(error, 2, 1, self.device)
            raise

    def __call__(self, facts: Mapping[str, Any], flag: bool = False) -> bool:
        """Whether any process set the flag; raise ValueError if parameters or facts differ."""
        if self._collectives.is_single:
            return flag
        sums = self._sums
        layout = repr((facts, [(p.dtype, p.shape) for p in sums.params]))
        new, number = self._compared is not sums.buckets, zlib.crc32(layout.encode())
        found = self._collectives.agree([new, flag], [number], self.device)
        if found.flags[0] or any(row != found.table[0] for row in found.table):
            self._collectives.check_same(
                {**facts, **self._describe()},
                "build the same model on all, and load or broadcast the same parameters",
            )
            self._compared = sums.buckets
        return found.flags[1]

    def _describe(self) -> dict[str, str]:
        params = self._sums.params
        model = self._model or nn.Module()
        names = {id(p): name for name, p in model.named_parameters()}
        found = {"the number of parameters": str(len(params))}
        sums = ["of shards"] * len(params) if self.is_joint else checksum(params)
        for i, (p, bits) in enumerate(zip(params, sums, strict=True)):
            name = f"parameter {i} ({names.get(id(p), 'unnamed')})"
            found[name] = f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}, checksum {bits},"
        return found
