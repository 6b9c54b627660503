"""The contenders that are several processes: fbopt, each process with its share of the chunks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from benchmarks.calls import FboptCall
from benchmarks.peers.torch_calls import OnWorkload, forget, ways
from benchmarks.peers.workload import Workload
from benchmarks.task import Task

__all__ = ["contenders", "forget"]


@functools.cache
def process_group() -> Any:
    """The group of all ranks, joined at first use."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['PEERS_STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    return dist.group.WORLD


def share(task: Task, together: int = 1) -> Task:
    """What this process does: every so many groups of chunks."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = [c for i, c in enumerate(task.chunks) if i // together % size == rank]
    return replace(task, chunks=own)


def contenders(workload: Workload) -> dict[str, Callable[[], OnWorkload]]:
    """By name, how to make each."""
    size = int(os.environ["WORLD_SIZE"])
    together = max(1, min(workload.group, workload.count // size))

    def make(task: Task, **options: Any) -> FboptCall:
        own = share(task, options.get("vectorize", 1))
        return FboptCall(own, process_group=process_group(), **options)

    name = f"fbopt, {size} process{'es' * (size > 1)}"
    found: dict[str, tuple[dict[str, Any], bool]] = {name: ({}, False)}
    for how, options in ways(together, workload.at_once).items():
        found[f"{name}, {how}"] = options, True
    return {
        name: partial(OnWorkload, partial(make, **options), workload, functional)
        for name, (options, functional) in found.items()
    }
