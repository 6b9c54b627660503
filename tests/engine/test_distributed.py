"""FullBatchClosure over several processes: the numbers of one process, and what happens on failure.

Four processes are started once; every case runs in the group of the first `world` of them and
leaves what it found in a file for each rank, which the tests then read.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._distributed import Collectives

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD = 4
SIZES = (5, 4, 7, 4, 3, 6, 4)  # samples in the chunks
# Arguments of the closure.
GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forward": {"penalty": GradientPenalty(coefficient=0.3)},
    "central": {"penalty": GradientPenalty(coefficient=0.3, method="central")},
    "exact": {"penalty": GradientPenalty(coefficient=0.3, method="exact")},
    "clipped": {"penalty": GradientPenalty(coefficient=0.3), "chunk_max_norm": 0.5},
    "norms": {"chunk_norms": True},
}
# Which chunks each rank visits; a world has as many entries of a row as it has ranks.
SHARES = {
    "alone": [range(7)],
    "in turn": [range(0, 7, 2), range(1, 7, 2)],
    "uneven": [[4, 0, 6, 2, 1], [], [5, 3]],
    "backwards": [[6], [5, 3, 0], [4], [2, 1]],
    "few": [[1], [], [0], []],  # only two chunks in all
}


class Model(nn.Module):
    """BatchNorm and dropout; `odd` is used by chunk 3 alone, `never` by none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.odd = nn.Parameter(torch.randn(3))
        self.never = nn.Parameter(torch.randn(2))
        self.to(dtype)

    def forward(self, inputs: tuple[torch.Tensor, int]) -> torch.Tensor:
        x, index = inputs
        output = self.layers(x)
        return output + self.odd if index == 3 else output


class Share:
    """Some of the chunks; dropout depends on which, and `before` may do what it likes."""

    def __init__(
        self, indices: Any, dtype: torch.dtype, before: Callable[[int], None] | None = None
    ) -> None:
        self.indices, self.dtype, self.before = list(indices), dtype, before

    def __iter__(self) -> Iterator[Any]:
        for index in self.indices:
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(SIZES[index], 6, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (SIZES[index],), generator=generator)
            if self.before is not None:
                self.before(index)
            torch.manual_seed(100 + index)
            yield (x.to(self.dtype), index), y


def build(
    indices: Any,
    group: Any,
    gradient: str = "forward",
    dtype: torch.dtype = torch.float64,
    before: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[Model, FullBatchGD, FullBatchClosure]:
    model = Model(dtype)
    optimizer = FullBatchGD(model.parameters(), lr=0.3, momentum=0.9, max_norm=0.2, **options)
    closure = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        Share(indices, dtype, before),
        **GRADIENTS[gradient],
        optimizer=optimizer,
        weight=lambda chunk: len(chunk[1]),
        process_group=group,
    )
    return model, optimizer, closure


def outcome(model: Model, closure: FullBatchClosure, loss: torch.Tensor) -> dict[str, Any]:
    """What all processes should agree on after a call."""
    found = {f"grad {n}": p.grad for n, p in model.named_parameters()}
    found |= {"loss": loss, "square": closure.mean_sqnorm}
    found |= {f"state {n}": t for n, t in model.state_dict().items()}
    return {name: t if t is None else t.detach().clone() for name, t in found.items()}


