"""Searches on several processes: with exact sums the bits of one, and all ranks do the same."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from at_once import chunked, mlp
from conftest import bits
from ranks import caught, mesh, run_all
from torch import nn

from fbopt import LBFGS, FullBatchClosure, FullBatchGD, GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")
PENALTY = {"penalty": GradientPenalty(coefficient=0.1), "returns": "objective"}
KINDS = {
    "strong_wolfe": (LBFGS, {}, {}),
    "penalty": (LBFGS, {"damping": True}, PENALTY),
    "nonmonotone": (LBFGS, {"line_search": "nonmonotone", "history_size": 2}, {}),
    "no search": (LBFGS, {"line_search": None, "lr": 0.3, "max_iter": 2}, {}),
    "gradient descent": (FullBatchGD, {"lr": 20.0, "momentum": 0.9, "line_search": "armijo"}, {}),
}


def trained(kind, rank, world, accumulation):
    maker, options, given = KINDS[kind]
    net, chunks = mlp(), chunked(26)
    closure = FullBatchClosure(
        net,
        F.cross_entropy,
        chunks[rank::world],
        accumulation=accumulation,
        process_group=dist.group.WORLD,
        **given,
    )
    optimizer = maker(net.parameters(), **options)
    losses = [float(optimizer.step(closure)) for _ in range(3)]
    counts = optimizer.last_evaluations, getattr(optimizer, "stopped", None), closure.step
    return losses, bits(net, optimizer), counts


def work(rank, world, folder):
    found = {
        (kind, accumulation): trained(kind, rank, world, accumulation)
        for kind in KINDS
        for accumulation in ("exact", "float32")
    }
    return found, hopeless(rank, world), (*refused(rank, world), *beside_replicas())


def hopeless(rank, world):
    """A search that fails on all ranks, in the same place."""
    net = mlp()
    kept = bits(list(net.parameters()))
    calls = [0]

    def rising(output, target):
        calls[0] += 1
        return F.cross_entropy(output, target) + calls[0]

    closure = FullBatchClosure(
        net, rising, chunked(26)[rank::world], process_group=dist.group.WORLD
    )
    optimizer = LBFGS(net.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step(closure)
    return bits(list(net.parameters())) == kept, len(said), optimizer.stopped, closure.step


def refused(rank, world):
    """What each says of parameters of which a process holds a part."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh(world), [Shard(0)]))
    whole = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    descent = FullBatchGD([p], line_search="armijo")
    zero = [(LBFGS, {}), (FullBatchGD, {"line_search": "armijo"})]
    zero = [partial(ZeroRedundancyOptimizer, whole, kind, **given) for kind, given in zero]
    return [
        caught(lambda: LBFGS([p])),
        caught(lambda: descent.step(lambda: p.sum())),
        caught(zero[0]),
        caught(lambda: zero[1]().step(lambda: 0.0)),
    ]


def beside_replicas():
    """What is said of plain closures over a DistributedDataParallel."""
    net = mlp()
    replica = nn.parallel.DistributedDataParallel(net)
    x, y = chunked(26)[0]

    def closure():
        net.zero_grad()
        loss = F.cross_entropy(replica(x), y)
        loss.backward()
        return loss.detach()

    before = bits(net)
    makers = [partial(LBFGS, line_search=kind) for kind in ("armijo", None)]
    makers.append(partial(FullBatchGD, line_search="armijo"))
    found = [caught(partial(make(net.parameters()).step, closure)) for make in makers]
    unchanged = bits(net) == before
    FullBatchGD(net.parameters()).step(closure)  # without a search nothing is compared
    return found, unchanged


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return run_all(work, (1, 2), tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_bit_for_bit(kind, jobs):
    ((alone, *_),) = jobs[1]
    for found, *_ in jobs[2]:
        assert found[kind, "exact"] == alone[kind, "exact"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_do_the_same_with_sums_in_float32(kind, jobs):
    (first, *_), (second, *_) = jobs[2]
    assert first[kind, "float32"] == second[kind, "float32"]
    losses, _, (_, _, calls) = first[kind, "float32"]
    assert losses[-1] < losses[0] and calls >= 3


def test_a_search_that_fails_does_so_everywhere(jobs):
    for _, (kept, said, stopped, calls), _ in (*jobs[1], *jobs[2]):
        assert kept and said == 1 and "no lower value" in stopped and calls > 2
    assert jobs[2][0][1] == jobs[2][1][1]


def test_parameters_in_parts_are_refused(jobs):
    for _, _, (sharded, searched, zero, zero_searched, *_) in jobs[2]:
        assert sharded[0] == "ValueError" and "over which LBFGS has no inner products" in sharded[1]
        assert searched[0] == "ValueError" and "pass line_search=None" in searched[1]
        assert zero[0] == "ValueError" and "make LBFGS itself" in zero[1]
        assert zero_searched[0] == "ValueError" and "holds a part" in zero_searched[1]


def test_plain_closures_beside_replicas_are_refused(jobs):
    """Where there are several processes, before anything is evaluated."""
    for _, _, (*_, found, unchanged) in jobs[2]:
        assert unchanged
        for kind, message in found:
            assert kind == "ValueError" and "those of a DistributedDataParallel" in message
    ((_, _, (*_, alone, _)),) = jobs[1]
    assert {kind for kind, _ in alone} == {"none"}
