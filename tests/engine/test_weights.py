"""Chunks count by what their mean loss divides by: known, asked for, or refused."""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fbopt import FullBatchClosure, GradientPenalty
from fbopt._engine import weights
from fbopt.analysis import Objective

pytestmark = pytest.mark.usefixtures("one_thread")
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def data(*shape: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes; a third of these is ignored, in the first 8 samples all."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, *shape, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20, *shape), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = -100
    y[:8] = -100
    return x, y


def chunked(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(8), y.split(8), strict=True))


def assert_equals_one_batch(net, closure, loss_fn, x, y):
    wanted = loss_fn(net(x), y)
    grads = torch.autograd.grad(wanted, list(net.parameters()))
    for _ in range(2):
        torch.testing.assert_close(closure(), wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close([p.grad for p in net.parameters()], list(grads))


KNOWN = {
    "ignored": nn.CrossEntropyLoss(),
    "another ignored": nn.CrossEntropyLoss(ignore_index=2),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "smoothed": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1),
    "function": F.cross_entropy,
    "partial": functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=2),
}


@pytest.mark.parametrize("loss_fn", KNOWN.values(), ids=KNOWN)
def test_cross_entropy_counts_targets_and_class_weights(loss_fn):
    x, y = data()
    if "another" in repr(loss_fn) or getattr(loss_fn, "ignore_index", 0) == 2:
        y = y.clamp(min=0)
    if isinstance(loss_fn, functools.partial):
        y = y.clamp(min=0)
    net = model()
    closure = FullBatchClosure(net, loss_fn, chunked(x, y))
    assert_equals_one_batch(net, closure, loss_fn, x, y)
    closure = pickle.loads(pickle.dumps(closure))
    assert_equals_one_batch(closure.model, closure, loss_fn, x, y)
    objective = Objective(net, loss_fn, chunked(x, y))
    assert objective.loss() == pytest.approx(loss_fn(net(x), y).item(), rel=1e-12)


class ClassesFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


def test_tokens_count_not_rows():
    """Ragged chunks: texts of another length in each."""
    torch.manual_seed(0)
    net = ClassesFirst(4, 3).double()
    x, y = data(6)
    chunks = [(x[:9, :3], y[:9, :3]), (x[9:], y[9:])]
    losses = [F.cross_entropy(net(a), b, reduction="sum") for a, b in chunks]
    wanted = sum(losses) / sum(int((b != -100).sum()) for _, b in chunks)
    torch.testing.assert_close(
        FullBatchClosure(net, nn.CrossEntropyLoss(), chunks)(), wanted.detach(), rtol=1e-12, atol=0
    )


def test_class_probabilities_count_rows():
    net, x = model(), data()[0]
    y = torch.rand(20, 3, dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    assert_equals_one_batch(net, FullBatchClosure(net, loss_fn, chunked(x, y)), loss_fn, x, y)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.HuberLoss(), F.l1_loss])
def test_means_over_elements_count_elements(loss_fn):
    class Rows(nn.Linear):
        def forward(self, x):
            return super().forward(x).flatten(1)

    torch.manual_seed(0)
    net = Rows(4, 3).double()
    x = data(6)[0]
    chunks = [(x[:9, :3], torch.zeros(9, 9).double()), (x[9:], torch.ones(11, 18).double())]
    parts = [loss_fn(net(a), b) * b.numel() for a, b in chunks]
    wanted = sum(parts) / sum(b.numel() for _, b in chunks)
    torch.testing.assert_close(
        FullBatchClosure(net, loss_fn, chunks)(), wanted.detach(), rtol=1e-12, atol=0
    )


def test_targets_are_counted_as_they_are_now():
    x, y = data()
    chunks, loss_fn = chunked(x, y), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone())
    net = model()
    closure = FullBatchClosure(net, loss_fn, chunks)
    closure()
    y[9] = 2 - y[9].clamp(min=0)  # in place: the chunks are views
    assert_equals_one_batch(net, closure, loss_fn, x, y)
    y.numpy()[12] = -100  # of which torch counts no versions
    loss_fn.weight.data[1] = 7
    assert_equals_one_batch(net, closure, loss_fn, x, y)


class Elsewhere(Tensor):
    """A tensor that says to be on another device."""

    device = property(lambda self: torch.device("cuda"))
    is_cpu = property(lambda self: False)


@pytest.mark.parametrize("case", ["whole", "ignored", "class weights"])
def test_a_device_is_read_once_for_each_place(case):
    """And again only where targets may count differently: new tensors, or written ones."""
    mean = weights.mean_of(nn.CrossEntropyLoss(CLASS_WEIGHTS if case == "class weights" else None))
    counts, y = weights.TargetCounts(), torch.tensor([0, 1, -100 if case == "ignored" else 2])
    wanted = {"whole": 3, "ignored": 2, "class weights": 8}[case]
    with mock.patch.object(weights, "_count", wraps=weights._count) as count:
        first = y.as_subclass(Elsewhere)
        assert [counts(0, first, mean) for _ in range(3)] == [wanted] * 3
        assert count.call_count == 1
        assert counts(0, y.clone().as_subclass(Elsewhere), mean) == wanted
        assert count.call_count == (1 if case == "whole" else 2)
        assert counts(1, first, mean) == wanted
        assert (
            counts(0, y[:2].as_subclass(Elsewhere), mean)
            == wanted - ({"whole": 1, "ignored": 0, "class weights": 5}[case])
        )


