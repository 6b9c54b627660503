"""cuda_graph=True: the same bits as without, call after call, from graphs that are replayed."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from graph_cases import (
    CALLS,
    CASES,
    CENTRAL,
    DEVICES,
    EXACT,
    FORWARD,
    GROUP,
    Case,
    drawn,
    follow,
    graphs_of,
    grouped,
    mlp,
    place,
    placed,
    ragged,
    three_calls,
)
from torch import Tensor, nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware
from fbopt._engine import cuda_capture, cuda_graphs

pytestmark = pytest.mark.usefixtures("one_thread")
in_groups_or_not = pytest.mark.parametrize("vectorize", [1, GROUP])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return place(request.param, monkeypatch)


def require_same_bits(case: Case, device: torch.device) -> FullBatchClosure:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Torch's, once, where nothing has used the GPU before.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
        seen, closure = follow(case, device, True)
        wanted, _ = follow(case, device, False)
    for call in range(CALLS):
        assert seen[call] == wanted[call], f"call {call}"
    return closure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bits_are_those_without_graphs(case: Case, device: torch.device):
    assert graphs_of(require_same_bits(case, device)) == case.graphs


@pytest.mark.parametrize("case", [case for case in CASES if case.vmaps], ids=lambda c: c.name)
def test_the_bits_of_groups_are_those_without_graphs(case: Case, device: torch.device):
    closure = require_same_bits(grouped(case), device)
    assert graphs_of(closure, of_groups=True) > 0


@in_groups_or_not
@pytest.mark.parametrize(
    "rule",
    [
        GradientPenalty(coefficient=0.1, full_strength=1.0, method="exact"),
        SharpnessAware(0.5, adaptive=True, scope="full"),
    ],
    ids=["full strength", "full scope"],
)
def test_replays_see_the_gradient_of_all_chunks_at_every_call(
    rule, vectorize: int, device: torch.device
):
    """It is another at every call, in the memory that the graphs have captured."""
    seen: dict[bool, list] = {True: [], False: []}
    for cuda_graph, found in seen.items():
        model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3)).to(device)
        chunks = placed(ragged(*[8] * 6), device)
        closure = FullBatchClosure(
            model,
            F.cross_entropy,
            chunks,
            penalty=rule,
            vectorize=vectorize,
            cuda_graph=cuda_graph,
        )
        torch.manual_seed(8)
        for _ in range(5):
            loss = closure()
            whole = closure._whole_gradient
            found.append(bits(loss, whole.grads, [p.grad for p in model.parameters()]))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
        if cuda_graph:
            assert graphs_of(closure) == graphs_of(whole.visitor) == 1
    assert seen[True] == seen[False]
    wholes = [str(whole) for _, whole, _ in seen[True]]
    assert len(set(wholes)) == len(wholes)


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


@in_groups_or_not
@pytest.mark.parametrize("penalty", [None, CENTRAL], ids=["no penalty", "central"])
def test_observers_see_every_chunk_and_may_keep_what_they_see(
    penalty, vectorize: int, device: torch.device
):
    seen: dict[bool, list] = {True: [], False: []}
    for cuda_graph, shown in seen.items():
        torch.manual_seed(0)
        three_calls(
            device,
            cuda_graph,
            penalty=penalty,
            observe=lambda output, target, shown=shown: shown.append((output, target)),
            vectorize=vectorize,
        )
    assert len(seen[True]) == 3 * 4
    assert bits(seen[True]) == bits(seen[False])
    assert not any(output.requires_grad for output, _ in seen[True])


@in_groups_or_not
def test_observers_see_what_evaluate_returns_beside_the_loss(vectorize: int, device: torch.device):
    name = "first" if vectorize == 1 else None  # of groups tensors alone can be observed

    def evaluate(model, chunk):
        output = model(chunk[0])
        return F.cross_entropy(output, chunk[1]), {"output": output, "name": name}

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
            vectorize=vectorize,
        )
    assert len(seen[True]) == 3 * 4
    assert bits(seen[True]) == bits(seen[False])


@in_groups_or_not
def test_an_observer_that_comes_later_sees_every_chunk(vectorize: int, device: torch.device):
    closure, seen = three_calls(device, vectorize=vectorize), []
    closure.observe = lambda output, target: seen.append(len(output))
    closure()
    assert seen == [8, 8, 8, 5]


def test_python_runs_at_visits_and_captures_only(device: torch.device):
    runs = []
    three_calls(device, loss_fn=lambda o, t: runs.append(len(o)) or F.cross_entropy(o, t))
    # The first call checks the loss of each; then one capture of 8, another visit and one of 5.
    assert sorted(runs) == [5, 5, 5, 8, 8, 8, 8]


@in_groups_or_not
def test_the_loss_of_every_chunk_is_checked_in_the_first_call(vectorize: int, device: torch.device):
    chunks = placed(ragged(*[8] * 3 * GROUP), device)
    chunks[-1][1][:3] = -100  # in the place of a replay
    closure = FullBatchClosure(
        mlp().to(device),
        chunks=chunks,
        evaluate=lambda model, chunk: F.cross_entropy(model(chunk[0]), chunk[1]),
        vectorize=vectorize,
        cuda_graph=True,
    )
    with pytest.raises(ValueError, match="chunk 8 is a cross-entropy with ignored targets"):
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


@in_groups_or_not
def test_graphs_are_freed_with_the_closure_and_when_switched_off(
    vectorize: int, device: torch.device
):
    """By the last reference, without the garbage collector."""
    given = {"penalty": CENTRAL, "vectorize": vectorize, "observe": lambda output, target: None}
    closure = three_calls(device, **given)
    for drop in (lambda c: (setattr(c, "cuda_graph", False), c()), lambda c: None):
        gc.collect()
        gc.disable()
        alive = weakref.ref(closure._prepared.graphs)
        drop(closure)
        if closure.cuda_graph:
            del closure
        assert alive() is None
        gc.enable()
        closure = three_calls(device, **given)


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


@pytest.mark.parametrize("vectorize, sizes", [(1, (5, 3, 8)), (2, (5, 5, 3, 3, 8, 8))])
def test_the_alignment_of_a_chunk_changes_nothing_from_call_to_call(
    vectorize: int, sizes: tuple[int, ...], device: torch.device
):
    """What libraries choose by it would be one thing without a graph, another with one.

    The chunks of three begin off the grid of vector loads.
    """
    x, y = (torch.cat(t).to(device) for t in zip(*ragged(*sizes), strict=True))
    chunks = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model = mlp(nn.BatchNorm1d(16)).to(device)
    given = {"penalty": FORWARD, "vectorize": vectorize, "cuda_graph": True}
    closure = FullBatchClosure(model, F.cross_entropy, chunks, **given)
    results = [bits(closure(), list(closure.sums.views)) for _ in range(4)]
    assert results == results[:1] * 4
    assert graphs_of(closure) == 3


@pytest.mark.cuda
@in_groups_or_not
@pytest.mark.parametrize("pinned", [False, True])
def test_chunks_on_the_cpu_are_moved(pinned: bool, vectorize: int):
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
            vectorize=vectorize,
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
@in_groups_or_not
def test_a_replayed_call_waits_for_nothing(vectorize: int):
    device = torch.device("cuda", torch.cuda.current_device())
    closure = three_calls(device, penalty=CENTRAL, vectorize=vectorize)
    torch.cuda.set_sync_debug_mode("error")
    try:
        closure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs_of(closure) == 2
