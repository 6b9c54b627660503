"""compile=True: the same numbers from compiled passes, of one chunk and of K, and what to do where
chunks cannot be compiled. Few cases, as each is compiled for seconds.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from at_once import chunked, flat, make, mlp, require_close, require_same
from torch import nn

from fbopt import GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")


def test_equals_one_by_one_with_a_ragged_rest():
    """Groups of three, and one chunk of another size, which is compiled by itself."""
    chunks = chunked(26)
    require_same(mlp(nn.BatchNorm1d(6)), chunks, 3, method="forward", compile=True, observed=True)


def test_masks_are_the_same_in_all_passes():
    """By a radius of which other masks would make noise, see test_vectorized_draws.py."""
    model, found = mlp(nn.Dropout(0.3)), []
    closure = make(model, chunked(), vectorize=3, compile=True)
    for method in ("forward", "central"):
        torch.manual_seed(3)
        closure.penalty = GradientPenalty(coefficient=1.0, radius=1e-5, method=method)
        closure()
        found.append(flat([p.grad for p in model.parameters()]))
    torch.manual_seed(3)
    make(model, chunked(), vectorize=3)()
    penalty = found[1] - flat([p.grad for p in model.parameters()])
    assert penalty.norm() > 1e-3 * found[1].norm()
    assert (found[0] - found[1]).norm() < 0.01 * penalty.norm()


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.switch = nn.Linear(5, 3), nn.Linear(5, 3), False
        self.double()

    def forward(self, x):
        return self.first(x) + self.extra(x) if self.switch else self.first(x)


@pytest.mark.parametrize("count", [1, 3])
def test_parts_that_are_switched_on_and_off_between_calls(count):
    models = [Switched(), Switched()]
    closures = [
        make(models[0], chunked(), vectorize=count, compile=True),
        make(models[1], chunked()),
    ]
    for switch in (False, True, False, True):
        for model, closure in zip(models, closures, strict=True):
            model.switch = switch
            closure()
        assert (models[0].extra.weight.grad is not None) == switch
        require_close(*(flat([p.grad for p in model.parameters()]) for model in models))


def breaks(h):
    torch._dynamo.graph_break()
    return h


ACTS = {
    "a graph break": breaks,
    "a branch": lambda h: h if h.sum() > 0 else -h,
    "its own error": None,
}


class Act(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, h):
        if self.act is None:
            raise LookupError("mine")
        return self.act(h)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ACTS)
def test_what_cannot_be_compiled_is_refused(name, count):
    """In words that help; nothing is changed, and without compile=True it works."""
    model = mlp(Act(ACTS[name]))
    closure = make(model, chunked(), vectorize=count, compile=True)
    if name == "its own error":
        with pytest.raises(LookupError, match="mine"):
            closure()
        return
    chunks = "chunk 0" if count == 1 else "chunks 0 to 2"
    match = rf"{chunks} cannot be compiled in one graph.*test_vectorized_compiled.py:\d+.*"
    cure = "pass compile=False" if count == 1 else "pass compile=False, and vectorize=1 if"
    with pytest.raises(RuntimeError, match=f"(?s){match}{cure}"):
        closure()
    assert closure.step == 0 and all(p.grad is None for p in model.parameters())
    closure.compile, closure.vectorize = False, 1
    closure()


def test_guards_are_left_out_only_where_no_other_thread_could_run_compiled_code(monkeypatch):
    """It is a setting of the process, which two threads would even leave behind."""
    used, real = [], torch.compiler.set_stance
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda *a, **k: used.append(k) or real(*a, **k)
    )
    closure = make(mlp(), chunked(), method="forward", vectorize=3, compile=True)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        closure(), closure()
        assert used == []
    finally:
        stop.set()
        other.join()
    if threading.active_count() == 1:
        closure()
        assert used and torch._dynamo.eval_frame._stance.skip_guard_eval_unsafe is False


def test_parameters_from_outside_of_the_model_are_refused():
    """Also one by one: compiled passes get copies."""
    model = mlp()
    weight = model[0].weight

    def decayed(model, chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1]) + 1e-7 * weight.square().sum()

    closure = make(model, chunked(), evaluate=decayed, compile=True)
    with pytest.raises(RuntimeError, match=r"0\.weight in another way.*compile=False"):
        closure()
