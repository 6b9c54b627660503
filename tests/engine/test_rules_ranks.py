"""Rules for second points, objective and loss on several processes: what one process gets, and with
exact sums the same bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from at_once import chunked, mlp
from conftest import bits
from ranks import caught, run_all

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

pytestmark = pytest.mark.usefixtures("one_thread")
WORLDS = (1, 2, 3)
RULES = {
    "norm": GradientPenalty(coefficient=0.1, power=1),
    "full": GradientPenalty(coefficient=0.1, full_strength=1.0),
    "full exact": GradientPenalty(coefficient=0.1, full_strength=1.0, method="exact"),
    "sam": SharpnessAware(rho=0.2),
    "full sam": SharpnessAware(rho=0.2, scope="full"),
    "asam": SharpnessAware(0.5, adaptive=True, method="central"),
    "full asam": SharpnessAware(0.5, adaptive=True, scope="full"),
}
KINDS = list(itertools.product(RULES, ("exact", "float32"), (1, 2)))


def work(rank, world, folder):
    found, chunks = {}, chunked(26)
    for rule, accumulation, count in KINDS:
        net = mlp()
        own = [c for i, c in enumerate(chunks) if i // count % world == rank]
        closure = FullBatchClosure(
            net,
            F.cross_entropy,
            own,
            penalty=RULES[rule],
            accumulation=accumulation,
            vectorize=count,
            process_group=dist.group.WORLD,
        )
        optimizer = FullBatchGD(net.parameters(), lr=0.1, momentum=0.9)
        values = [optimizer.step(closure) for _ in range(3)]
        values += [closure.loss_only(), closure.mean_sqnorm]
        values += [] if closure.objective is None else [closure.objective]
        values += [p.grad for p in net.parameters()]
        found[rule, accumulation, count] = bits(values, net), [v.clone() for v in values]
    return found, differing(rank), failing(rank)


def differing(rank):
    """The errors where processes have other rules: another scope, or another eta."""
    found = []
    asam = [SharpnessAware(0.5, adaptive=True, eta=eta) for eta in (0.01, 0.02)]
    for pair in ([RULES["sam"], RULES["full sam"]], asam):
        closure = FullBatchClosure(
            mlp(),
            F.cross_entropy,
            chunked(),
            penalty=pair[min(rank, 1)],
            process_group=dist.group.WORLD,
        )
        found.append(caught(closure))
    return found


def failing(rank):
    """The error where the loss of one process raises in loss_only()."""

    def loss_fn(output, target):
        if rank == 0:
            raise ZeroDivisionError("a fault of the test")
        return F.cross_entropy(output, target)

    closure = FullBatchClosure(mlp(), loss_fn, chunked(), process_group=dist.group.WORLD)
    return caught(closure.loss_only)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return run_all(work, WORLDS, tmp_path_factory.mktemp("rules"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_processes_get_what_one_gets(jobs, kind):
    first = jobs[1][0][0][kind]
    for world in WORLDS:
        for found, *_ in jobs[world]:
            torch.testing.assert_close(found[kind][1], first[1], rtol=1e-9, atol=1e-12)
            assert kind[1] == "float32" or found[kind][0] == first[0]
            assert found[kind][0] == jobs[world][0][0][kind][0]


def test_other_rules_and_errors_reach_all_processes(jobs):
    for world in WORLDS[1:]:
        for rank, (_, others, failed) in enumerate(jobs[world]):
            assert all("the penalty's direction" in other[1] for other in others)
            assert failed[0] == ("ZeroDivisionError" if rank == 0 else "PeerError")
            assert "a fault of the test" in failed[1]
