"""Several processes: what needs a group, GradientAccumulator over one, and DistributedDataParallel.

Three processes are started once; each leaves what it found in a file, which the tests then read.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty
from fbopt._engine import chunk_addition
from fbopt.analysis import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = 3
SIZES = (5, 4, 7, 4, 3, 6, 4)
# Which chunks each rank visits, in the first step and in the second.
SHARES = ([[0, 2, 4], [6], [1, 3, 5]], [[4, 1, 0, 3], [], [5, 2, 6]])
EVEN = ([[0, 2], [6, 1], [3, 5]], [[4, 1], [2, 0], [5, 6]])
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "no_sync": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused, bucket view": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}
PENALTIES = {
    "plain": None,
    "forward": GradientPenalty(coefficient=0.3),
    "central": GradientPenalty(coefficient=0.3, method="central"),
}


class Net(nn.Module):
    """`odd` is used by chunk 3 alone."""

    def __init__(self, has_odd: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.odd = nn.Parameter(torch.randn(3)) if has_odd else None
        self.double()

    def forward(self, inputs: tuple[torch.Tensor, int]) -> torch.Tensor:
        output = self.layers(inputs[0])
        return output if self.odd is None or inputs[1] != 3 else output + self.odd


def chunk(index: int) -> Any:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(SIZES[index], 6, generator=generator, dtype=torch.float64)
    return (x, index), torch.randint(0, 3, (SIZES[index],), generator=generator)


def loss_of(model: nn.Module, index: int) -> torch.Tensor:
    x, y = chunk(index)
    return nn.functional.cross_entropy(model(x), y)


# --- what the processes do ------------------------------------------------------------------------


def caught(call: Any) -> tuple[str, str]:
    """The type and text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def accumulate(
    model: nn.Module,
    shares: Any,
    rank: int,
    group: Any,
    how: str = "float32",
    sync: bool = True,
    within: bool = False,
) -> list[Any]:
    """Two steps of SGD on the accumulated gradient; what each process has after them."""
    accumulator = GradientAccumulator(model.parameters(), how, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found: list[Any] = []
    for share in shares:
        for _ in accumulator.passes():
            for index in share[rank]:
                if within:
                    with accumulator.chunk(weight=SIZES[index]):
                        loss_of(model, index).backward()
                    continue
                with contextlib.nullcontext() if sync else model.no_sync():
                    loss = loss_of(model, index)
                    accumulator.backward(loss, weight=SIZES[index])
        accumulator.to_grad()
        found += [accumulator.total_weight, *map(torch.clone, filter_none(accumulator.mean()))]
        optimizer.step()
        optimizer.zero_grad()  # DistributedDataParallel may have copied the mean
    return [*found, *(p.detach() for p in model.parameters())]


def filter_none(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def by_closure(
    model: nn.Module, shares: Any, rank: int, group: Any, how: str = "float32", **given: Any
) -> list[Any]:
    """Two steps with a closure."""
    optimizer = FullBatchGD(model.parameters(), lr=0.3)
    closure = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        chunks=[0],
        weight=lambda c: len(c[1]),
        accumulation=how,
        optimizer=optimizer,
        process_group=group,
        **given,
    )
    found = []
    for share in shares:
        closure.chunks = [chunk(index) for index in share[rank]]
        found.append(optimizer.step(closure))
    return [*found, *(t.detach() for t in closure.model.state_dict().values())]


def several(rank: int, group: Any) -> dict[str, Any]:
    found = {}
    for how in ("float32", "exact"):
        found[f"accumulate {how}"] = accumulate(Net(), SHARES, rank, group, how)
    for name, mode in MODES.items():
        odd = "unused" in name
        model = DistributedDataParallel(Net(odd), process_group=group, **mode)
        shares = SHARES if name == "no_sync" else EVEN
        found[f"ddp {name}"] = accumulate(model, shares, rank, group, sync=name != "no_sync")
        # Afterwards it can be trained as before.
        model.zero_grad()
        loss_of(model, rank).backward()
        found[f"after {name}"] = [p.grad for p in model.parameters()]
    model = DistributedDataParallel(Net(False), process_group=group, broadcast_buffers=False)
    found["ddp within"] = accumulate(model, SHARES, rank, group, within=True)
    model.zero_grad()
    loss_of(model, rank).backward()
    found["after within"] = [p.grad for p in model.parameters()]
    for name, penalty in PENALTIES.items():
        for how in ("float32", "exact"):
            model = DistributedDataParallel(Net(), process_group=group)
            given = {"penalty": penalty, "backward": True}
            found[f"closure {name} {how}"] = by_closure(model, SHARES, rank, group, how, **given)
    return found


def refused(rank: int, group: Any, early: list[Any]) -> dict[str, Any]:
    """What would leave every process with its own gradient."""
    model, given = Net(), (nn.functional.cross_entropy, [chunk(rank)])
    wrapped = DistributedDataParallel(Net(), process_group=group)
    nested = nn.Sequential(wrapped)
    static = DistributedDataParallel(Net(False), process_group=group, static_graph=True)
    accumulator, closure = early
    found = {
        "accumulator": caught(lambda: GradientAccumulator(model.parameters())),
        "closure": caught(lambda: FullBatchClosure(model, *given)),
        "closure backward": caught(lambda: FullBatchClosure(wrapped, *given, backward=True)),
        "early accumulator": caught(accumulator.chunk().__enter__),
        "early add": caught(lambda: accumulator.add([None] * 7)),
        "early closure": caught(closure),
        "wrapped": caught(lambda: FullBatchClosure(wrapped, *given, process_group=group)),
        "wrapped, local": caught(lambda: FullBatchClosure(wrapped, *given, process_group="local")),
        "nested": caught(
            lambda: FullBatchClosure(nested, *given, process_group=group, backward=True)
        ),
        "static": caught(
            lambda: GradientAccumulator(static.parameters(), process_group=group).backward(
                loss_of(static, rank)
            )
        ),
        "static closure": caught(
            FullBatchClosure(static, *given, process_group=group, backward=True)
        ),
        "a name": caught(lambda: GradientAccumulator(model.parameters(), process_group="world")),
    }
    accumulator = GradientAccumulator(model.parameters(), process_group="local")
    accumulator.backward(loss_of(model, rank))
    found["local"] = accumulator.mean()
    weight = lambda c: len(c[1])  # noqa: E731
    FullBatchClosure(model, *given, weight=weight, process_group="local")()
    found["local closure"] = [p.grad for p in model.parameters()]
    found["objective"] = Objective(model, *given, weight=weight, process_group="local").gradient()
    return found


def failing(rank: int, group: Any) -> dict[str, Any]:
    """Errors that all processes have to see."""
    found = {}
    model = Net()
    accumulator = GradientAccumulator(model.parameters(), process_group=group)
    found["nothing"] = caught(accumulator.mean)
    chunk_addition.BATCH_BYTES = 1
    with contextlib.suppress(ZeroDivisionError), accumulator.chunk():
        loss_of(model, rank).backward()
        if rank == 1:
            raise ZeroDivisionError
    found["spoiled"] = caught(accumulator.to_grad)
    accumulator.reset()
    accumulator.backward(loss_of(model, rank), SIZES[rank])
    accumulator.to_grad()
    found["again"] = [p.grad for p in model.parameters()]
    model = Net()
    with torch.no_grad():
        model.layers[3].bias[rank] += 1e-6
    accumulator = GradientAccumulator(model.parameters(), process_group=group)
    accumulator.backward(loss_of(model, rank))
    found["parameters"] = caught(accumulator.mean)
    return found


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    model = Net()
    early = [
        GradientAccumulator(model.parameters()),
        FullBatchClosure(model, nn.functional.cross_entropy, [chunk(rank)]),
    ]
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    try:
        found = {
            **several(rank, group),
            "refused": refused(rank, group, early),
            "failing": failing(rank, group),
        }
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


# --- what they found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank left."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fbopt.closure"])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert [process.exitcode for process in processes] == [0] * WORLD, reports
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def alone(shares: Any) -> list[list[list[int]]]:
    """The same chunks, all visited by one process."""
    return [[sorted(itertools.chain(*share))] for share in shares]


def assert_same(found: list[dict[str, Any]], name: str, expected: list[Any], tight: bool) -> None:
    ranks = [one[name] for one in found]
    assert all(bits(one) == bits(ranks[0]) for one in ranks), name
    if tight:
        assert bits(ranks[0]) == bits(expected)
    for mine, wanted in zip(ranks[0], expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["float32", "exact"])
def test_an_accumulator_sums_over_the_group(found, how):
    expected = accumulate(Net(), alone(SHARES), 0, None, how)
    assert_same(found, f"accumulate {how}", expected, how == "exact")


@pytest.mark.parametrize("name", MODES)
def test_chunks_of_a_ddp_model(found, name):
    odd = "unused" in name
    shares = SHARES if name == "no_sync" else EVEN
    assert_same(found, f"ddp {name}", accumulate(Net(odd), alone(shares), 0, None), False)
    assert all(bits(one[f"after {name}"]) == bits(found[0][f"after {name}"]) for one in found)
    assert found[0][f"after {name}"][-1].norm() > 0


def test_what_a_ddp_model_runs_within_chunks_sends_no_gradients(found):
    """So that processes may have different numbers of chunks, which would wait for ever."""
    assert_same(found, "ddp within", accumulate(Net(False), alone(SHARES), 0, None), False)
    assert all(bits(one["after within"]) == bits(found[0]["after within"]) for one in found)


@pytest.mark.parametrize("how", ["float32", "exact"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_closure_takes_a_ddp_model_with_backward(found, name, how):
    expected = by_closure(Net(), alone(SHARES), 0, None, how, penalty=PENALTIES[name])
    assert_same(found, f"closure {name} {how}", expected, how == "exact")


def test_several_processes_need_a_group(found):
    for one in found:
        for name in ("accumulator", "closure", "closure backward"):
            kind, text = one["refused"][name]
            assert kind == "ValueError" and "group.WORLD" in text and '"local"' in text, name
        for name in ("early accumulator", "early add", "early closure"):
            kind, text = one["refused"][name]
            assert kind == "ValueError" and "process_group is not given" in text, name
        for name in ("wrapped", "wrapped, local", "nested"):
            kind, text = one["refused"][name]
            assert kind == "ValueError" and "model.module" in text and "backward=True" in text, name
        for name in ("static", "static closure"):
            kind, text = one["refused"][name]
            assert kind == "ValueError" and "leave static_graph out" in text, name
        assert one["refused"]["a name"][0] == "TypeError"


def test_local_is_this_process_alone(found):
    for rank, one in enumerate(found):
        model = Net()
        loss_of(model, rank).backward()
        wanted = [p.grad for p in model.parameters()]
        for name in ("local", "local closure"):
            torch.testing.assert_close(
                filter_none(one["refused"][name]), filter_none(wanted), rtol=1e-12, atol=1e-14
            )
        assert one["refused"]["objective"].norm() > 0


def test_all_processes_see_what_is_wrong(found):
    for rank, one in enumerate(found):
        assert "nothing was added" in one["failing"]["nothing"][1]
        kind, text = one["failing"]["spoiled"]
        assert kind == ("RuntimeError" if rank == 1 else "PeerError") and "half-way" in text
        kind, text = one["failing"]["parameters"]
        assert kind == "ValueError" and "the processes differ: parameter 6" in text
        assert bits(one["failing"]["again"]) == bits(found[0]["failing"]["again"])
