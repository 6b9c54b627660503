"""cuda_graph=True: the same bits as without, call after call, from graphs that are replayed.

One table of cases serves two machines: a GPU with CUDA graphs, and the CPU with the stand-in of
tape.py, which keeps to what a CUDA graph does.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
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

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._build import load
from fbopt._engine import cuda_capture, cuda_graphs

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = 4
FORWARD, CENTRAL, EXACT = (
    GradientPenalty(coefficient=0.1, method=m) for m in ("forward", "central", "exact")
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
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
    """What a closure is made of, what happens before each call, and the graphs there are then."""

    name: str
    graphs: int
    given: Mapping[str, Any] = MappingProxyType({})
    model: Callable[[], nn.Module] = lambda: mlp(nn.BatchNorm1d(16), nn.Dropout(0.3))
    chunks: Callable[[], list] = lambda: ragged(8, 8, 8, 5)
    before: Callable[[nn.Module, FullBatchClosure, int], Any] = lambda model, closure, call: None
    around: Callable[[torch.device], Any] = lambda device: contextlib.nullcontext()


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
    Case("one chunk", 1, PENALISED, chunks=lambda: ragged(8)),
    Case("several shapes", 4, PENALISED, chunks=lambda: ragged(8, 3, 8, 4, 5, 8, 3)),
    Case("in bfloat16", 2, {"autocast": torch.bfloat16, **PENALISED}),
    Case("a tied weight in bfloat16", 2, {"autocast": torch.bfloat16, **PENALISED}, Tied),
    Case(
        "autocast around it",
        2,
        PENALISED,
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
    Case("buffers written in place", 2, {"penalty": CENTRAL}, lambda: mlp(Growing())),
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


def graphs_of(closure: FullBatchClosure) -> int:
    return sum(
        isinstance(state, cuda_graphs._Graph) for state in closure._prepared.graphs._kinds.values()
    )


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_are_those_without_graphs(case: Case, device: torch.device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Torch's, once, where nothing has used the GPU before.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
        seen, closure = follow(case, device, True)
        wanted, _ = follow(case, device, False)
    for call in range(CALLS):
        assert seen[call] == wanted[call], f"call {call}"
    assert graphs_of(closure) == case.graphs


def three_calls(device: torch.device, cuda_graph: bool = True, **given: Any) -> FullBatchClosure:
    """A closure with dropout and BatchNorm that has been called three times."""
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3)).to(device)
    given = {"loss_fn": F.cross_entropy, "chunks": placed(ragged(8, 8, 8, 5), device)} | given
    closure = FullBatchClosure(model, **given, cuda_graph=cuda_graph)
    for _ in range(3):
        closure()
    return closure


@pytest.mark.parametrize("kind", ["FullBatchGD", "LBFGS", "Adam"])
def test_optimizers_take_the_same_steps(kind: str, device: torch.device):
    def train(cuda_graph: bool) -> tuple[list, int]:
        torch.manual_seed(0)
        model, penalty = mlp(nn.BatchNorm1d(16)).to(device), FORWARD
        chunks = placed(ragged(8, 8, 8, 5), device)
        if kind == "FullBatchGD":
            optimizer = FullBatchGD(
                model.parameters(), lr=torch.tensor(0.4), momentum=0.9, max_norm=0.25
            )
            penalty = GradientPenalty(strength=0.5)
        else:
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        closure = FullBatchClosure(
            model,
            F.cross_entropy,
            chunks,
            penalty=penalty,
            optimizer=optimizer,
            cuda_graph=cuda_graph,
        )
        losses = []
        for _ in range(5):
            losses.append(optimizer.step(closure))
            schedule.step()
        return bits(losses, model, optimizer), graphs_of(closure) if cuda_graph else 0

    graphed, graphs = train(True)
    assert graphed == train(False)[0]
    assert graphs == 2


@pytest.mark.parametrize("penalty", [None, CENTRAL], ids=["no penalty", "central"])
def test_observers_see_every_chunk_and_may_keep_what_they_see(penalty, device: torch.device):
    seen: dict[bool, list] = {True: [], False: []}
    for cuda_graph, shown in seen.items():
        torch.manual_seed(0)
        three_calls(
            device,
            cuda_graph,
            penalty=penalty,
            observe=lambda output, target, shown=shown: shown.append((output, target)),
        )
    assert len(seen[True]) == 3 * 4
    assert bits(seen[True]) == bits(seen[False])
    assert not any(output.requires_grad for output, _ in seen[True])


def test_observers_see_what_evaluate_returns_beside_the_loss(device: torch.device):
    def evaluate(model, chunk):
        output = model(chunk[0])
        return F.cross_entropy(output, chunk[1]), {"output": output, "name": "first"}

    seen: dict[bool, list] = {True: [], False: []}
    for cuda_graph, shown in seen.items():
        torch.manual_seed(0)
        three_calls(
            device,
            cuda_graph,
            loss_fn=None,
            evaluate=evaluate,
            penalty=CENTRAL,
            observe=lambda aux, chunk, shown=shown: shown.append((aux, chunk)),
        )
    assert len(seen[True]) == 3 * 4
    assert bits(seen[True]) == bits(seen[False])


def test_an_observer_that_comes_later_sees_every_chunk(device: torch.device):
    closure, seen = three_calls(device), []
    closure.observe = lambda output, target: seen.append(len(output))
    closure()
    assert seen == [8, 8, 8, 5]


def test_python_runs_at_visits_and_captures_only(device: torch.device):
    runs = []
    three_calls(device, loss_fn=lambda o, t: runs.append(len(o)) or F.cross_entropy(o, t))
    # The first call checks the loss of each; then one capture of 8, another visit and one of 5.
    assert sorted(runs) == [5, 5, 5, 8, 8, 8, 8]


def test_the_loss_of_every_chunk_is_checked_in_the_first_call(device: torch.device):
    chunks = placed(ragged(8, 8, 8, 8, 8), device)
    chunks[-1][1][:3] = -100  # in the place of a replay
    closure = FullBatchClosure(
        mlp().to(device),
        chunks=chunks,
        evaluate=lambda model, chunk: F.cross_entropy(model(chunk[0]), chunk[1]),
        cuda_graph=True,
    )
    with pytest.raises(ValueError, match="chunk 4 is a cross-entropy with ignored targets"):
        closure()


def test_more_kinds_than_graphs_run_without_and_are_told_of_once(device: torch.device):
    sizes = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    results = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            closure = three_calls(
                device,
                cuda_graph,
                chunks=placed(ragged(*sizes, *sizes), device),
                penalty=FORWARD,
            )
            results.append(bits(closure(), closure.model, list(closure.sums.views)))
        if cuda_graph:
            assert graphs_of(closure) == cuda_graphs.LIMIT == 8
            (warning,) = caught
            assert warning.category is RuntimeWarning
            assert "at most 8 kinds" in str(warning.message)
            assert "equal in size" in str(warning.message)
    assert results[0] == results[1]


def test_a_model_that_moves_at_every_call_is_given_up_on(device: torch.device):
    closure = three_calls(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(cuda_graphs.LIMIT + 3):
            for p in closure.model.parameters():
                p.data = p.data.clone()
            closure()
    assert graphs_of(closure) == 0
    assert len(caught) == 1 and "memory has moved" in str(caught[0].message)


class Boom(Exception):
    pass


class Fault(nn.Module):
    """Does something else than pass its input on, while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.act: Callable[[Fault], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.act is not None:
            self.act(self)
        return x


def boom(module: Fault) -> None:
    raise Boom


def replace(module: Fault) -> None:
    module.count = module.count + 1


def swallow(module: Fault) -> None:
    with contextlib.suppress(RuntimeError):
        module.count.item()


def unrelated(module: Fault) -> None:
    raise RuntimeError("mine")


FAULTS = [
    pytest.param(lambda m: m.count.item(), RuntimeError, r"chunk 1 .*\.item\(\)", id="item"),
    pytest.param(lambda m: bool(m.count > 0), RuntimeError, "cuda_graph=False", id="branch"),
    pytest.param(lambda m: m.count.nonzero(), RuntimeError, "depends on values", id="shape"),
    pytest.param(swallow, RuntimeError, "cannot be captured", id="a read that is forgiven"),
    pytest.param(replace, RuntimeError, r"buffer 2\.count .*in place", id="another buffer"),
    pytest.param(boom, Boom, None, id="its own error"),
    pytest.param(unrelated, RuntimeError, "^mine$", id="its own RuntimeError"),
]


PASSES = {None: 1, FORWARD: 2, CENTRAL: 3, EXACT: 1}


@pytest.mark.parametrize("penalty", PASSES, ids=lambda p: p and p.method)
@pytest.mark.parametrize("act, error, match", FAULTS)
def test_a_capture_that_fails_changes_nothing(penalty, act, error, match, device: torch.device):
    """In the first pass or a shifted one; the repaired model goes on as if nothing had been."""
    for at in range(1, 2 if act is replace else PASSES[penalty] + 1):  # shifted passes put it back
        results = []
        for fails in (True, False):
            model = mlp(nn.BatchNorm1d(16), Fault(), nn.Dropout(0.3)).to(device)
            chunks = placed(ragged(5, 8), device)
            closure = FullBatchClosure(
                model, F.cross_entropy, chunks, penalty=penalty, cuda_graph=True
            )
            torch.manual_seed(3)
            closure(), closure()
            if fails:
                fail(closure, act, PASSES[penalty] + at, error, match)
            torch.manual_seed(4)
            results.append(bits([closure(), closure()], model, drawn(device)))
            assert graphs_of(closure) == 2
        assert results[0] == results[1]


def fail(closure: FullBatchClosure, act: Callable, at: int, error: type, match: str | None) -> None:
    """Let one pass of the third call do something that fails, when the first chunk has a graph."""
    runs = 0

    def once(module: Fault) -> None:
        nonlocal runs
        runs += 1
        if runs == at:
            act(module)

    model = closure.model
    held = bits(model, closure.step), [p.data_ptr() for p in model.parameters()]
    model[2].act = once
    with pytest.raises(error, match=match):
        closure()
    model[2].act = None
    assert held == (bits(model, closure.step), [p.data_ptr() for p in model.parameters()])
    assert graphs_of(closure) == (0 if act is replace else 1)


def test_a_buffer_that_another_tensor_replaces_is_named_at_the_third_call(device: torch.device):
    fault = Fault()
    fault.act = replace
    closure = FullBatchClosure(
        mlp(fault).to(device), F.cross_entropy, placed(ragged(8), device), cuda_graph=True
    )
    closure(), closure()
    with pytest.raises(RuntimeError, match=r"buffer 1\.count .*in place"):
        closure()
    assert fault.count == 4


def test_graphs_are_freed_with_the_closure_and_when_switched_off(device: torch.device):
    """By the last reference, without the garbage collector."""
    closure = three_calls(device, penalty=CENTRAL, observe=lambda output, target: None)
    for drop in (lambda c: (setattr(c, "cuda_graph", False), c()), lambda c: None):
        gc.collect()
        gc.disable()
        alive = weakref.ref(closure._prepared.graphs)
        drop(closure)
        if closure.cuda_graph:
            del closure
        assert alive() is None
        gc.enable()
        closure = three_calls(device, penalty=CENTRAL)


def test_autocast_keeps_nothing_of_a_capture(device: torch.device):
    """What it cast in one that failed was never computed."""
    calls = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise Boom
        return F.cross_entropy(output, target)

    model, (x, y) = mlp().to(device), placed(ragged(8), device)[0]
    closure = FullBatchClosure(model, loss_fn, [(x, y)], cuda_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        closure(), closure()
        with pytest.raises(Boom):
            closure()
        got = model(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert bits(got) == bits(model(x))


def test_needs_a_gpu():
    with pytest.raises(ValueError, match=r"cuda_graph=True needs .* CUDA device.*on cpu: move"):
        FullBatchClosure(mlp(), F.cross_entropy, ragged(8), cuda_graph=True)


def test_moving_away_from_the_gpu_is_refused(device: torch.device, monkeypatch):
    closure = three_calls(device)
    monkeypatch.delitem(cuda_capture.RECORDERS, "cpu", raising=False)
    closure.model.cpu()
    before = bits(closure.model, closure.step)
    with pytest.raises(ValueError, match=r"cuda_graph=True needs .*they are on cpu"):
        closure()
    assert bits(closure.model, closure.step) == before


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", None])
def test_graphs_are_not_nested(mode: str | None, device: torch.device):
    refused = pytest.raises(ValueError, match=r"already captures .*max-autotune-no-cudagraphs")
    whole, part = mlp().to(device), mlp().to(device)
    part[0].compile(mode=mode)
    for model in (torch.compile(whole, mode=mode), part):
        with refused if mode else contextlib.nullcontext():
            FullBatchClosure(model, F.cross_entropy, ragged(8), cuda_graph=True)


STRANGE = [
    (lambda x, y: (x.to_sparse(), y), "holds a torch.sparse_coo tensor"),
    (lambda x, y: (x, y.cpu().numpy()), "holds a ndarray.*take it apart"),
    (lambda x, y: ({"x": x}, object()), "holds a object"),
]


@pytest.mark.parametrize("make, match", STRANGE)
def test_chunks_that_cannot_be_copied_are_named(make, match: str, device: torch.device):
    chunks = [make(x, y) for x, y in placed(ragged(8), device)]
    closure = FullBatchClosure(
        mlp().to(device), F.cross_entropy, chunks, weight=lambda c: 1, cuda_graph=True
    )
    with pytest.raises(TypeError, match=f"chunk 0 {match}"):
        closure()


def test_the_alignment_of_a_chunk_changes_nothing_from_call_to_call(device: torch.device):
    """What libraries choose by it would be one thing without a graph, another with one."""
    sizes = (5, 3, 8)  # the second one begins off the grid of vector loads
    x, y = (torch.cat(t).to(device) for t in zip(*ragged(*sizes), strict=True))
    chunks = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model = mlp(nn.BatchNorm1d(16)).to(device)
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=FORWARD, cuda_graph=True)
    results = [bits(closure(), list(closure.sums.views)) for _ in range(4)]
    assert results == results[:1] * 4
    assert graphs_of(closure) == len(sizes)


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_chunks_on_the_cpu_are_moved(pinned: bool):
    device, observed = torch.device("cuda", torch.cuda.current_device()), []
    chunks = [(x.pin_memory(), y) if pinned else (x, y) for x, y in ragged(8, 8, 8, 5)]
    results = []
    for given, cuda_graph in ((chunks, True), (placed(chunks, device), False)):
        torch.manual_seed(0)
        closure = three_calls(
            device,
            cuda_graph,
            chunks=given,
            penalty=FORWARD,
            observe=lambda o, t: observed.append((o.argmax(1) == t).sum()),
        )
        results.append(bits(closure(), closure.model))
    assert results[0] == results[1]
    half = len(observed) // 2
    assert bits(observed[:half]) == bits(observed[half:])


@pytest.mark.cuda
def test_a_failed_capture_leaves_stream_and_allocator_usable():
    """Also in versions of torch that do not clean up after themselves."""
    device = torch.device("cuda", torch.cuda.current_device())
    closure = three_calls(device, chunks=placed(ragged(8), device))
    stream = torch.cuda.current_stream()
    fault = Fault().to(device)
    closure.model.append(fault)
    closure(), closure()
    fault.act = lambda module: module.count.item()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        closure()
    fault.act = None
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()
    F.dropout(torch.ones(8, device=device), 0.5)
    closure(), closure()
    torch.cuda.synchronize()


@pytest.mark.cuda
def test_a_replayed_call_waits_for_nothing():
    device = torch.device("cuda", torch.cuda.current_device())
    closure = three_calls(device, penalty=CENTRAL)
    torch.cuda.set_sync_debug_mode("error")
    try:
        closure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs_of(closure) == 2
