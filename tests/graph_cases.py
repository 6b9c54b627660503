"""What closures with CUDA graphs are tested on: a table of cases for two machines, a GPU with CUDA
graphs, and the CPU with the stand-in of tape.py, which keeps to what a CUDA graph does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from tape import Tape
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fbopt import FullBatchClosure, GradientPenalty, SharpnessAware
from fbopt._build import load
from fbopt._engine import cuda_capture, cuda_graphs
from fbopt._engine.vectorized import VectorizedGradient

CALLS, GROUP = 4, 3
FORWARD, CENTRAL, EXACT = (
    GradientPenalty(coefficient=0.1, method=m) for m in ("forward", "central", "exact")
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def place(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of a test, where chunks can be captured."""
    if name == "cuda":
        assert load.backend() == "reference" or load.cuda_kernels() is not None
        return torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setitem(cuda_capture.RECORDERS, "cpu", Tape)
    return torch.device("cpu")


def mlp(*extra: nn.Module, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), *extra, nn.Tanh(), nn.Linear(width, 3))


def ragged(*sizes: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Chunks of these sizes, each in memory of its own: alignment can decide on bits."""
    generator = torch.Generator().manual_seed(start)
    x = torch.randn(sum(sizes), 6, generator=generator)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return [(a.clone(), b.clone()) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]


class Case(NamedTuple):
    """What a closure is made of, what happens before each call, and the graphs there are then.

    `vmaps` says whether its chunks can be worked on at once.
    """

    name: str
    graphs: int
    given: Mapping[str, Any] = MappingProxyType({})
    model: Callable[[], nn.Module] = lambda: mlp(nn.BatchNorm1d(16), nn.Dropout(0.3))
    chunks: Callable[[], list] = lambda: ragged(8, 8, 8, 5)
    before: Callable[[nn.Module, FullBatchClosure, int], Any] = lambda model, closure, call: None
    around: Callable[[torch.device], Any] = lambda device: contextlib.nullcontext()
    vmaps: bool = True


def grouped(case: Case) -> Case:
    """The case with three times as many chunks, in groups of up to three."""

    def thrice() -> list:
        return [chunk for _ in range(3) for chunk in case.chunks()]

    return case._replace(given={**case.given, "vectorize": GROUP}, chunks=thrice)


class Routed(nn.Module):
    """Uses one layer for chunks of eight, the other for the rest, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a if len(x) == 8 else self.b)(x)


class Tied(nn.Module):
    """One weight used twice: autocast casts it once in a pass, and so do the gradients' sums."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Lazy(nn.Module):
    """Makes a buffer at its first pass, larger at the first longer chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.linspace(0, 1, len(x), device=x.device)
        return x * (1 + self.table[: len(x), None])


