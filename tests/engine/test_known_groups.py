"""Groups that are kept from call to call: used while they are right, else found anew."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbopt import FullBatchClosure
from fbopt._engine import full_pass


@pytest.fixture
def found(monkeypatch):
    """How many groups have been found anew."""
    counts, real = [], full_pass.grouped

    def grouped(*args):
        for group in real(*args):
            counts.append(len(group))
            yield group

    monkeypatch.setattr(full_pass, "grouped", grouped)
    return counts


def task():
    torch.manual_seed(0)
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randint(3, (24,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, x, y, list(zip(x.split(4), y.split(4), strict=True))


def check(closure, model, chunks, **options):
    """The closure's next call gives what a fresh one gives one by one."""
    loss, grads = closure(), [p.grad.clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    expected = FullBatchClosure(twin, F.cross_entropy, chunks, **options)()
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0)
    for g, p in zip(grads, twin.parameters(), strict=True):
        assert torch.allclose(g, p.grad, rtol=1e-11, atol=1e-15)


def test_kept_groups_are_used_and_see_new_values(found):
    model, x, _, chunks = task()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=4)
    closure()
    assert found == [4, 2]
    x.numpy()[:] += 1  # which no version counts
    check(closure, model, chunks)
    assert found == [4, 2]


def ignore_one(x, y, chunks):
    y[5] = -100


def ignore_a_chunk(x, y, chunks):
    y[4:8] = -100


def replace_a_chunk(x, y, chunks):
    chunks[2] = (torch.ones(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))


def move_a_tensor(x, y, chunks):
    chunks[1][0].data = torch.ones(4, 5, dtype=torch.float64)


def remove_a_chunk(x, y, chunks):
    chunks.pop()


def another_shape(x, y, chunks):
    chunks[0] = (chunks[0][0][:2], chunks[0][1][:2])


CHANGES = (
    *(ignore_one, ignore_a_chunk, replace_a_chunk, move_a_tensor, remove_a_chunk, another_shape),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    model, x, y, chunks = task()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=4)
    for _ in range(2):
        closure()
    change(x, y, chunks)
    check(closure, model, chunks)
    check(closure, model, chunks)


def test_a_chunk_that_was_left_out_comes_back():
    model, _, y, chunks = task()
    labels = y[4:8].clone()
    y[4:8] = -100
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=4)
    closure()
    y[4:8] = labels
    check(closure, model, chunks)


def test_copied_chunks_are_not_kept(found):
    model, _, _, chunks = task()
    apart = [(x.clone(), y.clone()) for x, y in chunks]
    closure = FullBatchClosure(model, F.cross_entropy, apart, vectorize=4)
    closure()
    apart[0][0].add_(1)
    check(closure, model, apart)
    assert found == [4, 2] * 2


def test_other_settings_find_groups_anew(found):
    model, _, _, chunks = task()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=4)
    closure()
    closure.vectorize = 3
    check(closure, model, chunks)
    assert found == [4, 2, 3, 3]
    closure.weight = lambda chunk: 1 + float(chunk[0][0, 0] > 0)
    check(closure, model, chunks, weight=closure.weight)
    closure.weight = None
    closure.loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    closure()
    assert closure.accumulator.total_weight == sum(
        closure.loss_fn.weight[y].sum() for _, y in chunks
    )


def test_every_pass_starts_where_it_is_said(found):
    model, _, _, chunks = task()
    starts = []
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks, vectorize=4, on_pass_start=lambda: starts.append(0)
    )
    for _ in range(3):
        closure()
    assert len(starts) == 3
    assert found == [4, 2]


def test_a_copy_finds_its_own():
    model, _, _, chunks = task()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=4)
    closure()
    for twin in (copy.deepcopy(closure), pickle.loads(pickle.dumps(closure))):
        twin.chunks[0][0].zero_()
        check(twin, twin.model, twin.chunks)


def test_what_starts_a_pass_may_change_the_chunks(found):
    """It is called before groups are looked for: also its targets that are ignored count."""
    for change in ("values", "targets"):
        losses = []
        for count in (1, 2):
            model, _, y, chunks = task()
            calls = [0]

            def start(calls=calls, chunks=chunks, y=y):
                calls[0] += 1
                if calls[0] == 3 and change == "values":  # noqa: B023
                    chunks[:] = [(3 * a, b) for a, b in chunks]
                elif calls[0] == 3:
                    y[1:4] = -100

            closure = FullBatchClosure(
                model, F.cross_entropy, chunks, vectorize=count, on_pass_start=start
            )
            losses.append(torch.stack([closure() for _ in range(4)]))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["loader", "weight"])
def test_chunks_that_are_no_longer_used_are_freed(how):
    model, x, _, chunks = task()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, vectorize=2)
    closure()
    kept = weakref.ref(x.untyped_storage())
    chunks = [(a.clone(), b.clone()) for a, b in chunks]
    if how == "weight":
        closure.weight = lambda chunk: 4
    closure.chunks = iter_anew(chunks) if how == "loader" else chunks
    del x
    closure()
    gc.collect()
    assert kept() is None


class iter_anew:
    """Chunks that are no list."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        return iter(self.chunks)
