"""Jobs of several processes for tests: what every rank finds, started once for a test file."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "fbopt.optim", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
Work = Callable[[int, int, Path], Any]


def run_all(work: Work, worlds: Sequence[int], folder: Path) -> dict[int, list[Any]]:
    """Return by size what ``work(rank, world, folder)`` returned on each rank of a job."""
    return {world: run(work, world, folder) for world in worlds}


def run(work: Work, world: int, folder: Path) -> list[Any]:
    """Start one job with gloo and wait for it."""
    own = folder / f"job of {world}"
    own.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_work, args=(work, rank, world, folder, own))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(own.glob("*.txt")))
    assert all(process.exitcode == 0 for process in processes), reports
    return [torch.load(own / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(work: Work, rank: int, world: int, folder: Path, own: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(own / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.save(work(rank, world, folder), own / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (own / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def mesh(world: int) -> Any:
    """A mesh of one dimension over the whole job."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    """The type and text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def whole(tensor: Any) -> Any:
    """A plain tensor of a DTensor; itself otherwise."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