def steps(indices: Any, group: Any, gradient: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Two steps with clipping."""
    model, optimizer, closure = build(indices, group, gradient, dtype)
    return [outcome(model, closure, optimizer.step(closure)) for _ in range(2)]


def lbfgs(indices: Any, group: Any) -> list[dict[str, Any]]:
    """Two steps of L-BFGS, whose line search calls the closure as often as it likes."""
    model, _, closure = build(indices, group, "plain")
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=4)
    return [outcome(model, closure, optimizer.step(closure)) for _ in range(2)]


TABLE = [
    (shares, gradient, dtype)
    for shares, gradient, dtype in itertools.product(
        SHARES, GRADIENTS, (torch.float64, torch.float32)
    )
    if dtype == torch.float64 or gradient == "forward"
]


# --- what the processes do ------------------------------------------------------------------------


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    """The type and text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def failing(rank: int, group: Any, where: str) -> dict[str, Any]:
    """Rank 1 fails at its first or second call, in a chunk or before them; then all go on."""
    call, place = where.split()
    broken = call == "first"

    def fault(_: int) -> float:
        if broken and rank == 1:
            raise ZeroDivisionError("a fault")
        return 0.3

    model, optimizer, closure = build(SHARES["backwards"][rank], group)
    if place == "chunk":
        closure.chunks.before = fault
    else:
        closure.penalty = GradientPenalty(coefficient=fault)
    if not broken:
        optimizer.step(closure)
        broken = True
    before = bits(model, optimizer, closure.step)
    error = caught(lambda: optimizer.step(closure))
    unchanged = bits(model, optimizer, closure.step) == before
    broken = False
    optimizer.step(closure)
    return {"error": error, "unchanged": unchanged, "after": outcome(model, closure, closure())}


def not_finite(rank: int, group: Any) -> dict[str, Any]:
    """A NaN in one chunk of rank 1, with and without error_if_nonfinite."""
    found = {}
    for strict in (True, False):
        model, optimizer, closure = build(
            SHARES["backwards"][rank], group, error_if_nonfinite=strict
        )
        closure.loss_fn = lambda output, target: (
            nn.functional.cross_entropy(output, target) * (float("nan") if rank == 1 else 1)
        )
        before = bits(model, optimizer.state_dict(), closure.step)
        found[strict] = caught(lambda o=optimizer, c=closure: found.update(loss=float(o.step(c))))
        found[f"unchanged {strict}"] = bits(model, optimizer.state_dict(), closure.step) == before
    return found


def refused(rank: int, group: Any) -> dict[str, tuple[str, str]]:
    """What cannot work, on all processes alike."""
    found = {"empty": caught(build([], group)[2])}
    model, _, closure = build([rank], group)
    with torch.no_grad():
        model.layers[4].bias[rank] += 1e-6
    found["parameters"] = caught(closure)
    closure = build([rank], group, "forward" if rank else "central")[2]
    found["penalty"] = caught(closure)
    closure = build([rank], group, "forward" if rank else "clipped")[2]
    found["clip"] = caught(closure)
    _, optimizer, closure = build([rank], group)
    optimizer.param_groups[0]["lr"] = 0.1 + rank
    found["lr"] = caught(lambda: optimizer.step(closure))
    closure = build([rank], group)[2]
    closure.penalty = GradientPenalty(coefficient=0.5 + rank)
    found["coefficient"] = caught(closure)
    frozen, _, closure = build([rank], group)
    frozen.never.requires_grad_(rank != 0)
    found["count"] = caught(closure)
    frozen, _, closure = build([rank], group)
    closure()
    frozen.never.requires_grad_(rank != 0)
    found["count, later"] = caught(closure)
    halted, _, closure = build([rank], group)
    closure()
    halted.layers[1].train(rank != 0)
    found["modes, later"] = caught(closure)
    for name, wrapped in {
        "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm(Model(torch.float64)),
        "DistributedDataParallel": nn.parallel.DistributedDataParallel(
            nn.Linear(2, 1), process_group=group
        ),
    }.items():
        found[name] = caught(
            lambda w=wrapped: FullBatchClosure(w, nn.MSELoss(), [1], process_group=group)
        )
    return found


def collectives(rank: int, group: Any) -> dict[str, Any]:
    """The maxima and numbers of an agreement, which exact sums need."""
    group = Collectives(group)
    maxima = torch.tensor([rank, 2.0, float("inf") if rank == 2 else 0.0])
    found = group.agree([rank == 1, False], [rank, 2.0**53], torch.device("cpu"), maxima=maxima)
    sums = [torch.full((3,), 2**60 + rank), torch.ones(2, dtype=torch.float64)]
    group.all_reduce_(sums)
    counts = [r % 3 for r in range(WORLD)]
    rows = torch.full((2, counts[rank]), float(rank))
    return {"agreed": found, "sums": sums, "gathered": group.all_gather(rows, counts)}


def killed(rank: int, group: Any) -> dict[str, Any]:
    """Rank 2 dies in the middle of its chunks."""
    model, optimizer, closure = build(SHARES["backwards"][rank], group)
    optimizer.step(closure)
    before = bits(model, optimizer, closure.step)
    if rank == 2:
        closure.chunks.before = lambda index: os.kill(os.getpid(), signal.SIGKILL)
    error = caught(lambda: optimizer.step(closure))
    return {"error": error, "unchanged": bits(model, optimizer, closure.step) == before}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    groups = [dist.new_group(list(range(size))) for size in range(1, WORLD + 1)]
    found: dict[str, Any] = {}
    try:
        for shares, gradient, dtype in TABLE:
            share = SHARES[shares]
            if rank < len(share):
                group = groups[len(share) - 1]
                found[f"{shares} {gradient} {dtype}"] = steps(share[rank], group, gradient, dtype)
        found["lbfgs"] = lbfgs(SHARES["backwards"][rank], groups[-1])
        for where in ("first chunk", "second chunk", "first begin", "second begin"):
            found[f"failing {where}"] = failing(rank, groups[-1], where)
        found["not finite"] = not_finite(rank, groups[-1])
        found["collectives"] = collectives(rank, groups[-1])
        if rank < 2:
            found["refused"] = refused(rank, groups[1])
            found["not a member"] = caught(lambda: build([0], groups[0])) if rank else None
        torch.save(found, folder / f"{rank}.pt")
        torch.save(killed(rank, groups[-1]), folder / f"{rank}-killed.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    os._exit(0)  # the group has lost a process and cannot be left in order


# --- what they found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank left; the last case has killed rank 2."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fbopt.closure"])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # a rank that hangs
        process.join()
    reports = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    codes = [process.exitcode for process in processes]
    assert codes == [0, 0, -signal.SIGKILL, 0], f"{codes}\n{reports}"
    everyone = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for rank in (0, 1, 3):
        everyone[rank]["killed"] = torch.load(folder / f"{rank}-killed.pt")
    return everyone


def reference(shares: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """What one process finds that visits the chunks of all, in their natural order."""
    return run(sorted(itertools.chain(*SHARES[shares])), None, *arguments)


def compare(mine: list[dict], theirs: list[dict], tolerance: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if value is None or other[name] is None:
                assert value is other[name], name
                continue
            assert value.dtype == other[name].dtype and value.shape == other[name].shape, name
            torch.testing.assert_close(
                value,
                other[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(("shares", "gradient", "dtype"), TABLE)
def test_processes_find_what_one_finds(found, shares, gradient, dtype):
    expected = reference(shares, steps, gradient, dtype)
    ranks = [one[f"{shares} {gradient} {dtype}"] for one in found[: len(SHARES[shares])]]
    assert all(bits(one) == bits(ranks[0]) for one in ranks)
    compare(ranks[0], expected, 1e-12 if dtype == torch.float64 else 1e-4)
    for name in ("loss", "square"):  # whatever the shares, to the last bit
        assert bits(ranks[0][0][name]) == bits(expected[0][name])
    used = 3 in itertools.chain(*SHARES[shares])
    assert (ranks[0][0]["grad odd"] is not None) == used
    assert ranks[0][0]["grad never"] is None
    passes = sum(len(share) for share in SHARES[shares])
    assert ranks[0][1]["state layers.1.num_batches_tracked"] == 2 * passes
    if shares == "alone":  # a group of one
        assert bits(ranks[0]) == bits(expected)


def test_lbfgs_takes_the_same_steps(found):
    assert all(bits(one["lbfgs"]) == bits(found[0]["lbfgs"]) for one in found)
    compare(found[0]["lbfgs"], reference("backwards", lbfgs), 1e-8)


@pytest.mark.parametrize("where", ["first chunk", "second chunk", "first begin", "second begin"])
def test_a_failing_process_names_itself_to_the_others(found, where):
    results = [one[f"failing {where}"] for one in found]
    assert results[1]["error"] == ("ZeroDivisionError", "a fault")
    other = ("PeerError", "process 1 failed: ZeroDivisionError: a fault")
    assert [r["error"] for r in results] == [other, results[1]["error"], other, other]
    assert all(r["unchanged"] for r in results)
    model, optimizer, closure = build(range(7), None)
    for _ in range(1 if where.startswith("first") else 2):
        optimizer.step(closure)
    compare([results[0]["after"]], [outcome(model, closure, closure())], 1e-12)
    assert all(bits(r["after"]) == bits(results[0]["after"]) for r in results)


def test_a_killed_process_lets_none_wait(found):
    for rank in (0, 1, 3):
        kind, text = found[rank]["killed"]["error"]
        assert kind == "PeerError" and f"process {rank} of 4 could not" in text
        assert found[rank]["killed"]["unchanged"]


def test_a_loss_that_is_not_finite_reaches_all(found):
    for one in found:
        result = one["not finite"]
        assert result[True][0] == "RuntimeError" and result["unchanged True"]
        assert result[True] == found[0]["not finite"][True]
        assert result[False] == ("none", "") and result["loss"] != result["loss"]


def test_maxima_and_counts_are_agreed_on(found):
    for one in found:
        result = one["collectives"]
        flags, table, maxima = result["agreed"]
        assert flags == [True, False]
        assert table == [[float(rank), 2.0**53] for rank in range(WORLD)]
        assert maxima.tolist() == [3, 2, float("inf")] and maxima.dtype == torch.float32
        assert result["sums"][0].tolist() == [4 * 2**60 + 6] * 3
        assert result["sums"][1].tolist() == [4.0, 4.0]
        assert result["gathered"].tolist() == [[1, 2, 2]] * 2  # 0, 1, 2 and 0 columns


REFUSED = {
    "empty": ("ValueError", "chunks is empty"),
    "parameters": ("ValueError", r"parameter 7 \(layers.4.bias\) is float64 \[3\], checksum"),
    "penalty": ("ValueError", "penalty is central on process 0 and forward on process 1"),
    "clip": ("ValueError", "chunk_max_norm is 0.5 on process 0 and None on process 1"),
    "lr": ("ValueError", r"lr is \['0.1'\] on process 0 and \['1.1'\] on process 1"),
    "coefficient": ("ValueError", "coefficient is 0.5 on process 0 and 1.5 on process 1"),
    "count": ("ValueError", "the number of parameters is"),
    "count, later": ("ValueError", "the number of parameters is"),
    "modes, later": ("ValueError", r"the modes of normalisation layers .* is E.* and T"),
    "SyncBatchNorm": ("ValueError", "SyncBatchNorm"),
    "DistributedDataParallel": ("ValueError", "model.module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_all(found, case):
    results = [one["refused"][case] for one in found[:2]]
    assert results[0] == results[1]
    kind, text = REFUSED[case]
    assert results[0][0] == kind and re.search(text, results[0][1])


def test_the_group_has_to_be_one_that_fits():
    for group in (0, "gloo", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(TypeError, match=r"process_group must be .*init_process_group"):
            build([0], group)


def test_a_process_outside_the_group_is_told_so(found):
    assert found[1]["not a member"][0] == "TypeError"


def test_the_back_end_has_to_fit_the_device(monkeypatch):
    group = Collectives()
    group.world_size, group.is_single = 2, False
    monkeypatch.setattr(Collectives, "_served", lambda self: {"cuda"})
    group.check_devices({torch.device("cuda", 0)})
    with pytest.raises(ValueError, match=r"serves cuda, but the model is on cpu.*gloo"):
        group.check_devices({torch.device("cpu")})


def test_the_loss_of_one_process_knows_no_order_of_the_chunks():
    results = set()
    for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 97):
        model, _, closure = build(order, None)
        model.layers[3].p = 0.0
        results.add((float(closure()), float(closure.mean_sqnorm)))
    assert len(results) == 1
