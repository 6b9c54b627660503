"""fbopt.check in a job of two processes, started once: shares, errors, sharded models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from diagnosis_cases import chunked, mlp, samples
from torch.nn.functional import cross_entropy

import fbopt
from fbopt import FullBatchClosure, GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")


def closure(chunks: Any, shard: bool = False, **options: Any) -> FullBatchClosure:
    torch.manual_seed(0)
    model = mlp()
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=ranks.mesh(2))
    group = dist.group.WORLD
    options |= {"process_group": group, "backward": shard}
    return FullBatchClosure(model, lambda output, y: cross_entropy(output, y), chunks, **options)


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("error", UserWarning)
    chunks = chunked(*samples())
    x, y = chunks[0]
    ignored = [(x, y if rank == 0 else torch.full_like(y, -100)), chunks[rank + 1]]
    penalty = GradientPenalty(coefficient=0.1)
    debugged = closure(chunks[rank::2], debug=True)
    sharded = closure(chunks[rank::2], True, penalty=penalty)
    return {
        "own": str(fbopt.check(closure(chunks[rank::2]))),
        "same": str(fbopt.check(closure(chunks))),
        "debug": float(debugged()),
        "one is wrong": ranks.caught(closure(ignored, debug=True)),
        "sharded": str(fbopt.check(sharded)),
        "sharded, step after": float(sharded()),
        "sharded, uneven and wrong": str(fbopt.check(closure(ignored[: 2 - rank], True))),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(work, 2, tmp_path_factory.mktemp("ranks"))


def test_own_chunks_are_all_right(found):
    for rank in found:
        assert rank["own"].startswith("all right (2 of 2 chunks")
    assert found[0]["debug"] == found[1]["debug"]


def test_same_chunks_on_all_are_named_on_all(found):
    for rank in found:
        assert "processes 0 and 1 visit the same chunks" in rank["same"]


def test_an_error_on_one_process_reaches_the_other(found):
    assert found[1]["one is wrong"][0] == "RuntimeError"
    assert "all targets ignored" in found[1]["one is wrong"][1]
    assert found[0]["one is wrong"][0] == "PeerError"
    assert "process 1 failed" in found[0]["one is wrong"][1]


def test_sharded_models(found):
    for rank in found:
        assert rank["sharded"].startswith("all right (2 of 2 chunks")
        assert "not checked: loss (parameters are sharded)" in rank["sharded"]
        assert "not checked: radius (parameters are sharded)" in rank["sharded"]
    assert found[0]["sharded, step after"] == found[1]["sharded, step after"]
    assert "all targets ignored" in found[1]["sharded, uneven and wrong"]
