"""fbopt.analysis over several processes: every measure gives the numbers of one process, on all.

Three processes are started once; each leaves in a file what it found for every division of the
chunks, which the tests then read.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import re
import traceback
from pathlib import Path
from typing import Any

import analysis_cases
import numpy as np
import pytest
import torch
import torch.distributed as dist

from fbopt.analysis import (
    Hessian,
    Objective,
    eigenpairs,
    gradient_statistics,
    hessian_trace,
    loss_landscape,
    measure_flatness,
    random_direction,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Which of seven chunks each rank visits, in a group of two ranks and one of three.
SHARES = {
    "in turn": [range(0, 7, 2), range(1, 7, 2)],
    "uneven": [[4, 0, 6, 2, 1], [], [5, 3]],
}
CONDITIONS = {"float64": {}, "float32": {"dtype": torch.float32}, "seeded": {"dropout": "seeded"}}


def objective(
    indices: Any, group: Any, dtype: torch.dtype = torch.float64, **options: Any
) -> Objective:
    """BatchNorm and dropout; the chunks have 5 samples, the last one has 3."""
    case = analysis_cases.convolutional(dtype)
    chunks = [pair for x, y in case.chunks for pair in zip(x.split(5), y.split(5), strict=True)]
    options = {"process_group": group} | options
    return Objective(case.model, case.loss_fn, [chunks[i] for i in indices], **options)


def measures(indices: Any, group: Any, **options: Any) -> dict[str, Any]:
    """What all processes should agree on."""
    target = objective(indices, group, **options)
    direction = random_direction(target)
    found: dict[str, Any] = gradient_statistics(target).as_json()
    found |= {"loss": target.loss(), "gradient": target.gradient()}
    for method in ("exact", "forward"):
        hessian = Hessian(target, method)
        pairs = eigenpairs(hessian, 2, tolerance=1e-3)
        found |= {f"{method} values": pairs.values, f"{method} products": pairs.products}
        found[f"{method} H v"] = hessian(direction)
    found["exact H v"] = Hessian(target)(direction)
    warm = eigenpairs(hessian, 2, start=pairs, tolerance=1e-3)
    found |= {"warm values": warm.values, "trace": hessian_trace(Hessian(target), 4).value}
    found["central H v"] = Hessian(target, "central")(direction)
    found["line"] = loss_landscape(target, [direction], [[-0.2, 0.0, 0.3]]).losses
    found["flatness"] = measure_flatness(target, 0.3, 2, precision=0.01).distances
    return found


def caught(call: Any) -> tuple[str, str]:
    """The type and text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def refused(rank: int, group: Any) -> dict[str, tuple[str, str]]:
    """What cannot work, on both processes alike."""
    share = [2 * rank, 2 * rank + 1]
    found = {"no group": caught(lambda: objective(share, None))}
    found["empty"] = caught(objective([], group).loss)
    one = objective(share, group)
    with torch.no_grad():
        one.params[0][0] += rank * 1e-6
    found["parameters"] = caught(one.gradient)
    one = objective(share, group)
    found["pass"] = caught(one.loss if rank else one.gradient)
    vector = torch.ones(one.size, dtype=torch.float64)
    found["vector"] = caught(lambda: Hessian(one)(vector + rank))
    found["pickle"] = caught(lambda: pickle.dumps(one))
    loss_fn = one.loss_fn

    def fails(output, target):
        if rank == 1:
            raise ZeroDivisionError("a fault")
        return loss_fn(output, target)

    one.loss_fn = fails
    found |= {"loss": caught(one.loss), "gradient": caught(one.gradient)}
    found["check"] = caught(lambda: gradient_statistics(one))
    one.loss_fn = loss_fn
    found["afterwards"] = str(copy.deepcopy(one).loss()), "none"
    hessian = Hessian(one)
    if rank == 1:
        one.params[0].data += 1
    found["stale"] = caught(lambda: hessian(vector))
    if rank == 1:
        one.params[0].data[0] = float("nan")
    found["undefined"] = caught(lambda: (hessian.refresh(), hessian(vector)))
    if rank == 1:
        one.params[0].requires_grad_(False)
    found["frozen"] = caught(one.gradient)
    found["alone"] = str(objective(range(7), "local").loss()), "none"
    return found


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
        pair, found = dist.new_group([0, 1]), {}
        for name, share in SHARES.items():
            if rank < len(share):
                group = pair if len(share) == 2 else dist.group.WORLD
                for condition, options in CONDITIONS.items():
                    if condition == "float64" or name == "in turn":
                        found[f"{name} {condition}"] = measures(share[rank], group, **options)
        if rank < 2:
            found["refused"] = refused(rank, pair)
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank left."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fbopt.analysis"])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert [process.exitcode for process in processes] == [0, 0, 0], reports
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


