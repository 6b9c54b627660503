"""The processes that torchrun starts for one run: rank 0 reads, writes and prints, all compute."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import torch
import torch.distributed as dist

from fbopt._distributed import Collectives, Failure, PeerError
from fbopt.train.config.options import OptionsError
from fbopt.train.config.resolve import device_type
from fbopt.train.heartbeat import Heartbeat, telling
from fbopt.train.torchrun import is_rank_zero, only_rank_zero_prints, rank_and_world_size

T = TypeVar("T")
MINUTES = 30.0


class Unanswered(PeerError):
    """Processes that did not answer in time; the message names them.

    Attributes:
        tells: whether this is the process that prints it.
    """

    def __init__(self, message: str, tells: bool) -> None:
        super().__init__(f"{message}, and start all again (to wait longer: --timeout)")
        self.tells = tells


class DistributedContext(Collectives):
    """The processes of a run. All of them have to call a method, in the same order.

    Attributes:
        heartbeat: what is heard of the others; None in a job of one process.
    """

    heartbeat: Heartbeat | None = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process reads, writes and prints."""
        return self.rank == 0

    def from_rank_zero(self, compute: Callable[[], T]) -> T:
        """Call `compute` on rank 0 alone and return its result, picklable, on every rank."""
        value = None
        with self.raising_together():
            if self.is_rank_zero:
                value = compute()
        received = self.broadcast(value)
        return value if self.is_rank_zero else received

    @contextlib.contextmanager
    def raising_together(self) -> Iterator[None]:
        """If a rank fails in this context, raise on all: its own error there, PeerError elsewhere.

        No collective may be called within.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failures = self.all_gather_object(None if error is None else Failure.of(error))
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise failure.as_error(rank) if rank != self.rank else error

    def why(self, error: PeerError) -> tuple[str, bool] | None:
        """Which processes did not answer, where that is known; see Heartbeat.why."""
        if error.rank is not None or self.heartbeat is None:
            return None
        return self.heartbeat.why(error.seconds)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any rank."""
        return self.agree(flags, [], torch.device("cpu")).flags


def select_device(name: str, world_size: int = 1) -> torch.device:
    """The device that `--device` asks for; of several processes each gets a GPU of its own.

    Raises OptionsError.
    """
    try:
        device = torch.device(device_type(name) if name == "auto" else name)
        if device.type == "cuda" and world_size > 1:
            device = _own_gpu(device, world_size)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionsError(f"--device {name}: {reason}; use cpu, or leave it out") from error
    return device


def _own_gpu(device: torch.device, world_size: int) -> torch.device:
    try:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    except (KeyError, ValueError) as error:
        raise OptionsError(
            f"the environment is not torchrun's: LOCAL_RANK ({error}); start the job with torchrun"
        ) from error
    if device.index is not None:
        raise OptionsError(
            f"--device {device} is one GPU for {world_size} processes; give --device cuda, then "
            "each has its own"
        )
    if local_rank >= gpus > 0:
        raise OptionsError(
            f"there are more processes on this machine than its {gpus} GPUs; start torchrun "
            f"with --nproc-per-node {gpus}, or give --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def distributed_context(
    device: str = "auto", minutes: float | None = None
) -> Iterator[DistributedContext]:
    """Join the process group of torchrun's job, if any; only rank 0 prints meanwhile.

    `device` is what `--device` asks for. Another process is waited for so many `minutes`, by
    default MINUTES, and named in the PeerError that is raised then.
    """
    minutes = minutes or MINUTES
    if rank_and_world_size()[1] == 1:
        yield DistributedContext()
        return
    own, context = not dist.is_initialized(), None
    try:
        with ExitStack() as living:
            store = _init_process_group(device, minutes) if own else None
            context = DistributedContext(dist.group.WORLD)
            if store is not None:
                beating = Heartbeat(store, *rank_and_world_size(), minutes)
                context.heartbeat = living.enter_context(beating)
            living.enter_context(only_rank_zero_prints())
            yield context
    except PeerError as error:
        own &= error.rank is not None  # destroying could wait for a process that was lost
        if context is not None and (why := context.why(error)):
            raise Unanswered(*why) from error
        raise
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def _init_process_group(device: str, minutes: float) -> dist.Store:
    """Join the job; returns a store of its processes for heartbeats. Raises Unanswered."""
    nccl = device != "cpu" and torch.cuda.is_available() and dist.is_nccl_available()
    timeout, begin = datetime.timedelta(minutes=minutes), time.monotonic()
    rank, world_size = rank_and_world_size()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    who = f"fbopt train: process {rank} of {world_size}"
    waits = f"{who} waits for the others at {place}, at most {minutes:g} minutes"
    try:
        with telling(waits, minutes):
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # After a restart torchrun's store still has the addresses of processes that are
                # gone, which the new ones may read and then wait for. Machines count restarts each
                # for itself.
                restart = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
                store = dist.PrefixStore(restart, store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
    except (KeyError, ValueError) as error:  # a variable that is missing or no number
        reason = f"the environment is not torchrun's: {error}"
        raise OptionsError(f"{reason}; start the job with torchrun") from error
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unanswered(
            f"process {rank} of {world_size} has not met the others at {place} within "
            f"{time.monotonic() - begin:.0f} s ({reason}): see that all run and the network lets "
            "them reach each other",
            tells=True,
        ) from error
    return dist.PrefixStore("heartbeats", store)


def peer_error_status(error: PeerError) -> int:
    """The exit status for another rank's failure, which that rank prints itself, unless lost."""
    if error.tells if isinstance(error, Unanswered) else error.rank is None and is_rank_zero():
        print(f"fbopt train: {error}", file=sys.stderr, flush=True)
    return 2 if error.kind in ("OptionsError", "DataError") else 1