def test_a_device_is_read_again_once_a_chunk_has_ignored_targets():
    """Or when the chunks are another object: shuffled or replaced ones may ignore elsewhere."""
    mean, counts = weights.mean_of(nn.CrossEntropyLoss()), weights.TargetCounts()
    whole, ignoring = torch.tensor([0, 1, 2]), torch.tensor([0, -100, 2])
    first, second = [whole, whole, ignoring], [ignoring, whole, whole]
    for chunks, wanted in ((first, [3, 3, 2]), (second, [2, 3, 3])):
        found = [counts(i, y.clone().as_subclass(Elsewhere), mean) for i, y in enumerate(chunks)]
        assert found == wanted
    counts.follow(first)
    assert counts(0, whole.clone().as_subclass(Elsewhere), mean) == 3
    replaced = ignoring.clone().as_subclass(Elsewhere)
    assert counts(0, replaced, mean) == 2  # in the same list
    counts.follow(second)
    assert counts(0, ignoring.clone().as_subclass(Elsewhere), mean) == 2


def weighted(model, chunk):
    return F.cross_entropy(model(chunk[0]), chunk[1].clamp(min=0), weight=CLASS_WEIGHTS)


def ignoring(model, chunk):
    return F.cross_entropy(model(chunk[0]), chunk[1])


def ragged(model, chunk):
    return ignoring(model, (chunk[0], chunk[1].clamp(min=0)))


UNKNOWN = {
    "class weights": (weighted, None, r"chunk 1 .*class weights.*weight=lambda chunk: weights"),
    "ignored": (ignoring, slice(8, 20), r"ignored targets \(-100\).*\(chunk\[1\] != -100\)\.sum"),
}


