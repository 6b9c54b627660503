"""A stand-in for CUDA graphs on the CPU: it records what is done on tensors and does it again.

It keeps to what a CUDA graph does. A capture changes nothing; a replay repeats the work on the very
memory of the capture, and no Python; memory that nothing refers to after the capture may be reused;
reading a value during a capture fails, and spoils the rest of the capture.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape:
    """Has the methods of :class:`fbopt._engine.cuda_capture.CudaRecorder`, and counts."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0
        self.logs: list[weakref.ref[Log]] = []

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[Any], Any], repetitions: int) -> tuple[Any, Callable]:
        log = Log()
        lost = self.logs and not any(known() for known in self.logs)
        assert not lost, "a pool of memory that has lost its graphs is not used again"
        draws = Draws(log, repetitions)
        state = torch.get_rng_state()
        try:
            with log:
                result = work(draws)
            if log.spoilt:
                raise RuntimeError("operation failed due to a previous error during capture")
        finally:
            assert not draws.switched
            log.undo()
            torch.set_rng_state(state)
        log.close()
        self.logs.append(weakref.ref(log))
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            log.replay()

        return result, replay


class Draws:
    """Repeats draws when the tape is replayed, as :class:`fbopt._engine.cuda_capture.Draws`."""

    def __init__(self, log: Log, repetitions: int) -> None:
        self.log, self.left, self.switched, self.states = log, repetitions, False, {}

    def begin(self) -> None:
        self.note("start")

    @contextlib.contextmanager
    def repeated(self) -> Iterator[Callable[[], None]]:
        self.note("after")
        self.switched = True
        try:
            yield self.rewind
        finally:
            self.go_to("after")
            self.switched = False

    def rewind(self) -> None:
        self.left -= 1
        assert self.left >= 0, "more repetitions than were announced"
        self.go_to("start")

    def note(self, name: str) -> None:
        self.log.do(lambda: self.states.update({name: torch.get_rng_state()}))

    def go_to(self, name: str) -> None:
        self.log.do(lambda: torch.set_rng_state(self.states[name]))


class Log(TorchDispatchMode):
    """All operations while it is on, with aliases of their tensors: `p.data = t` moves no alias."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.aliases: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside, and its bytes
        self.made: dict[int, Tensor] = {}
        self.scratch: list[Tensor] = []
        self.spoilt = False

    def do(self, step: Callable[[], None]) -> None:
        step()
        self.steps.append(step)

    def alias(self, tensor: Tensor) -> Tensor:
        self.aliases.append(tensor.detach())
        return self.aliases[-1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(t, Tensor) and t.is_meta for t in leaves) or meta(kwargs):
            return func(*args, **(kwargs or {}))  # arithmetic on shapes
        if READS & set(func.tags):
            self.spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.record(func, args, kwargs or {}, func._schema.is_mutable)

    def record(self, func: Callable, args: tuple, kwargs: dict, writes: bool) -> Any:
        """Do an operation, to be repeated if it writes to memory, which may be new."""
        args, kwargs = tree_map_only(Tensor, self.alias, (args, kwargs))
        given = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and address(t) not in self.before | self.made:
                self.before[address(t)] = (whole(t), whole(t).clone())
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [None if address(t) in given else self.alias(t) for t in outputs]
        for t in fresh:
            if t is not None:
                self.made[address(t)] = t
        if writes or any(t is not None for t in fresh):
            self.steps.append(lambda: run(func, args, kwargs, fresh))
        return result

    def undo(self) -> None:
        """Let nothing have happened: no change to what there was, garbage in what was made."""
        for memory, held in self.before.values():
            memory.copy_(held)
        for t in self.made.values():
            whole(t).fill_(255)

    def close(self) -> None:
        """Find the memory that is anyone's."""
        mine: dict[int, int] = {}
        for t in self.aliases:
            mine[address(t)] = mine.get(address(t), 0) + 1
        for t in self.made.values():
            if references(t) == mine[address(t)]:
                self.scratch.append(t)

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for step in self.steps:
                step()
        for t in self.scratch:
            whole(t).fill_(255)


def as_kernels(compiled: Callable) -> Callable:
    """A compiled function as one operation of a tape, which does not see its kernels.

    It is not compiled during a capture, as torch refuses that.
    """

    def call(*args: Any) -> Any:
        log = _get_current_dispatch_mode()
        if log is None:
            return compiled(*args)
        with _disable_current_modes(), torch.compiler.set_stance("fail_on_recompile"):
            return log.record(compiled, args, {}, writes=True)

    return call


def run(func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor | None]) -> None:
    """Do an operation again, into the memory that its results had."""
    again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
    for mine, new in zip(outputs, again, strict=True):
        if mine is not None:
            mine.copy_(new)


def meta(kwargs: dict | None) -> bool:
    return torch.device((kwargs or {}).get("device") or "cpu").type == "meta"


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def whole(tensor: Tensor) -> Tensor:
    """All memory of a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def references(tensor: Tensor) -> int:
    """How many tensors refer to the memory of this one."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # `storage` is one, too
