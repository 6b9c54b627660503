"""Process-group collectives; no-ops in a single process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fbopt._sharding import local, mesh_size

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class PeerError(RuntimeError):
    """Another process of the group failed, or the connection to it was lost.

    Attributes:
        rank: the process that failed; None where only the connection is known to be lost.
        kind: the name of its exception's type.
        seconds: for how long the others were waited for.
    """

    def __init__(
        self, message: str, rank: int | None = None, kind: str = "", seconds: float = 0.0
    ) -> None:
        super().__init__(message)
        self.rank, self.kind, self.seconds = rank, kind, seconds


class Meetings:
    """How often this process has met the others: the number of collectives that it came to.

    Attributes:
        count: of collectives, the same on all processes as long as none waits for another.
        since: by time.monotonic(), when this process came to the one that it is in; None between
            two of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.since: float | None = None


meetings = Meetings()


class Failure(NamedTuple):
    """An exception as it is sent to other processes: the name of its type, and its message."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception."""
        return cls(type(error).__name__, str(error))

    def as_error(self, rank: int) -> PeerError:
        """Return the error to raise on a process that did not fail itself."""
        return PeerError(f"process {rank} failed: {self.kind}: {self.text}", rank, self.kind)


class Agreement(NamedTuple):
    """The result of :meth:`Collectives.agree`, the same on every process."""

    flags: list[bool]  # whether any process set it
    table: list[list[float]]  # the numbers of every process, a row each
    maxima: Tensor | None  # elementwise, on the device they were given on