@pytest.mark.parametrize("evaluate, part, match", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("penalty", [None, GradientPenalty(coefficient=0.1)], ids=["plain", "pen"])
def test_a_cross_entropy_inside_evaluate_is_refused_where_it_is_another_mean(
    evaluate, part, match, penalty
):
    x, y = data()
    x, y = x[part or slice(None)], y[part or slice(None)]
    net = model()
    chunks = [
        (a, b.clamp(min=0)) if i < 1 and part else (a, b) for i, (a, b) in enumerate(chunked(x, y))
    ]
    closure = FullBatchClosure(net, evaluate=evaluate, chunks=chunks, penalty=penalty)
    before = bits(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            closure()
        assert bits(net) == before
    closure.weight = lambda chunk: (chunk[1] != -100).sum()
    closure()


def test_targets_that_are_ignored_alike_in_all_chunks_are_right():
    """As by the causal models of transformers, which ignore the last token of every row."""
    x, y = data(6)
    y = y.clamp(min=0)
    y[:, -1] = -100
    torch.manual_seed(0)
    net = ClassesFirst(4, 3).double()
    closure = FullBatchClosure(net, evaluate=ignoring, chunks=chunked(x, y))
    assert_equals_one_batch(net, closure, F.cross_entropy, x, y)


def flattened(model, chunk):
    return F.cross_entropy(model(chunk[0]).movedim(1, -1).flatten(0, 1), chunk[1].flatten())


def outer(model, chunk):
    return F.mse_loss(model(chunk[0])[:, 0], chunk[1].double())


@pytest.mark.parametrize("evaluate", [flattened, outer])
def test_a_mean_over_tokens_of_ragged_chunks_is_refused(evaluate):
    torch.manual_seed(0)
    net = ClassesFirst(4, 3).double()
    x, y = data(6)
    y = y.clamp(min=0)
    chunks = [(x[:9, :2], y[:9, :2]), (x[9:], y[9:])]
    closure = FullBatchClosure(net, evaluate=evaluate, chunks=chunks)
    with pytest.raises(ValueError, match=r"chunk 1 .*66 values for 11 samples.*18 for 9.*numel"):
        closure()
    closure.weight = lambda chunk: chunk[1].numel()
    closure()
    closure.weight, closure.chunks = None, chunked(x, y)
    closure()


def summed(model, chunk):
    return F.cross_entropy(model(chunk[0]), chunk[1], reduction="sum")


def test_sums_are_refused():
    x, y = data()
    for loss_fn in (nn.MSELoss(reduction="sum"), functools.partial(F.mse_loss, reduction="sum")):
        with pytest.raises(ValueError, match=r"reduction='sum': .*reduction='mean'"):
            FullBatchClosure(model(), loss_fn, chunked(x, x))
    with pytest.raises(ValueError, match=r"chunk 0 is a sum .*reduction='mean'"):
        FullBatchClosure(model(), evaluate=summed, chunks=chunked(x, y))()


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_kullback_leibler_divergence(reduction):
    net, x, loss_fn = model(), data()[0], nn.KLDivLoss(reduction=reduction)
    y = torch.rand(20, 3, dtype=torch.float64)
    assert_equals_one_batch(net, FullBatchClosure(net, loss_fn, chunked(x, y)), loss_fn, x, y)


@pytest.mark.parametrize("lengths, named", [((3, 16, 16), "3, 16, 16"), ((16, 4, 16), "16, 4, 16")])
def test_tensors_of_several_lengths_do_not_say_how_many_samples_there_are(lengths, named):
    net = model()
    chunks = [tuple(torch.ones(n, 4, dtype=torch.float64) for n in lengths)]
    options = {"evaluate": lambda m, c: m(c[2]).square().mean(), "chunks": chunks}
    with pytest.raises(ValueError, match=rf"lengths {named}.*weight=lambda"):
        FullBatchClosure(net, **options)()
    FullBatchClosure(net, weight=lambda c: len(c[2]), **options)()


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("penalty", [None, GradientPenalty(coefficient=0.1)], ids=["plain", "pen"])
def test_a_chunk_of_weight_zero_is_not_run(accumulation, penalty):
    """Its loss would be NaN, and BatchNorm would count it."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))

    x, y = data()
    chunks = chunked(x.float(), y)
    options = {"accumulation": accumulation, "penalty": penalty}
    found = []
    for kept, weight in (
        (chunks[1:], None),
        (chunks, lambda chunk: (chunk[1] != -100).sum()),
        (chunks, lambda chunk: (chunk[1] != -100).sum().reshape(1, 1)),
        (chunks, None),
    ):
        net = make()
        torch.manual_seed(5)
        loss = FullBatchClosure(net, nn.CrossEntropyLoss(), kept, weight=weight, **options)()
        found.append(bits(loss, net, [p.grad for p in net.parameters()], torch.get_rng_state()))
        assert loss.isfinite()
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize(
    "weight, match",
    [
        (lambda chunk: 0, "every chunk has weight 0"),
        (lambda chunk: -1.0, r"weight\(chunk\) of chunk 0 must be at least 0"),
        (lambda chunk: torch.tensor(math.nan), r"chunk 0 must be finite"),
    ],
)
def test_weights_that_cannot_be(weight, match):
    net = model()
    closure = FullBatchClosure(net, F.cross_entropy, chunked(*data()), weight=weight)
    with pytest.raises(ValueError, match=match):
        closure()
    assert closure.step == 0


def test_shuffled_chunks_are_refused_where_their_composition_matters():
    x, y = data()
    dataset, net = TensorDataset(x, y), model()
    matters = [
        {"penalty": GradientPenalty(coefficient=0.1)},
        {"chunk_max_norm": 1.0},
        {"accumulation": "exact"},
    ]
    shuffled = DataLoader(dataset, batch_size=8, shuffle=True)
    for options in matters:
        with pytest.raises(ValueError, match=r"other chunks in every call.*shuffle=False"):
            FullBatchClosure(net, F.cross_entropy, shuffled, **options)
    FullBatchClosure(net, F.cross_entropy, shuffled)()
    for loader in (
        DataLoader(dataset, batch_size=8),
        DataLoader(dataset, batch_size=20, shuffle=True),
        DataLoader(chunked(x, y), batch_size=None, shuffle=True),  # in another order only
        list(shuffled),
    ):
        FullBatchClosure(net, F.cross_entropy, loader, **matters[0])()


def test_other_samples_in_every_call_are_refused():
    dataset, net = TensorDataset(*data()), model()
    for loader, named in (
        (DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True), "drop_last"),
        (DataLoader(dataset, sampler=RandomSampler(dataset, num_samples=9)), "9 of 20"),
        (DataLoader(dataset, sampler=WeightedRandomSampler([1.0] * 20, 20)), "with replacement"),
    ):
        with pytest.raises(
            ValueError, match=rf"other samples in every call \({named}.*all samples"
        ):
            FullBatchClosure(net, F.cross_entropy, loader)
    FullBatchClosure(net, F.cross_entropy, DataLoader(dataset, batch_size=8, drop_last=True))
    batches = BatchSampler(RandomSampler(dataset), 8, drop_last=False)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)
    with pytest.raises(ValueError, match="other chunks in every call"):
        FullBatchClosure(net, F.cross_entropy, loader, accumulation="exact")


def test_a_sampler_that_repeats_samples_is_refused():
    dataset, net = TensorDataset(*data()), model()
    for world, expected in (
        (3, pytest.raises(ValueError, match=r"repeats some of 20 samples.*Subset")),
        (4, contextlib.nullcontext()),
    ):
        sampler = DistributedSampler(dataset, world, rank=0, shuffle=False)
        with expected:
            FullBatchClosure(net, F.cross_entropy, DataLoader(dataset, sampler=sampler))
