"""Jobs of two processes that a trainer finds by its environment, as torchrun would start them."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ranks
import torch.distributed as dist

WORLD = 2


def together(work: Callable[[int, Path], Any], folder: Path, *preload: str) -> list[Any]:
    """Return what `work(rank, folder)` returns on each of WORLD processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = functools.partial(_environment, free.getsockname()[1])
    found = functools.partial(_without_world, work)
    return ranks.run(found, WORLD, folder, job=job, preload=[*ranks.PRELOAD, *preload])


def _without_world(work: Callable[[int, Path], Any], rank: int, world: int, folder: Path) -> Any:
    return work(rank, folder)


@contextlib.contextmanager
def _environment(port: int, rank: int, world: int, own: Path) -> Iterator[None]:
    """What torchrun sets; the trainer makes the process group itself."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_BACKEND": "gloo"}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