class Growing(nn.Module):
    """Writes to its buffer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().abs().sum()
        return x * torch.rsqrt(1 + self.seen)


def dictionaries() -> list[dict]:
    powers = (2.0, 2.0, 1.5, 2.0)
    return [
        {"x": x, "y": [y, None], "power": power, "name": "a"}
        for (x, y), power in zip(ragged(8, 8, 8, 5), powers, strict=True)
    ]


def of_dictionary(model: nn.Module, chunk: dict) -> Tensor:
    assert chunk["name"] == "a" and chunk["y"][1] is None
    return F.cross_entropy(model(chunk["x"]), chunk["y"][0]) ** chunk["power"]


def slope(model: nn.Module, points: Tensor) -> Tensor:
    """A loss with a derivative by the chunk itself."""
    out = model(points).sum()
    return torch.autograd.grad(out, points, create_graph=True)[0].square().mean()


def turn(attribute: str, *values: float) -> Callable:
    """Set an attribute of the dropout layer (model[2]) to one value after the other."""
    return lambda model, closure, call: setattr(model[2], attribute, values[call])


def reallocate(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    if call == 2:
        for p in model.parameters():
            p.data = p.data.clone()
        model[1].running_mean.data = model[1].running_mean.clone()


def widen(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    if call == 2:
        model.double()
        closure.chunks[:] = [(x.double(), y) for x, y in closure.chunks]


def validate(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    model.eval()
    with torch.no_grad():
        model(closure.chunks[0][0])
    model.train()


def freeze(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    model[0].requires_grad_(call < 2)


def shrink(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    """Let the units of exact sums not fit."""
    closure.chunks[:] = [(x / 2.0 ** (10 * call), y) for x, y in closure.chunks]


def replace_chunks(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
    device = closure.chunks[0][0].device
    closure.chunks[:] = [(x.to(device), y.to(device)) for x, y in ragged(8, 8, 8, 5, start=call)]


PENALISED = {"penalty": FORWARD}
CASES = [
    Case("no penalty", 2),
    Case("forward", 2, {"penalty": FORWARD}),
    Case("central", 2, {"penalty": CENTRAL}),
    Case("exact", 2, {"penalty": EXACT}),
    Case("exact sums", 2, {"accumulation": "exact"}),
    Case("exact sums, forward", 2, {"accumulation": "exact", **PENALISED}),
    Case("exact sums, central", 2, {"accumulation": "exact", "penalty": CENTRAL}),
    Case("exact sums, exact", 2, {"accumulation": "exact", "penalty": EXACT}),
    Case(
        "exact sums that are repeated",
        2,
        {"accumulation": "exact", **PENALISED},
        lambda: mlp(),
        before=shrink,
    ),
    Case("clipped chunks", 2, {"chunk_max_norm": 0.1}),
    Case("clipped chunks, central", 2, {"chunk_max_norm": 0.1, "penalty": CENTRAL}),
    Case(
        "clipped chunks, exact sums",
        2,
        {"chunk_max_norm": 0.1, "accumulation": "exact", **PENALISED},
    ),
    Case(
        "a clip that changes",
        4,
        {"chunk_norms": True},
        before=lambda m, c, i: setattr(c, "chunk_max_norm", (0.1, 0.2)[i // 2]),
        chunks=lambda: ragged(8, 8, 5, 5),
    ),
    Case("norm penalty", 2, {"penalty": GradientPenalty(coefficient=0.1, power=1)}),
    # Their visit for G captures graphs of its own; G is another at every call.
    *(
        Case(f"by all chunks, {method}", 2, {"penalty": penalty})
        for method in ("forward", "central", "exact")
        for penalty in [GradientPenalty(coefficient=0.1, full_strength=1.0, method=method)]
    ),
    Case("SAM", 2, {"penalty": SharpnessAware()}),
    Case("SAM by all chunks", 2, {"penalty": SharpnessAware(scope="full")}),
    Case("ASAM", 2, {"penalty": SharpnessAware(0.5, True)}),
    Case("ASAM, central", 2, {"penalty": SharpnessAware(0.5, True, method="central")}),
    Case(
        "ASAM by all chunks, exact sums",
        2,
        {"penalty": SharpnessAware(0.5, True, "full"), "accumulation": "exact"},
    ),
    Case(
        "ASAM by all chunks, many small tensors, clipped",
        2,
        {"penalty": SharpnessAware(0.5, True, "full", method="central"), "chunk_max_norm": 0.1},
        lambda: mlp(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(10))),
    ),
    Case("ASAM of two dtypes", 2, {"penalty": SharpnessAware(0.5, True)}, lambda: mixed()),
    Case(
        "an eta that changes",
        4,
        {"penalty": SharpnessAware(0.5, True)},
        before=lambda m, c, i: setattr(
            c, "penalty", SharpnessAware(0.5, True, eta=(0.01, 0.2)[i // 2])
        ),
        chunks=lambda: ragged(8, 8, 5, 5),
    ),
    Case("one chunk", 1, PENALISED, chunks=lambda: ragged(8)),
    Case("the same chunk again and again", 1, PENALISED, chunks=lambda: ragged(8) * 3),
    Case("several shapes", 4, PENALISED, chunks=lambda: ragged(8, 3, 8, 4, 5, 8, 3)),
    # torch's batch_norm under vmap takes no bfloat16 with statistics in float32 on the CPU.
    Case("in bfloat16", 2, {"autocast": torch.bfloat16, **PENALISED}, vmaps=False),
    Case("a tied weight in bfloat16", 2, {"autocast": torch.bfloat16, **PENALISED}, Tied),
    Case(
        "autocast around it",
        2,
        PENALISED,
        around=lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
        vmaps=False,
    ),
    Case(
        "autocast around a tied weight",
        2,
        PENALISED,
        Tied,
        around=lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
    ),
    Case(
        "bfloat16 parameters",
        2,
        PENALISED,
        lambda: mlp().bfloat16(),
        lambda: [(x.bfloat16(), y) for x, y in ragged(8, 8, 8, 5)],
    ),
    Case(
        "float64",
        2,
        PENALISED,
        lambda: mlp(nn.BatchNorm1d(16)).double(),
        lambda: [(x.double(), y) for x, y in ragged(8, 8, 8, 5)],
    ),
    Case(
        "many small tensors",
        2,
        {"penalty": CENTRAL},
        lambda: mlp(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(10))),
    ),
    Case("two dtypes", 2, PENALISED, lambda: mixed()),
    Case("parameters that some chunks use", 2, PENALISED, Routed),
    Case(
        "parameters that the last call does not use",
        2,
        PENALISED,
        Routed,
        lambda: ragged(8, 5),
        before=lambda m, c, i: c.chunks.pop(0) if i == 3 else None,
    ),
    Case("parameters that no chunk uses", 1, {}, Routed, lambda: ragged(8, 8)),
    Case("buffers written in place", 2, {"penalty": CENTRAL}, lambda: mlp(Growing()), vmaps=False),
    Case("a buffer that grows", 2, PENALISED, lambda: mlp(Lazy()), lambda: ragged(5, 8, 5, 8)),
    Case(
        "a buffer that grows after a capture",
        2,
        PENALISED,
        lambda: mlp(Lazy()),
        lambda: ragged(5, 5, 5, 5, 8, 5),
    ),
    Case("dictionaries", 3, {"evaluate": of_dictionary, **PENALISED}, chunks=dictionaries),
    Case(
        "a derivative by the chunk",
        2,
        {"evaluate": slope, **PENALISED},
        mlp,
        lambda: [x.clone().requires_grad_() for x in torch.randn(21, 6).split(8)],
        vmaps=False,
    ),
    Case(
        "a chunk with gaps, and one that overlaps itself",
        2,
        PENALISED,
        chunks=lambda: [
            (torch.randn(8, 12)[:, ::2], torch.zeros(8, dtype=torch.long)),
            (torch.randn(6).expand(8, 6), torch.zeros(8, dtype=torch.long)),
        ],
    ),
    Case("weights of its own", 2, {"weight": lambda c: 1.5 + c[0][0, 0].abs().item(), **PENALISED}),
    Case("new chunks at every call", 2, PENALISED, before=replace_chunks),
    Case(
        "a coefficient that follows the step",
        2,
        {"penalty": GradientPenalty(coefficient=lambda step: 0.1 / (1 + step))},
    ),
    Case(
        "a coefficient that is a tensor",
        2,
        {"penalty": GradientPenalty(coefficient=lambda step: torch.tensor(0.1 * step + 0.1))},
    ),
    Case(
        "a coefficient that is zero at times",
        2,
        {"penalty": GradientPenalty(coefficient=lambda step: 0.1 * (step % 2))},
        chunks=lambda: ragged(8, 8, 5, 5),
    ),
    Case("a validation between calls", 2, PENALISED, before=validate),
    Case(
        "eval mode at times",
        4,
        PENALISED,
        before=lambda m, c, i: m.train(i % 2 == 0),
        chunks=lambda: ragged(8, 8, 5, 5),
    ),
    Case(
        "dropout that changes",
        4,
        PENALISED,
        before=turn("p", 0.3, 0.3, 0.5, 0.5),
        chunks=lambda: ragged(8, 8, 5, 5),
    ),
    Case(
        "parameters that move", 2, PENALISED, before=reallocate, chunks=lambda: ragged(8, 8, 5, 5)
    ),
    Case("nothing but parameters that move", 1, {}, before=reallocate),
    Case("a dtype that changes", 2, PENALISED, before=widen, chunks=lambda: ragged(8, 8, 5, 5)),
    *(
        Case(
            f"BatchNorm in eval mode and back, {accumulation}",
            3,
            {"accumulation": accumulation},
            before=lambda model, closure, call: model[1].train(call != 1),
        )
        for accumulation in ("float32", "exact")
    ),
    Case("freezing", 2, PENALISED, before=freeze, chunks=lambda: ragged(8, 8, 5, 5)),
    Case(
        "switched off and on",
        2,
        PENALISED,
        chunks=lambda: ragged(8, 8, 5, 5, 8, 5),
        before=lambda m, c, i: setattr(c, "cuda_graph", c.wanted and i != 1),
    ),
]


def mixed() -> nn.Module:
    """Half of the parameters in float64."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mlp(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).double())

    return Mixed()


