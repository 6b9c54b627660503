"""vectorize=K on several processes: whole groups are dealt out, and with exact sums neither their
number nor their order changes a bit.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist
from at_once import chunked, flat, make, mlp, outcome, require_close
from conftest import bits
from ranks import caught, run_all
from torch import nn

from fbopt import FullBatchGD

pytestmark = pytest.mark.usefixtures("one_thread")
WORLDS = (1, 2, 3)
COUNTS = (2, 3, 8)
METHODS = ("forward", "exact")
CHUNKS = 15


def model():
    return mlp(nn.BatchNorm1d(6))


def all_chunks():
    return chunked(58)  # 14 of four samples, and one of two


def dealt(count, rank, world):
    """A process's chunks: whole groups, as the guide says."""
    return [c for i, c in enumerate(all_chunks()) if i // count % world == rank]


def work(rank, world, folder):
    found = {}
    for count in COUNTS:
        for method in METHODS:
            for accumulation in ("exact", "float32"):
                net = model()
                closure = make(
                    net,
                    dealt(count, rank, world),
                    method=method,
                    accumulation=accumulation,
                    vectorize=count,
                    process_group=dist.group.WORLD,
                )
                optimizer = FullBatchGD(net.parameters(), lr=0.1, momentum=0.9)
                losses = [optimizer.step(closure) for _ in range(3)]
                values = [*losses, closure.mean_sqnorm, *(p.grad for p in net.parameters())]
                found[count, method, accumulation] = bits(values, net), values
    return found, failing(rank)


def failing(rank):
    """The error of each process where chunks of one cannot be worked on at once."""
    net = mlp()
    chunks = all_chunks() if rank == 0 else [(x, object()) for x, _ in all_chunks()]
    given = {"evaluate": lambda model, chunk: model(chunk[0]).square().mean()}
    closure = make(net, chunks, vectorize=3, process_group=dist.group.WORLD, **given)
    return caught(closure)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return run_all(work, WORLDS, tmp_path_factory.mktemp("vectorized"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", COUNTS)
def test_exact_sums_have_the_same_bits_on_any_number_of_processes(jobs, count, method):
    first = jobs[1][0][0][count, method, "exact"][0]
    for world in WORLDS:
        for found, _ in jobs[world]:
            assert found[count, method, "exact"][0] == first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", COUNTS)
def test_all_processes_get_what_one_gets_with_chunks_one_by_one(jobs, count, method):
    net = model()
    closure = make(net, all_chunks(), method=method)
    optimizer = FullBatchGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = [optimizer.step(closure) for _ in range(3)]
    expected = flat([*losses, closure.mean_sqnorm, *(p.grad for p in net.parameters())])
    for world in WORLDS:
        for accumulation in ("exact", "float32"):
            ranks = [found[count, method, accumulation] for found, _ in jobs[world]]
            assert all(other[0] == ranks[0][0] for other in ranks)
            require_close(flat(ranks[0][1]), expected, 1e-10)


def test_an_error_reaches_the_other_processes(jobs):
    for world in WORLDS[1:]:
        errors = [error for _, error in jobs[world]]
        assert errors[0][0] == "PeerError" and "holds a object" in errors[0][1]
        assert all(error[0] in ("TypeError", "PeerError") for error in errors[1:])
        assert any(error[0] == "TypeError" for error in errors[1:])


@pytest.mark.parametrize("method", [None, "forward", "central", "exact"])
@pytest.mark.parametrize("count", COUNTS)
def test_exact_sums_have_the_same_bits_in_any_order_of_the_groups(count, method):
    """Those of all their chunks; the last group may have fewer, and stays the last."""
    chunks = all_chunks()
    whole = CHUNKS // count * count
    groups = [chunks[i : i + count] for i in range(0, whole, count)]
    results = []
    for order in (groups, groups[::-1], groups[1::2] + groups[::2]):
        given = [chunk for group in order for chunk in group] + chunks[whole:]
        found = outcome(model(), given, method=method, vectorize=count, accumulation="exact")
        results.append(bits(found.scalars, found.grads, found.buffers))
    assert results[1:] == results[:1] * 2
