"""Pickled and deep-copied objects go on bit for bit like their originals."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    # Tensors get their values after all objects have been made.
    "torch.save, old format": lambda thing: saved(thing, _use_new_zipfile_serialization=False),
}
PENALTIES = {m: GradientPenalty(coefficient=0.1, method=m) for m in ("forward", "central", "exact")}


def model(depth: int) -> nn.Module:
    """With a depth of 10 its parameters are small and many: the kernels see one packed tensor."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2)]
    layers += [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(5, 2))


def training(depth: int, **options):
    net = model(depth)
    x, y = torch.randn(20, 6), torch.randn(20, 2)
    chunks = list(zip(x.split(8), y.split(8), strict=True))
    optimizer = FullBatchGD(net.parameters(), lr=0.1, momentum=0.9, max_norm=0.5)
    options = {"optimizer": optimizer, "penalty": PENALTIES["forward"]} | options
    return net, optimizer, FullBatchClosure(net, nn.functional.mse_loss, chunks, **options)


def steps(net, optimizer, closure, count=2):
    for step in range(count):
        torch.manual_seed(step)
        optimizer.step(closure)
    grads = [p.grad for p in net.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"] for p in net.parameters() if count]
    return bits(net, momenta, grads, closure.step, closure.state_dict())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("depth", [1, 10])
@pytest.mark.parametrize("before", [0, 2])
def test_training_goes_on(way, accumulation, depth, before):
    """Model, optimizer and closure in one pickle still belong together."""
    original = training(depth, accumulation=accumulation, chunk_max_norm=0.4)
    steps(*original, before)
    copied = way(original)
    net, optimizer, closure = copied
    assert closure.model is net and closure.optimizer is optimizer
    assert closure.accumulator.params[0] is net[0].weight
    assert closure.accumulator.params[0] is optimizer.param_groups[0]["params"][0]
    expected = steps(*original)
    assert steps(*copied) == expected
    assert bits(net[1].running_mean) == bits(original[0][1].running_mean)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_every_penalty(penalty):
    original = training(1, penalty=penalty)
    steps(*original)
    copied = pickle.loads(pickle.dumps(original))
    assert steps(*copied) == steps(*original)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_a_gradient_that_is_not_assigned_yet(way, accumulation):
    """After accumulate() the sums are all there is of a gradient; rollback() needs the buffers."""
    net, _, closure = original = training(10, accumulation=accumulation)
    buffers = bits(list(net.buffers()))
    closure.accumulate()
    copied = way(original)
    for one in (original, copied):
        one[2].assign()
        one[2].rollback()
    assert bits([p.grad for p in copied[0].parameters()]) == bits(
        [p.grad for p in net.parameters()]
    )
    assert bits(list(copied[0].buffers())) == buffers and copied[2].step == 0


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("depth", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_partial_sums_survive(way, accumulation, depth, dtype):
    def add(accumulator, k):
        torch.manual_seed(k)
        accumulator.add([torch.randn_like(p) for p in accumulator.params], weight=3 + k)

    params = list(model(depth).to(dtype).parameters())
    accumulator = GradientAccumulator(params, accumulation)
    for _ in accumulator.passes():  # settles the units
        for k in range(3):
            add(accumulator, k)
    accumulator.mean()
    copied = way(accumulator)
    assert bits(copied.mean()) == bits(accumulator.mean())
    add(accumulator, 0)
    add(accumulator, 1)
    copied = way(accumulator)
    for one in (accumulator, copied):
        add(one, 2)
    assert copied.total_weight == 12 and bits(copied.mean()) == bits(accumulator.mean())


def test_a_pickle_holds_each_number_once():
    """Parameters and their sums, whatever was allocated for the passes."""
    net = nn.Linear(100, 100)
    closure = FullBatchClosure(
        net,
        nn.functional.mse_loss,
        [(torch.ones(1, 100), torch.ones(1, 100))],
        penalty=PENALTIES["central"],
        chunk_max_norm=1.0,
    )
    closure()
    assert len(pickle.dumps(closure)) < 2.2 * 4 * 10_100


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("depth", [1, 10])
def test_sums_survive_where_parameters_have_got_other_memory(way, accumulation, depth):
    """Other strides, and with them another layout of the flat buffers."""
    params = list(model(depth).parameters())
    accumulator = GradientAccumulator(params, accumulation)
    for _ in accumulator.passes():
        torch.manual_seed(0)
        accumulator.add([torch.randn_like(p) for p in params])
    if accumulation == "exact":
        accumulator.mean()
    for p in params:
        p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data.clone()
    copied = way(accumulator)
    for one, other in zip(copied.mean(), accumulator.mean(), strict=True):
        assert one.tolist() == other.tolist()


def test_sums_that_cannot_move_with_their_parameters_are_not_copied():
    p = nn.Parameter(torch.ones(2, 3))
    for accumulation, new in (("exact", torch.ones(3, 2).t()), ("float32", torch.ones(6))):
        accumulator = GradientAccumulator([p], accumulation)
        accumulator.add([torch.ones_like(p)])
        p.data = new
        with pytest.raises(RuntimeError, match=r"got other memory.*mean"):
            copy.deepcopy(accumulator)
        accumulator.reset()
        assert copy.deepcopy(accumulator).total_weight == 0
