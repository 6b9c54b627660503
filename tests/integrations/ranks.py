"""Starts processes of a gloo group that a trainer finds by its environment, as torchrun would."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

WORLD = 2


def together(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Return what `work(rank, folder)` returns on each of WORLD processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.trainer", "fbopt.closure"])
    arguments = [(work, rank, port, folder) for rank in range(WORLD)]
    processes = [context.Process(target=_run, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert [process.exitcode for process in processes] == [0] * WORLD, reports
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _run(work: Callable[[int, Path], Any], rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_BACKEND": "gloo"}
    try:
        torch.save(work(rank, folder), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
