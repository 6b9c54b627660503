"""The contenders in torch: plain, as published, compiled, vectorised, and fbopt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo

from benchmarks.calls import BarePasses, FboptCall, PublishedCall, TorchCall
from benchmarks.peers import torch_work
from benchmarks.peers.func_calls import FuncCall
from benchmarks.peers.workload import Result, Workload
from benchmarks.task import Task

# A function compiled for one contender counts as a recompilation of the same one of the others.
torch._dynamo.config.recompile_limit = 64


def forget() -> None:
    """Drop what was compiled."""
    torch._dynamo.reset()


class OnWorkload:
    """A call on the task of a workload."""

    def __init__(self, make: Callable[[Task], Any], workload: Workload, functional: bool) -> None:
        self.call = make(torch_work.task(workload, functional))

    def __call__(self) -> object:
        return self.call()

    def result(self) -> Result | None:
        loss = self.call()
        return None if loss is None else torch_work.result(self.call.task.model, loss)


def contenders(workload: Workload) -> dict[str, Callable[[], OnWorkload]]:
    """By name, how to make each; what vmap and torch.compile transform is written in torch.func."""
    some, words = workload.group, workload.at_once
    plain = {kind.name: kind for kind in (BarePasses, TorchCall, PublishedCall, FboptCall)}
    func: dict[str, Callable[[Task], Any]] = {
        "torch.compile": partial(FuncCall, compiled=True),
        f"vmap, {words}": partial(FuncCall, together=some),
        f"vmap, {words}, compiled": partial(FuncCall, together=some, compiled=True),
    }
    for how, options in ways(some, words).items():
        func[f"fbopt, {how}"] = partial(FboptCall, **options)
    found = {name: partial(OnWorkload, make, workload, False) for name, make in plain.items()}
    return found | {name: partial(OnWorkload, make, workload, True) for name, make in func.items()}


def ways(together: int, at_once: str) -> dict[str, dict[str, Any]]:
    """The options of FullBatchClosure that use more of the machine, in words and as arguments."""
    return {
        "compiled": {"compile": True},
        at_once: {"vectorize": together},
        f"{at_once}, compiled": {"vectorize": together, "compile": True},
    }