class Collectives:
    """The collectives of a process group; with None, or a group of one, nothing is sent.

    All processes of the group have to call the same methods in the same order.

    Args:
        group: the processes that have different data, a ``torch.distributed.ProcessGroup``; None
            in a job of one process; ``"local"``: this process trains on its own.

    Attributes:
        is_single: whether there is no other process.

    Raises:
        TypeError: ``group`` is something else.
    """

    def __init__(self, group: Any = None) -> None:
        self._is_local = isinstance(group, str) and group == "local"
        group = None if self._is_local else group
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this process is in, "
                f"'local' or None, got {type(group).__name__}: call "
                "torch.distributed.init_process_group(), then pass torch.distributed.group.WORLD"
            )
        self.group = group
        self.rank, self.world_size = (0, 1) if group is None else (group.rank(), group.size())
        self.is_single = self.world_size == 1

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError(
                "a process_group exists in its own job alone and cannot be pickled: save "
                "state_dict() instead, and make the object anew with the new job's group"
            )
        return Collectives, ("local" if self._is_local else None,)

    @property
    def given(self) -> Any:
        """What these collectives were made with."""
        return "local" if self._is_local else self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> Collectives:
        return Collectives(self.given)

    def refuse_unknown_processes(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError for None in a job of several processes: their gradients would be lost.

        The job may begin later, so that this has to be called again at use. Where parameters are
        sharded (DTensors) over all processes, None means that all visit the same chunks.
        """
        known = self.group is not None or self._is_local or not dist.is_available()
        if known or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        size = mesh_size(params)
        if size == dist.get_world_size():
            return
        if size > 1:
            raise ValueError(
                f"this is one of {dist.get_world_size()} processes, {size} of which share the "
                "shards of parameters, and process_group is not given: pass process_group=, the "
                "processes that have different chunks (mesh.get_group() of the data-parallel "
                'dimension), or process_group="local" if others train on their own'
            )
        raise ValueError(
            f"this is one of {dist.get_world_size()} processes, and process_group is not given: "
            "each would follow the gradient of its own data. Pass "
            "process_group=torch.distributed.group.WORLD to sum over all, or "
            'process_group="local" if this process trains on its own'
        )

    @classmethod
    def named(cls, name: str) -> Collectives:
        """Return the collectives of a process group that this process is in, by its name."""
        return cls(dist.distributed_c10d._resolve_process_group(name))

    def ranks(self) -> list[int]:
        """Return the processes of the group by their ranks in the job."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)

    @staticmethod
    def global_rank() -> int:
        """Return the rank of this process in the job."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def check_devices(self, devices: set[torch.device]) -> None:
        """Raise ValueError for a device whose tensors the group's back end cannot send."""
        if self.is_single:
            return
        served = self._served()
        for device in devices:
            if device.type not in served:
                cure = {"cpu": "gloo", "cuda": "nccl"}.get(device.type, "one for it")
                raise ValueError(
                    f"process_group serves {', '.join(sorted(served))}, but the model is on "
                    f"{device}: make the group with the back end {cure}, or move the model"
                )

    def agree(
        self,
        flags: Sequence[bool],
        numbers: Sequence[float],
        device: torch.device,
        *,
        maxima: Tensor | None = None,
        error: BaseException | None = None,
    ) -> Agreement:
        """Exchange flags, numbers and maxima, and whether a process failed, in one all-reduce.

        Sends ``(1 + len(numbers)) * world_size + len(flags) + len(maxima)`` float64 values, through
        the CPU's back end if the group has one: only ``maxima`` is then read from the device.

        Args:
            flags: to be joined by "or".
            numbers: finite and not negative; exact up to 2**53.
            device: where the parameters are.
            maxima: a vector of numbers that are not negative, infinity in place of NaN.
            error: the exception that this process failed with, if it did.

        Raises:
            PeerError: another process failed, and this one did not.
        """
        if self.is_single:
            return Agreement(list(flags), [list(numbers)], maxima)
        table = torch.zeros(self.world_size, 1 + len(numbers), dtype=torch.float64)
        table[self.rank] = torch.tensor([error is not None, *numbers], dtype=torch.float64)
        own = torch.cat([table.flatten(), torch.tensor(flags, dtype=torch.float64)])
        found = own.to("cpu" if "cpu" in self._served() else device)
        if maxima is not None:
            found = torch.cat([found, maxima.to(found)])
        with self._sending("agree on a step"):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            host = found[: len(own)].cpu()
        rows = host[: table.numel()].view_as(table).tolist()
        if any(row[0] for row in rows):
            self._raise_failure(error)
        return Agreement(
            host[table.numel() :].bool().tolist(),
            [row[1:] for row in rows],
            None if maxima is None else found[len(own) :].to(maxima),
        )

    def report_error(
        self,
        error: BaseException,
        flags: int,
        numbers: int,
        device: torch.device,
        maxima: Tensor | None = None,
    ) -> None:
        """Report an error to the others, which wait in :meth:`agree` with the same lengths.

        Returns quietly if that fails too, so that the caller raises the error itself.
        """
        with contextlib.suppress(Exception):
            self.agree([False] * flags, [0.0] * numbers, device, maxima=maxima, error=error)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes; one all-reduce each."""
        if self.is_single:
            return
        with self._sending("sum"), torch.no_grad():
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def all_reduce_coalesced_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum; one all-reduce, in float64 on the first's device."""
        if self.is_single or not tensors:
            return
        device = tensors[0].device
        flat = torch.cat([t.reshape(-1).to(device, torch.float64) for t in tensors])
        self.all_reduce_([flat])
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))

    def all_gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the processes' (k, n) tensors by columns; n is ``counts[rank]``."""
        if self.is_single:
            return rows
        padded = rows.new_zeros(rows.shape[0], max(counts))
        padded[:, : rows.shape[1]] = rows
        found = [torch.empty_like(padded) for _ in counts]
        with self._sending("gather"):
            dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:, :n] for part, n in zip(found, counts, strict=True)], dim=1)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every process's value, picklable and small; too slow for every step."""
        if self.is_single:
            return [value]
        found: list[Any] = [None] * self.world_size
        with self._sending("exchange values"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, picklable; tensors in it have to be on the CPU."""
        if self.is_single:
            return value
        found = [value]
        with self._sending("share what process 0 read"):
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def check_same(self, facts: Mapping[str, Any], cure: str) -> None:
        """Raise the same ValueError on every process if a fact differs between them."""
        everyone = self.all_gather_object(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name in {**everyone[0], **theirs}:
                here, there = everyone[0].get(name, "missing"), theirs.get(name, "missing")
                if here != there:
                    raise ValueError(
                        f"the processes differ: {name} is {here} on process 0 and {there} on "
                        f"process {rank}: {cure}"
                    )

    def _raise_failure(self, error: BaseException | None) -> None:
        """Raise the first failure of another process, unless this one failed itself."""
        everyone = self.all_gather_object(None if error is None else Failure.of(error))
        if error is None:
            raise next(f.as_error(rank) for rank, f in enumerate(everyone) if f is not None)

    def _served(self) -> set[str]:
        return {p.partition(":")[0] for p in dist.get_backend_config(self.group).split(",")}

    @contextlib.contextmanager
    def _sending(self, what: str) -> Iterator[None]:
        """Turn a broken connection into a PeerError that says what could not be done."""
        begin = meetings.since = time.monotonic()
        meetings.count += 1
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PeerError(
                f"process {self.rank} of {self.world_size} could not {what} with the others, one "
                f"of which has probably died; see its own message, then start all again ({reason})",
                seconds=time.monotonic() - begin,
            ) from error
        finally:
            meetings.since = None


def checksum(tensors: Sequence[Tensor]) -> list[int]:
    """Return for each tensor, or its local shard, the sum of its bits: exact in any order."""
    words = [local(t).detach().view(_INTEGERS[t.element_size()]) for t in tensors]
    return torch.stack([w.sum(dtype=torch.int64).to(words[0].device) for w in words]).tolist()
