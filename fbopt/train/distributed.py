"""The processes that torchrun starts for one run: rank 0 reads, writes and prints, all compute."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fbopt._distributed import Collectives, Failure, PeerError
from fbopt.train.config.options import OptionsError
from fbopt.train.launch import launched, leads, only_lead_prints

T = TypeVar("T")
# What rank 0 does alone (evaluation, --track) may take long; a process that dies is noticed anyway.
PATIENCE = datetime.timedelta(days=2)


class World:
    """The processes of a run. Every method is to be called by all of them, in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ranks = Collectives(group)
        self.rank, self.size = self.ranks.rank, self.ranks.world_size
        self.lead = self.rank == 0

    def decided(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, which alone calls it; its error there, else PeerError.

        Other processes need none of the files that it reads.
        """
        if self.size == 1:
            return decide()
        error: Exception | None = None
        value: list[Any] = [None]
        if self.lead:
            try:
                value = [decide()]
            except Exception as raised:
                error, value = raised, [Failure.of(raised)]
        value = self.ranks.broadcast(value)
        if error is not None:
            raise error
        if isinstance(value[0], Failure):
            raise value[0].as_error(0)
        return value[0]

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """Do what any process may fail at: if one does, the first raises its error, all PeerError.

        Nothing that talks to the other processes may be done in it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        everyone = self.ranks.all_gather_object(None if error is None else Failure.of(error))
        for rank, failure in enumerate(everyone):
            if failure is not None:
                raise failure.as_error(rank) if rank != self.rank else error

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.ranks.agree([flag], [], torch.device("cpu")).flags[0]

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        self.ranks.all_reduce_([tensor])

    def device(self, name: str) -> torch.device:
        """The device that `--device` asks for: of several processes each has a GPU of its own."""
        cuda = torch.cuda.is_available()
        try:
            device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
            if device.type == "cuda" and self.size > 1:
                device = self._own_gpu(device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise OptionsError(f"--device {name}: {reason}; use cpu, or leave it out") from error
        return device

    def _own_gpu(self, device: torch.device) -> torch.device:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise OptionsError(
                f"--device {device} is one GPU for {self.size} processes; give --device cuda, then "
                "each has its own"
            )
        if local >= gpus > 0:
            raise OptionsError(
                f"there are more processes on this machine than its {gpus} GPUs; start torchrun "
                f"with --nproc-per-node {gpus}, or give --device cpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the other processes of torchrun's job, if any; only rank 0 prints meanwhile."""
    if launched()[1] == 1:
        yield World()
        return
    own = not dist.is_initialized()
    if own:
        _start_group()
    try:
        with only_lead_prints():
            yield World(dist.group.WORLD)
    except PeerError as error:
        own &= error.rank is not None  # who has lost a process could wait for it
        raise
    finally:
        if own:
            dist.destroy_process_group()


def status_of(error: PeerError) -> int:
    """Say that this process stops as another one did, unless that one says so; the exit status."""
    if error.rank is None and leads():
        print(f"fbopt train: {error}", file=sys.stderr, flush=True)
    return 2 if error.kind in ("OptionsError", "DataError") else 1


def _start_group() -> None:
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun's store still has the addresses of processes that are gone, which
        # the new ones may read and then wait for. Machines count restarts each for itself.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
