"""Jobs of several processes for tests: what every rank finds, started once for a test file."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What every process would import by itself otherwise: DTensors need torch._dynamo.
PRELOAD = [
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch.distributed.checkpoint.state_dict", "fbopt.optim"),
]
Work = Callable[[int, int, Path], Any]
Job = Callable[[int, int, Path], contextlib.AbstractContextManager[None]]


def run_all(work: Work, worlds: Sequence[int], folder: Path) -> dict[int, list[Any]]:
    """Return by size what ``work(rank, world, folder)`` returned on each rank of a job."""
    return {world: run(work, world, folder) for world in worlds}


def run(
    work: Work,
    world: int,
    folder: Path,
    *,
    job: Job | None = None,
    preload: Sequence[str] = PRELOAD,
    is_killed: bool = False,
) -> list[Any]:
    """Start one job and wait for it.

    `job` begins and ends the process group, by default gloo's; `is_killed`: all processes end by
    SIGKILL, and leave nothing.
    """
    own = folder / f"job of {world}"
    own.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    processes = [
        context.Process(target=_work, args=(work, rank, world, folder, own, job or gloo))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(own.glob("*.txt")))
    codes = {process.exitcode for process in processes}
    assert codes == {-signal.SIGKILL if is_killed else 0}, f"{codes}\n{reports}"
    if is_killed:
        return []
    return [torch.load(own / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(work: Work, rank: int, world: int, folder: Path, own: Path, job: Job) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a collection would write to, and so copy, all memory that processes share
    try:
        with job(rank, world, own):
            torch.save(work(rank, world, folder), own / f"{rank}.pt")
    except BaseException:
        (own / f"{rank}.txt").write_text(traceback.format_exc())
        raise


@contextlib.contextmanager
def gloo(rank: int, world: int, own: Path) -> Iterator[None]:
    """A process group by way of a file."""
    store = dist.FileStore(str(own / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within the context that are alive.

    Attributes:
        peak: the most after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_plain(t)}
        for t in tree_leaves(out):
            if is_plain(t) and (key := t.untyped_storage()._cdata) not in given:
                self._known[key] = weakref.ref(t.untyped_storage())
        # FSDP2 frees memory by resize_(0), so that sizes change.
        alive = {key: storage for key, ref in self._known.items() if (storage := ref()) is not None}
        self._known = {key: self._known[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return out


def is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


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