def placed(chunks: Any, device: torch.device) -> Any:
    """The chunks on a device, laid out as they are: a move of a view would close its gaps."""

    def move(t: Tensor) -> Tensor:
        whole = t.detach().as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
        moved = whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
        return moved.requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, move, chunks)


def graphs_of(closure: FullBatchClosure, of_groups: bool | None = None) -> int:
    """How many graphs there are, of groups alone, or of chunks alone."""
    states = closure._prepared.graphs._kinds.values()
    graphs = [state for state in states if isinstance(state, cuda_graphs._Graph)]
    return sum(of_groups in (None, isinstance(g.work, VectorizedGradient)) for g in graphs)


def drawn(device: torch.device) -> list[Tensor]:
    """Where the random generators stand."""
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def follow(case: Case, device: torch.device, cuda_graph: bool) -> tuple[list, FullBatchClosure]:
    """What every call gives and leaves behind, with a step of plain descent between calls."""
    torch.manual_seed(7)
    chunks = placed(case.chunks(), device)
    model = case.model().to(device)
    torch.manual_seed(8)
    loss_fn = None if "evaluate" in case.given else F.cross_entropy
    closure = FullBatchClosure(model, loss_fn, chunks, **case.given, cuda_graph=cuda_graph)
    closure.wanted = cuda_graph
    seen = []
    for call in range(CALLS):
        case.before(model, closure, call)
        with case.around(device):
            loss = closure()
        grads = [p.grad for p in model.parameters()]
        seen.append(bits(loss, grads, closure.mean_sqnorm, model, drawn(device)))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
    return seen, closure


def three_calls(device: torch.device, cuda_graph: bool = True, **given: Any) -> FullBatchClosure:
    """A closure with dropout and BatchNorm that has been called three times."""
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3)).to(device)
    given = {"loss_fn": F.cross_entropy, "chunks": placed(ragged(8, 8, 8, 5), device)} | given
    closure = FullBatchClosure(model, **given, cuda_graph=cuda_graph)
    for _ in range(3):
        closure()
    return closure
