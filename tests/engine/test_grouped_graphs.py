"""cuda_graph=True with vectorize=K or compile=True: what is particular to groups of chunks. Their
bits are compared with those without graphs in test_cuda_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from graph_cases import (
    CALLS,
    CENTRAL,
    DEVICES,
    EXACT,
    FORWARD,
    Case,
    drawn,
    follow,
    graphs_of,
    mlp,
    place,
    placed,
    ragged,
)
from tape import as_kernels
from torch import Tensor, nn

from fbopt import FullBatchClosure
from fbopt._engine.stacked import StackedPerturbation
from fbopt._engine.vectorized_probe import Probe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return place(request.param, monkeypatch)


def grouped(model: nn.Module, device: torch.device, *sizes: int, **given: Any) -> FullBatchClosure:
    """A closure that works on up to two chunks at once, with CUDA graphs."""
    given = {"vectorize": 2, "cuda_graph": True, "loss_fn": F.cross_entropy} | given
    return FullBatchClosure(model.to(device), chunks=placed(ragged(*sizes), device), **given)


def counted(kind: type, monkeypatch: pytest.MonkeyPatch) -> list:
    """Grows by one whenever an object of this kind is made."""
    made, make = [], kind.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        make(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", init)
    return made


def by_hand(model: nn.Module, chunk: tuple[Tensor, Tensor]) -> Tensor:
    """A loss of which nobody knows what it is the mean over."""
    return F.cross_entropy(model(chunk[0]), chunk[1])


OWN_LOSS = {"loss_fn": None, "evaluate": by_hand}


@pytest.mark.parametrize("given", [{}, OWN_LOSS], ids=["a known loss", "a loss of its own"])
def test_groups_are_compared_with_chunks_in_the_first_call_alone(
    given, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Not in a capture, and not for other chunks that are replayed."""
    compared = counted(Probe, monkeypatch)
    closure = grouped(mlp(), device, *[8] * 8, 5, 5, penalty=FORWARD, **given)
    closure()
    first = len(compared)
    closure(), closure()
    assert graphs_of(closure, of_groups=True) == 2
    closure.chunks = placed(ragged(*[8] * 8, 5, 5, start=1), device)
    closure()
    assert len(compared) == first > 0


class Act(nn.Module):
    """Passes its input on, and does something else while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(()))
        self.act: Callable[[Act], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None:
            self.act(self)
        return x * self.one


def boom(module: Act) -> None:
    raise LookupError("mine")


FAULTS = [
    pytest.param(lambda m: m.one.item(), RuntimeError, "chunks 2 to 3 cannot be cap", id="a read"),
    pytest.param(boom, LookupError, "^mine$", id="its own error"),
]
PASSES = {None: 1, FORWARD: 2, CENTRAL: 3, EXACT: 1}


@pytest.mark.parametrize("penalty", PASSES, ids=lambda p: p and p.method)
@pytest.mark.parametrize("act, error, match", FAULTS)
def test_a_capture_that_fails_changes_nothing(penalty, act, error, match, device: torch.device):
    """In the first pass or a shifted one; the repaired model goes on as if nothing had been."""
    for at in range(1, PASSES[penalty] + 1):
        results = []
        for fails in (True, False):
            model = mlp(nn.BatchNorm1d(16), Act(), nn.Dropout(0.3))
            closure = grouped(model, device, 5, 5, 8, 8, penalty=penalty)
            torch.manual_seed(3)
            closure(), closure()
            if fails:
                fail(closure, act, PASSES[penalty] + at, error, match)
            torch.manual_seed(4)
            results.append(bits([closure(), closure()], model, drawn(device)))
            assert graphs_of(closure, of_groups=True) == 2
        assert results[0] == results[1]


def fail(closure: FullBatchClosure, act: Callable, at: int, error: type, match: str) -> None:
    """Let one pass of the third call fail, when the first group has a graph."""
    runs = 0

    def once(module: Act) -> None:
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
    assert graphs_of(closure) == 1


def test_the_points_of_groups_stay_where_their_graphs_write_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Also where layers are in eval mode in between, which no graph was captured in."""
    made = counted(StackedPerturbation, monkeypatch)
    closure = grouped(mlp(nn.BatchNorm1d(16)), device, *[8] * 6, penalty=FORWARD)
    for training in (True, False, True):
        closure.model.train(training)
        closure()
    assert len(made) == 1
    assert graphs_of(closure, of_groups=True) == 2


def switch(**values: tuple) -> Callable:
    """Set attributes of the closure before its calls."""

    def before(model: nn.Module, closure: FullBatchClosure, call: int) -> None:
        for name, value in values.items():
            setattr(closure, name, value[call])

    return before


def require_same_bits(case: Case, device: torch.device) -> FullBatchClosure:
    seen, closure = follow(case, device, True)
    wanted, _ = follow(case, device, False)
    for call in range(CALLS):
        assert seen[call] == wanted[call], f"call {call}"
    return closure


def test_groups_of_another_size_are_captured_anew(device: torch.device):
    sizes = switch(vectorize=(2, 2, 3, 1))
    case = Case("", 0, {"penalty": CENTRAL}, chunks=lambda: ragged(*[8] * 6), before=sizes)
    closure = require_same_bits(case, device)
    assert (graphs_of(closure, of_groups=True), graphs_of(closure, of_groups=False)) == (1, 1)


def test_compiled_chunks_are_captured(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """In groups, and one by one. They are compiled when a kind is new, and never in a capture."""
    if device.type == "cpu":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *f, **o: as_kernels(compile_(*f, **o)))
    case = Case(
        "",
        0,
        {"penalty": FORWARD, "vectorize": 2},
        chunks=lambda: ragged(*[8] * 6, 5),
        before=switch(compile=(True, True, False, True)),
    )
    closure = require_same_bits(case, device)
    assert graphs_of(closure, of_groups=True) == 3
