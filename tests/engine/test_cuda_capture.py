"""CudaRecorder on a fake torch.cuda that records its calls, so that every line of it runs without a
GPU. What a graph computes is tested in test_cuda_graphs.py.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fbopt._engine import cuda_capture

SYNC = "CUDA error: operation not permitted when stream is capturing"
SPOILT = "CUDA error: operation failed due to a previous error during capture"


class Generator:
    """Has a state, shared with those that it was switched to, of a seed and an offset."""

    def __init__(self, state: list[int]) -> None:
        self.state = state

    def clone_state(self) -> Generator:
        return Generator(list(self.state))

    def get_state(self) -> list[int]:
        return list(self.state)

    def set_state(self, state: list[int]) -> None:
        self.state[:] = state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Graph:
    def __init__(self) -> None:
        self.states, self.resets, self.replays = [], 0, []

    def register_generator_state(self, generator: Generator) -> None:
        self.states.append(generator.state)

    def reset(self) -> None:
        self.resets += 1

    def replay(self) -> None:
        self.replays.append([list(state) for state in self.states])


class Cuda:
    """torch.cuda with one device; `spoilt` makes the next capture fail as torch's does."""

    def __init__(self) -> None:
        self.default_generators = [Generator([7, 100])]
        self.current, self.spoilt, self.pools = "main", False, 0
        self.captures: list[dict] = []
        self.users: dict[int, list[weakref.ref[Graph]]] = {}
        self.allocator: list[tuple[str, int]] = []
        self.CUDAGraph = Graph

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None, name="side")

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None, name=self.current)

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def device(self, device: torch.device) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def graph(self, graph: Graph, **options) -> Iterator[None]:
        users = self.users.setdefault(options["pool"], [])
        alive = [user() for user in users if user() is not None and not user().resets]
        assert alive or not users, "torch uses no pool again that has lost its graphs"
        users.append(weakref.ref(graph))
        self.captures.append(options | {"states": graph.states, "collects": gc.isenabled()})
        before, self.current = self.current, options["stream"].name
        try:
            yield
        finally:
            if self.spoilt:  # torch leaves the stream as it is then
                self.spoilt = False
                raise RuntimeError(SPOILT)
            self.current = before

    def end(self, index: int, pool: int) -> None:
        self.allocator.append(("end", pool))

    def release(self, index: int, pool: int) -> None:
        self.allocator.append(("release", pool))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    private = SimpleNamespace(_cuda_endAllocateToPool=cuda.end, _cuda_releasePool=cuda.release)
    fake = SimpleNamespace(
        cuda=cuda,
        _C=private,
        default_generator=torch.default_generator,
        equal=torch.equal,
        zeros=lambda *args, **kwargs: None,
    )
    monkeypatch.setattr(cuda_capture, "torch", fake)
    monkeypatch.setattr(cuda_capture, "_FAILED", [])
    monkeypatch.setattr(cuda_capture, "_stream", cuda.Stream)
    monkeypatch.setattr(cuda_capture, "TORCH", (2, 11))
    return cuda


def test_generators_are_registered_where_torch_has_to_be_told(cuda, monkeypatch):
    for version, expected in (((2, 13), 1), (cuda_capture.FINDS_GENERATORS, 0)):
        monkeypatch.setattr(cuda_capture, "TORCH", version)
        graph = Graph()
        cuda_capture.Draws(cuda.default_generators[0], [cuda.default_generators[0]]).register(graph)
        assert len(graph.states) == expected


def recorder() -> cuda_capture.CudaRecorder:
    return cuda_capture.CudaRecorder(SimpleNamespace(index=0))


def drawing(cuda: Cuda, seen: list, repetitions: int):
    """Work that notes which state its draws come from."""

    def work(draws) -> str:
        generator = cuda.default_generators[0]
        draws.begin()
        seen.append(generator.state)
        with draws.repeated() as rewind:
            for _ in range(repetitions):
                rewind()
                seen.append(generator.state)
        seen.append(generator.state)
        return "result"

    return work


@pytest.mark.parametrize("repetitions", [0, 1, 2])
def test_every_repetition_draws_from_a_state_of_its_own(repetitions: int, cuda: Cuda):
    own, seen = cuda.default_generators[0].state, []
    result, replay = recorder().capture(drawing(cuda, seen, repetitions), repetitions)
    assert result == "result"
    (capture,) = cuda.captures
    assert seen[0] is own and seen[-1] is own
    assert len({id(state) for state in seen[:-1]}) == 1 + repetitions
    assert [id(s) for s in seen[1:-1]] == [id(s) for s in capture["states"]]
    own[1] = 148
    replay()
    assert all(state == [7, 148] for state in capture["states"])
    assert own == [7, 148]
    assert capture["capture_error_mode"] == "thread_local" and not capture["collects"]
    assert gc.isenabled() and cuda.current == "main"


def test_graphs_share_a_pool_and_warm_up_on_the_stream_of_captures(cuda: Cuda):
    ours = recorder()
    kept = [ours.capture(lambda draws: None, 0) for _ in range(2)]
    assert len(kept) == len(cuda.captures)
    assert len({c["pool"] for c in cuda.captures}) == 1
    with pytest.raises(LookupError), ours.warming():
        assert cuda.current == "side" == cuda.captures[0]["stream"].name
        raise LookupError
    assert cuda.current == "main"


def read(draws) -> None:
    with draws.repeated() as rewind:
        rewind()
        raise RuntimeError(SYNC)


def test_a_failed_capture_is_cleaned_up_after(cuda: Cuda):
    ours, own = recorder(), cuda.default_generators[0].state
    cuda.spoilt = True
    with pytest.raises(RuntimeError, match=SPOILT) as caught:
        ours.capture(read, 1)
    assert str(caught.value.__context__) == SYNC
    assert cuda.default_generators[0].state is own
    assert gc.isenabled() and cuda.current == "main"
    failed, healing = cuda.captures
    assert cuda.allocator == [("end", failed["pool"]), ("release", failed["pool"])]
    assert healing["pool"] != failed["pool"] and len(healing["states"]) == 2
    assert [graph.resets for graph in cuda_capture._FAILED] == [1]
    assert ours.capture(lambda draws: "fine", 0)[0] == "fine"


def test_an_allocator_that_torch_has_cleaned_up_is_left_alone(cuda: Cuda, monkeypatch):
    def done(index: int, pool: int) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(cuda_capture.torch._C, "_cuda_endAllocateToPool", done)
    with pytest.raises(LookupError):
        recorder().capture(lambda draws: {}["mine"], 0)
    assert cuda.allocator == [] and cuda.current == "main"


def test_draws_on_the_cpu_are_refused_and_undone(cuda: Cuda):
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on the CPU cannot be captured"):
        recorder().capture(lambda draws: torch.rand(3), 0)
    assert torch.equal(torch.get_rng_state(), before)
