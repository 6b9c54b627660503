"""How many processes share the chunks of a run: what --processes says, or as many as pay."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import threading
from dataclasses import replace

import torch.distributed as dist

from fbopt.train.config.cores import usable_cores
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.config.resolve import device_type
from fbopt.train.torchrun import rank_and_world_size

FEWEST = 2  # chunks for each process, or waiting for the others costs more than is gained


def may_start_some(options: Options) -> bool:
    """Whether these resolved options may start processes, whatever the data.

    Raises OptionsError where they ask for some that cannot be started.
    """
    if options.processes == 1:
        return False
    if options.processes != "auto":
        if (obstacle := _obstacle(options)) is not None:
            cure = f"use torchrun --nproc-per-node {options.processes} -m fbopt.train"
            raise OptionsError(f"--processes {options.processes}: {obstacle}; {cure}")
        return True
    # Measured on two busy cores: two processes make a penalised step of the small CNN on MNIST-1D
    # 1.6 to 1.8 times as fast as one thread, and 1.8 to 2.1 times as fast as two (chunks of 128
    # and of 32). Where a chunk takes 20 ms and more, as of 3x32x32 images, two threads do as well.
    small = (options.scale, options.model) == ("small", "cnn")
    # With float32 sums the number of cores would show in the result.
    may_share = options.accumulation == "exact" and not options.switch_at
    return small and may_share and _obstacle(options) is None


def settle(options: Options, groups: int) -> Options:
    """Resolve the number of processes for so many groups of chunks to share."""
    if not may_start_some(options):
        return replace(options, processes=1)
    cores, threads, number = usable_cores(), options.threads, options.processes
    if number == "auto":
        chunks = groups * (options.vectorize or 1)
        most = max(1, min(cores // (threads or 1), groups, chunks // FEWEST))
        rounds = -(-groups // most)
        number = -(-groups // rounds)  # no more than it takes to be done as early
    return replace(options, processes=number)


def check_number(options: Options, world_size: int) -> None:
    """Raise OptionsError where another number of processes is asked for than there is."""
    if options.processes in ("auto", world_size):
        return
    here = "train() trains in this process alone; use `fbopt train`, which starts them"
    if rank_and_world_size()[1] > 1:
        here = f"torchrun has started {world_size}; leave it out"
    raise OptionsError(f"--processes {options.processes}: {here}")


def _obstacle(options: Options) -> str | None:
    """Why processes cannot be forked from this one; None where they can."""
    if sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()):
        return "fbopt can start several on Linux alone, and with a torch that has gloo"
    if device_type(options.device) != "cpu":
        return "fbopt starts several on the CPU alone"  # CUDA does not survive a fork
    thread, process = threading.current_thread(), multiprocessing.current_process()
    if thread is not threading.main_thread() or process.daemon:
        return "they can be started by the main thread of a process that may have others"
    try:
        with socket.create_server(("localhost", 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
    except OSError as error:
        return f"they talk to each other by way of localhost, which does not answer ({error})"
    return None
