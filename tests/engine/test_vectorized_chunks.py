"""vectorize=K over chunks of all kinds, with weights, losses and observers; parameters that some
chunks use, or none.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from at_once import METHODS, chunked, flat, make, mlp, outcome, require_close, require_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fbopt import FullBatchGD
from fbopt._engine.chunk_groups import grouped

pytestmark = pytest.mark.usefixtures("one_thread")


class Anew:
    """An object whose __iter__ starts anew."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        yield from ((x.clone(), y.clone()) for x, y in self.chunks)


def loader(size):
    x, y = (torch.cat(column) for column in zip(*chunked(26), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=size)


def changing_shapes():
    sizes = [4, 3, 4, 3, 3, 4, 4, 3, 2, 2, 4, 4]
    return [(x[:n], y[:n]) for (x, y), n in zip(chunked(48), sizes, strict=True)]


PAIRS = {
    "slices": chunked(26),
    "copies": [(x.clone(), y.clone()) for x, y in chunked(26)],
    "in another order": [chunked()[i] for i in (3, 0, 5, 1, 4, 2)],
    "lists": [[x, y] for x, y in chunked(26)],
    "a tuple": tuple(chunked(26)),
    "a DataLoader": loader(6),
    "an object": Anew(chunked(26)),
    "alternating shapes": changing_shapes(),
    "the same chunk again": [chunked()[0]] * 5,
    "the same input": [(chunked()[0][0], y) for _, y in chunked()],
    "some alike": [chunked()[i] for i in (0, 0, 1, 1, 1, 2)],
    "transposed": [(x.t().contiguous().t(), y) for x, y in chunked(26)],
    "overlapping": [
        (chunked(26, 26)[0][0][i : i + 4], chunked(26, 26)[0][1][i : i + 4]) for i in range(7)
    ],
    "leaves": [(x.clone().requires_grad_(), y) for x, y in chunked(26)],
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    for method in (None, "central"):
        found = require_same(mlp(nn.BatchNorm1d(6)), PAIRS[name], 4, method=method, observed=True)
    lengths = [len(y) for _, y in PAIRS[name]]
    assert [len(target) for _, target in found.shown] == lengths


def count_by(n):
    return lambda chunk: n


def by_name(model, chunk):
    inputs = chunk["x"] * (2 if chunk["twice"] is True else 1 if chunk["twice"] == 1 else 3)
    return F.cross_entropy(model(inputs), chunk["y"]), {"none": None, "y": [chunk["y"]]}


ADJACENCY = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
EVALUATED = {
    "dicts of numbers and text": (
        [
            {"x": x, "y": y, "twice": twice, "text": "a", "none": None}
            for (x, y), twice in zip(chunked(32), [1, 1, True, True, 1.0, 1.0, 1, 1], strict=True)
        ],
        by_name,
    ),
    "numbers that differ": (
        [(x, y, 0.1 * i) for i, (x, y) in enumerate(chunked())],
        lambda model, chunk: F.cross_entropy(model(chunk[0]), chunk[1]) + chunk[2],
    ),
    "tensors": (
        [x for x, _ in chunked(26)],
        lambda model, chunk: model(chunk).square().mean(),
    ),
    "a tensor that all share": (
        [(x, ADJACENCY, y) for x, y in chunked()],
        lambda model, chunk: F.cross_entropy(model(chunk[1] @ chunk[0]), chunk[2]),
    ),
    "tensors without dimensions": (
        [(x, torch.tensor(0.5 + i).double(), y) for i, (x, y) in enumerate(chunked())],
        lambda model, chunk: chunk[1] * F.cross_entropy(model(chunk[0]), chunk[2]),
    ),
    "indices": (
        list(range(6)),
        lambda model, i: F.cross_entropy(model(chunked()[i][0]), chunked()[i][1]),
    ),
    "nothing at all": (
        [None, (), None],
        lambda model, chunk: F.cross_entropy(model(chunked()[0][0]), chunked()[0][1]),
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluated_chunks(name):
    chunks, evaluate = EVALUATED[name]
    given = {"evaluate": evaluate, "weight": count_by(4)}
    if name == "tensors":
        given = {"evaluate": evaluate}
    for count, method in ((2, None), (3, "forward"), (8, "exact")):
        observed = name.startswith("dicts")
        require_same(mlp(), chunks, count, method=method, observed=observed, **given)


def test_complex_chunks_whose_values_are_others_than_those_in_memory():
    z = torch.view_as_complex(torch.randn(24, 3, 2, dtype=torch.float64))
    parts = [part.conj() if i % 2 else part for i, part in enumerate(z.split(4))]
    model = nn.Linear(3, 3).double()
    given = {"evaluate": lambda model, z: model((z * (1 + 2j)).real).square().mean()}
    require_same(model, parts, **given)
    imaginary = [part.imag for part in parts]
    require_same(model, imaginary, evaluate=lambda model, x: model(x).square().mean())


LOSSES = {
    "ignored targets": F.cross_entropy,
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double()),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "squares": nn.MSELoss(),
    "of its own": lambda output, target: (output.logsumexp(1) - output[:, 0]).mean(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, method):
    chunks = chunked(26)
    if name == "ignored targets":
        masks = [torch.arange(len(y)) < i % 3 for i, (_, y) in enumerate(chunks)]
        chunks = [(x, y.where(~m, -100)) for (x, y), m in zip(chunks, masks, strict=True)]
    if name == "squares":
        chunks = [(x, x[:, :3].sin()) for x, _ in chunks]
    require_same(mlp(), chunks, loss_fn=LOSSES[name], method=method)


@pytest.mark.parametrize("count", [2, 3, 100])
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_weights_and_chunks_that_are_left_out(count, accumulation):
    def weight(chunk):
        return 0 if chunk[1][0] == 2 else torch.tensor(len(chunk[1]) - 0.5)

    assert 0 < sum(weight(chunk) == 0 for chunk in chunked(26)) < 5
    given = {"weight": weight, "accumulation": accumulation, "observed": True}
    require_same(mlp(nn.BatchNorm1d(6)), chunked(26), count, method="forward", **given)


def test_a_chunk_that_is_left_out_may_be_anything():
    chunks = chunked()
    chunks[1] = (torch.full((4, 5), float("nan")).double(), chunks[1][1])
    given = {"weight": lambda chunk: float(chunk[0].isfinite().all()) * 4}
    found = require_same(mlp(), chunks, **given)
    assert found.scalars.isfinite().all()


def test_consecutive_slices_are_not_copied():
    x, y = (torch.cat(column) for column in zip(*chunked(32), strict=True))
    chunks = list(zip(x.split(4), y.split(4), strict=True))
    weighed = ((i, chunk, 4.0) for i, chunk in enumerate(chunks))
    for k, group in enumerate(grouped(weighed, 3)):
        stack = group.stack()
        for whole, stacked in zip((x, y), stack.tensors, strict=True):
            assert stacked.data_ptr() == whole[12 * k].data_ptr()
        if len(group) > 1:
            assert stack.dims == (0, 0) and stack.tensors[0].shape == (len(group), 4, 5)


def test_observers_see_all_chunks_in_their_order():
    """Also where a group holds every other chunk, and none is seen twice in a second visit."""
    for accumulation in ("float32", "exact"):
        seen = {}
        for count in (1, 2, 4, 100):
            found = seen[count] = []
            closure = make(
                mlp(),
                changing_shapes(),
                lambda o, t: 2.0**90 * F.cross_entropy(o, t),  # whose units do not fit at first
                accumulation=accumulation,
                vectorize=count,
                observe=lambda output, target, found=found: found.append((output, target)),
            )
            closure()
            torch.testing.assert_close(found, seen[1], rtol=1e-12, atol=1e-13)


class Routed(nn.Module):
    """Tied, frozen, unused and empty parameters; some that chunks of one size alone use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.unused, self.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(0, 3))
        self.four, self.others = nn.Linear(5, 3), nn.Linear(5, 3)
        self.extra, self.switch = nn.Linear(5, 3), False
        self.double()

    def forward(self, x):
        h = self.scale * self.last(torch.tanh(self.first(x)) * self.frozen)
        out = self.four(h) if len(x) == 4 else self.others(h)
        return out + self.extra(h) if self.switch else out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_tied_frozen_and_unused_parameters(method, accumulation):
    given = {"method": method, "accumulation": accumulation}
    for chunks in (chunked(), chunked(26), changing_shapes()):
        found = require_same(Routed(), chunks, **given)
    names = [name for name, _ in Routed().named_parameters()]
    missing = {name for name, g in zip(names, found.grads, strict=True) if g is None}
    assert missing == {"frozen", "unused", "empty", "extra.weight", "extra.bias"}


def test_weight_decay_does_not_touch_what_no_chunk_uses():
    model = Routed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    closure = make(model, chunked(), method="forward", vectorize=3)
    optimizer = FullBatchGD(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.step(closure)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    moved = ("first.", "last.", "scale", "four.")
    assert changed == {name for name in before if name.startswith(moved)}


@pytest.mark.parametrize("method", [None, "forward"])
def test_parts_that_are_switched_on_and_off_between_calls(method):
    """By a flag that no kind of chunk knows of: their gradients come and go."""
    models = [Routed(), Routed()]
    closures = [
        make(model, chunked(), method=method, vectorize=count)
        for model, count in zip(models, (1, 3), strict=True)
    ]
    for switch in (False, True, False, True):
        for model, closure in zip(models, closures, strict=True):
            model.switch = switch
            closure()
        grads = [[p.grad for p in model.parameters()] for model in models]
        assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
        assert (models[1].extra.weight.grad is not None) == switch
        require_close(flat(grads[1]), flat(grads[0]))


def test_freezing_is_followed():
    model = Routed()
    closure = make(model, chunked(), method="forward", vectorize=3)
    closure()
    for frozen in (True, False):
        model.first.requires_grad_(not frozen)
        closure()
        found = [p.grad for p in model.parameters()]
        assert (model.first.weight.grad is None) == frozen
        require_close(flat(found), flat(outcome(model, chunked(), method="forward").grads))


@pytest.mark.parametrize("method", METHODS)
def test_a_subset_of_the_parameters(method):
    results = []
    for count in (1, 3):
        model = mlp()
        params = list(model[2].parameters())
        make(model, chunked(), method=method, params=params, vectorize=count)()
        assert model[0].weight.grad is None
        results.append(flat([p.grad for p in params]))
    require_close(*results[::-1])