TABLE = [(name, c) for name in SHARES for c in CONDITIONS if c == "float64" or name == "in turn"]


@pytest.fixture(scope="module")
def expected():
    """What one process finds that visits all chunks."""
    return {name: measures(range(7), None, **options) for name, options in CONDITIONS.items()}


@pytest.mark.parametrize(("name", "condition"), TABLE)
def test_processes_find_what_one_finds(found, expected, name, condition):
    ranks = [one[f"{name} {condition}"] for one in found[: len(SHARES[name])]]
    for other in ranks[1:]:
        assert all(np.array_equal(ranks[0][key], other[key]) for key in other)
    fine = condition != "float32"
    for key, value in expected[condition].items():
        if value is None:
            assert ranks[0][key] is None
            continue
        mine, wanted = (torch.as_tensor(v).double().numpy() for v in (ranks[0][key], value))
        differenced = not key.startswith("exact") and ("values" in key or "H v" in key)
        tolerance = (1e-5 if differenced else 1e-8) if fine else 2e-2 if differenced else 2e-3
        np.testing.assert_allclose(
            mine, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(), err_msg=key
        )
    assert ranks[0]["loss"] == expected[condition]["loss"]  # to the last bit


WORLD = r"process_group=torch\.distributed\.group\.WORLD.*process_group=\"local\""
REFUSED = {
    "no group": ("ValueError", WORLD),
    "empty": ("ValueError", "chunks is empty"),
    "parameters": ("ValueError", r"the processes differ: 0\.weight.* is of checksum"),
    "pass": ("ValueError", "the pass is gradients on process 0 and losses on process 1"),
    "vector": ("ValueError", "the processes differ: the vector is of checksum"),
    "pickle": ("TypeError", "cannot be pickled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_all(found, case):
    results = [one["refused"][case] for one in found[:2]]
    assert results[0] == results[1]
    kind, text = REFUSED[case]
    assert results[0][0] == kind and re.search(text, results[0][1])


@pytest.mark.parametrize("case", ["loss", "gradient", "check"])
def test_a_failing_process_names_itself_to_the_others(found, case):
    results = [one["refused"][case] for one in found[:2]]
    assert results[1] == ("ZeroDivisionError", "a fault")
    assert results[0] == ("PeerError", "process 1 failed: ZeroDivisionError: a fault")


BEFORE = {
    "stale": ("RuntimeError", r"0\.weight has changed"),
    "undefined": ("ValueError", r"0\.weight of the model holds infinite or undefined"),
    "frozen": ("RuntimeError", r"0\.weight has been frozen"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_an_error_before_the_pass_reaches_the_others(found, case):
    kinds, texts = zip(*(one["refused"][case] for one in found[:2]), strict=True)
    assert kinds == ("PeerError", BEFORE[case][0])
    assert all(re.search(BEFORE[case][1], text) for text in texts)


def test_a_copy_and_a_process_on_its_own(found):
    one, other = (result["refused"] for result in found[:2])
    assert one["afterwards"] == other["afterwards"] != one["alone"]
    assert one["alone"] == other["alone"] == (str(objective(range(7), None).loss()), "none")
