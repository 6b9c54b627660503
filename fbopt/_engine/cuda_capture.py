"""CUDA graph capture by torch, made safe for repeated random draws and failed captures."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
# Before torch 2.14 the allocator still uses a graph whose capture failed: it must not be freed.
_FAILED: list[torch.cuda.CUDAGraph] = []
# Central differences repeat a chunk's draws twice.
REPETITIONS = 2
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# From this version on a graph registers the generators that are used during its capture.
FINDS_GENERATORS = (2, 14)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures on a device, as libraries keep workspaces per stream."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Captures work on one device in CUDA graphs that share one memory pool.

    They may share it: they are replayed one after the other, and the tensors of their results are
    still referenced when the next one is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.cuda.default_generators[device.index]
        self._states = [self._generator.clone_state() for _ in range(REPETITIONS)]
        self._stream = _stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        """Run work on the capture stream, so that libraries allocate their workspaces for it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, work: Callable[[Draws], T], repetitions: int) -> tuple[T, Callable[[], None]]:
        """Capture ``work(draws)`` without executing it; return its result and the replay.

        Args:
            work: launches work on the device; ``draws`` replaces a GeneratorSnapshot, which a
                capture does not allow.
            repetitions: how often the work repeats its draws.

        Raises:
            RuntimeError: torch's own, which mentions capturing, where the work cannot be captured.
                Stream, generators and allocator are then as before.
        """
        graph, draws = torch.cuda.CUDAGraph(), Draws(self._generator, self._states[:repetitions])
        on_host = torch.default_generator.get_state()
        try:
            with self._capturing(graph, draws):
                result = work(draws)
            if not torch.equal(on_host, torch.default_generator.get_state()):
                raise RuntimeError(
                    "random numbers drawn on the CPU cannot be captured: they would be the same in "
                    "every replay"
                )
        except BaseException:
            torch.default_generator.set_state(on_host)
            self._clean_up(graph)
            raise

        def replay() -> None:
            draws.align()
            graph.replay()

        return result, replay

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph, draws: Draws) -> Iterator[None]:
        """Capture in a graph with the garbage collector off.

        Collecting an old graph would free memory, which can end a capture. The current stream is
        restored here since torch.cuda.graph does not do so when a capture fails.
        """
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
            ):
                draws.register(graph)
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    yield
        finally:
            if collects:
                gc.enable()

    def _clean_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a failed capture leaves behind in torch before 2.14.

        The allocator would go on allocating from the pool, and generators would refuse to draw
        outside of captures until one succeeds.
        """
        graph.reset()
        _FAILED.append(graph)
        with contextlib.suppress(RuntimeError):  # torch has done it already
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with self._capturing(torch.cuda.CUDAGraph(), Draws(self._generator, self._states)):
            torch.zeros((), device=self._device)
        # A pool that has lost all its graphs cannot be used again.
        self._pool = torch.cuda.graph_pool_handle()


RECORDERS: dict[str, type[CudaRecorder]] = {"cuda": CudaRecorder}  # by the type of a device


class Draws:
    """Repeats random draws within a capture, where no generator's state can be read or set.

    Each repetition draws from a state of its own; before every replay these are all set to the
    generator's state, where the chunk's draws begin.
    """

    def __init__(self, generator: torch.Generator, states: list[torch.Generator]) -> None:
        self._generator, self._states = generator, states

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """Register the states with a graph."""
        if TORCH >= FINDS_GENERATORS:  # which would warn at every call
            return
        for state in self._states:
            graph.register_generator_state(state)

    def align(self) -> None:
        """Set the states to the generator's."""
        now = self._generator.get_state() if self._states else None
        for state in self._states:
            state.set_state(now)

    def begin(self) -> None:
        """Do nothing: the draws begin where :meth:`align` was called."""

    @contextlib.contextmanager
    def repeated(self) -> Iterator[Callable[[], None]]:
        """See :meth:`fbopt._engine.snapshot.GeneratorSnapshot.repeated`."""
        own, states = self._generator.graphsafe_get_state(), iter(self._states)
        try:
            yield lambda: self._generator.graphsafe_set_state(next(states))
        finally:
            self._generator.graphsafe_set_state(own)
