"""The contenders in torch: plain, as published, compiled, and fbopt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import calls
from benchmarks.peers import torch_work
from benchmarks.peers.workload import Result, Workload


class TorchCall:
    """A call of benchmarks.calls on a workload."""

    def __init__(self, kind: type[calls.BarePasses], workload: Workload) -> None:
        self.call = kind(torch_work.task(workload))

    def __call__(self) -> object:
        return self.call()

    def result(self) -> Result | None:
        loss = self.call()
        return None if loss is None else torch_work.result(self.call.task.model, loss)


KINDS = (calls.BarePasses, calls.TorchCall, calls.PublishedCall, calls.FboptCall)


def contenders(workload: Workload) -> dict[str, Callable[[], TorchCall]]:
    """By name, how to make each."""
    return {kind.name: partial(TorchCall, kind, workload) for kind in KINDS}
