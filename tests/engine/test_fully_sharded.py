"""FSDP2 (fully_shard): training over several processes against one process.

Jobs of two and of four processes are started once; the tests read what each rank found.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import bits
from ranks import caught, whole
from torch import nn

from fbopt import (
    FullBatchClosure,
    FullBatchGD,
    GradientAccumulator,
    GradientPenalty,
    SharpnessAware,
    clip_grad_norm_,
)
from fbopt._engine import chunk_addition

pytestmark = pytest.mark.usefixtures("one_thread")

WORLDS = (2, 4)
PENALTIES: dict[str, GradientPenalty | SharpnessAware | None] = {
    "plain": None,
    "forward": GradientPenalty(coefficient=0.1),
    "central": GradientPenalty(coefficient=0.1, method="central"),
    "asam": SharpnessAware(rho=0.3, adaptive=True),
    "full asam": SharpnessAware(rho=0.3, adaptive=True, scope="full"),
}
# Which chunks a rank visits: all the same, or each its own; penalty, dtype, steps, arguments.
TRAIN: dict[str, tuple[str, str, torch.dtype, int, dict[str, Any]]] = {
    "same": ("same", "plain", torch.float64, 2, {}),
    "same, exact sums": ("few same", "forward", torch.float32, 20, {"accumulation": "exact"}),
    "same, central": ("few same", "central", torch.float64, 2, {}),
    "same, clipped": ("few same", "forward", torch.float64, 2, {"chunk_max_norm": 0.3}),
    "same, many": ("few same", "forward", torch.float32, 20, {}),
    "own": ("own", "plain", torch.float64, 2, {}),
    "own, exact sums": ("own", "plain", torch.float32, 20, {"accumulation": "exact"}),
    "same, adaptive": ("few same", "asam", torch.float64, 2, {}),
    "same, by all chunks": ("few same", "full asam", torch.float64, 2, {"accumulation": "exact"}),
    "own, by all chunks": ("few own", "full asam", torch.float64, 2, {"accumulation": "exact"}),
    "own, forward": ("own", "forward", torch.float64, 2, {}),
    "own, norms": ("own", "plain", torch.float64, 2, {"chunk_norms": True}),
    "own, many": ("few own", "forward", torch.float32, 20, {}),
}
MORE = ("same, exact sums", "own, exact sums", "own, many")
TABLE = [(2, name) for name in TRAIN] + [(4, name) for name in MORE]
EXACT = [(world, name) for world, name in TABLE if "exact sums" in name]


# Sizes of the model whose memory is measured: a layer is 1/12 of it.
# With exact sums a process has means and integers of 12 bytes, with a penalty sums, two gradients
# and two copies of the parameters.
WIDTH, LAYERS = 128, 12
MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "forward": ("forward", {}),
    "own, exact": ("plain", {"accumulation": "exact"}),
}


class Model(nn.Module):
    """`last` has fewer rows than four processes; `never` gets no gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.last = nn.Linear(16, 18), nn.Linear(18, 3)
        self.never = nn.Parameter(torch.randn(5))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.up(torch.tanh(self.norm(self.first(x))))))


def sharded(mesh: Any, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """On a mesh of two dimensions ("data", "tensor") also tensor-parallel."""
    from torch.distributed.fsdp import fully_shard

    model = Model(dtype)
    if mesh.mesh_dim_names == ("data", "tensor"):
        parallelize(model, mesh["tensor"])
        mesh = mesh["data"]
    fully_shard([model.first, model.norm], mesh=mesh, **options)
    fully_shard(model.up, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def chunks(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in (5, 4, 7, 4, 3, 6, 4, 2)
    ]


def parallelize(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import parallel as tp

    plan = {"up": tp.ColwiseParallel(), "last": tp.RowwiseParallel()}
    tp.parallelize_module(model, mesh, plan)


def visited(data: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return chunks(dtype)[: {"few same": 2, "few own": 4}.get(data)]


def joint(every: list[Any], world: int) -> list[tuple[torch.Tensor, ...]]:
    """The chunks of one process: the k-th ones of all ranks taken together."""
    rows = [every[start : start + world] for start in range(0, len(every), world)]
    return [tuple(torch.cat(parts) for parts in zip(*row, strict=True)) for row in rows]


def train(model: nn.Module, share: Any, penalty: str, steps: int, **options: Any) -> Any:
    """Clipped steps with momentum."""
    held = dict(model.named_parameters())
    optimizer = FullBatchGD(model.parameters(), lr=0.2, momentum=0.9, max_norm=0.2)
    closure = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        share,
        penalty=PENALTIES[penalty],
        optimizer=optimizer,
        **options,
    )
    found: dict[str, Any] = {"loss": [], "norm": [], "square": []}
    for _ in range(steps):
        found["loss"].append(optimizer.step(closure))
        found["norm"].append(optimizer.last_grad_norm)
        found["square"].append(closure.mean_sqnorm)
    found["grads"] = {n: p.grad if p.grad is None else whole(p.grad) for n, p in held.items()}
    found["params"] = {n: whole(p.detach()).clone() for n, p in held.items()}
    found["buffers"] = [whole(optimizer.state[p].get("momentum_buffer")) for p in held.values()]
    return found


# --- what the processes do ------------------------------------------------------------------------


def trained(mesh: Any, rank: int, name: str) -> Any:
    data, penalty, dtype, steps, options = TRAIN[name]
    every = visited(data, dtype)
    if "own" in data:
        every, options = every[rank :: mesh.size()], options | {"process_group": dist.group.WORLD}
    return train(sharded(mesh, dtype), every, penalty, steps, backward=True, **options)


def mixed_precision(mesh: Any, rank: int) -> dict[str, Any]:
    """bf16 in the passes, float32 sums: beside what FSDP2's own backward passes make."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, share = sharded(mesh, mp_policy=policy), chunks()[rank :: mesh.size()]
    expected, total = {}, sum(len(x) for x, _ in chunks())
    for k, (x, y) in enumerate(share):
        row = chunks()[k * mesh.size() : (k + 1) * mesh.size()]
        scale = len(x) * mesh.size() / sum(len(other) for other, _ in row)
        (nn.functional.cross_entropy(model(x), y) * scale).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                part = whole(p.grad) * (sum(len(other) for other, _ in row) / total)
                expected[n] = expected.get(n, 0) + part
                p.grad = None
    found = {}
    for accumulation in ("float32", "exact"):
        FullBatchClosure(
            model,
            nn.functional.cross_entropy,
            share,
            accumulation=accumulation,
            backward=True,
            process_group=dist.group.WORLD,
        )()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found[accumulation] = {n: whole(g).clone() for n, g in grads.items() if g is not None}
    return {"expected": expected, **found}


def accumulated(mesh: Any, rank: int) -> dict[str, Any]:
    """GradientAccumulator.backward, whose losses are scaled, and .chunk, for equal weights."""
    found: dict[str, Any] = {}
    model, share = sharded(mesh), chunks()[rank :: mesh.size()]
    accumulator = GradientAccumulator(model.parameters(), process_group=dist.group.WORLD)
    for x, y in share:
        accumulator.backward(nn.functional.cross_entropy(model(x), y), weight=len(x))
    accumulator.to_grad()
    grads = {n: p.grad for n, p in model.named_parameters()}
    found["backward"] = {n: whole(g).clone() for n, g in grads.items() if g is not None}
    found["weight"] = accumulator.total_weight
    for x, y in share:
        with accumulator.chunk(weight=3):
            nn.functional.cross_entropy(model(x), y).backward()
    accumulator.to_grad()
    grads = {n: p.grad for n, p in model.named_parameters()}
    found["chunk"] = {n: whole(g).clone() for n, g in grads.items() if g is not None}
    found["uneven"] = caught(lambda: accumulator.chunk(weight=1 + rank).__enter__())
    found["negative"] = caught(lambda: accumulator.chunk(weight=-rank).__enter__())
    return found


def stale(mesh: Any) -> dict[str, Any]:
    """Parameters that stay gathered after a pass: the shift has to reach them all the same."""
    model = sharded(mesh, torch.float64, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    return train(model, chunks(torch.float64), "central", 2, backward=True)


class Tied(nn.Module):
    """The embedding is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.middle.requires_grad_(False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(x))).mean(1))


def words() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randint(0, 11, (n, 5), generator=generator),
            torch.randint(0, 11, (n,), generator=generator),
        )
        for n in (3, 4, 5, 2)
    ]


def thaw(model: nn.Module, share: Any, **options: Any) -> dict[str, Any]:
    """Two steps, the second with a layer that was frozen before."""
    frozen = train(model, share, "forward", 1, **options)
    model.middle.requires_grad_(True)
    return {"frozen": frozen["params"], "params": train(model, share, "forward", 1, **options)}


def tied(mesh: Any, rank: int) -> dict[str, Any]:
    """Shared and frozen parameters, and shards that lie on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model, policy = Tied(), CPUOffloadPolicy(pin_memory=False)
    fully_shard(model.middle, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    return thaw(model, words()[rank::2], backward=True, process_group=dist.group.WORLD)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    # Adam would make large steps of a bias before BatchNorm, whose gradient is 0 but for rounding.
    layers = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def gaps() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Chunk 1, the first of rank 1, has no target that counts."""
    found = chunks(torch.float64)[:4]
    found[1][1].fill_(-1)
    return found


def masked_mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """NaN, with a gradient of NaN, for a chunk without targets."""
    counts = (target >= 0).double()
    losses = nn.functional.cross_entropy(output, target.clamp(min=0), reduction="none")
    return (losses * counts).sum() / counts.sum()


def adam(model: nn.Module, share: Any, **options: Any) -> dict[str, Any]:
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=0.1), []
    closure = FullBatchClosure(
        model,
        masked_mean,
        share,
        weight=lambda chunk: (chunk[1] >= 0).sum(),
        observe=lambda output, target: seen.append(len(target)),
        **options,
    )
    losses = [optimizer.step(closure) for _ in range(2)]
    held = [*model.named_parameters(), *model.named_buffers()]
    return {"losses": losses, "state": {n: whole(t.detach()) for n, t in held}, "seen": seen}


def uncounted(mesh: Any, rank: int) -> dict[str, Any]:
    """A chunk of weight 0 on one rank alone, whose loss is NaN, and BatchNorm."""
    from torch.distributed.fsdp import fully_shard

    def model() -> nn.Module:
        found = normalised()
        fully_shard(found[0], mesh=mesh)
        return fully_shard(found, mesh=mesh)

    share, group = gaps()[rank::2], dist.group.WORLD
    found = adam(model(), share, backward=True, process_group=group)
    other = model()
    accumulator = GradientAccumulator(other.parameters(), process_group=group)
    for x, y in share:
        accumulator.backward(masked_mean(other(x), y), weight=(y >= 0).sum())
    return found | {"mean": [whole(g) for g in accumulator.mean()]}


def ragged(model: nn.Module, rank: int) -> None:
    """Add each rank's own chunk, but tell the accumulator of no group."""
    accumulator, (x, y) = GradientAccumulator(model.parameters()), chunks()[rank]
    accumulator.backward(nn.functional.cross_entropy(model(x), y), weight=len(x))
    accumulator.to_grad()


def refused(mesh: Any, rank: int) -> dict[str, tuple[str, str]]:
    loss_fn, everyone = nn.functional.cross_entropy, dist.group.WORLD
    model = sharded(mesh)
    found = {"functional": caught(lambda: FullBatchClosure(model, loss_fn, chunks()))}

    def call(share: Any, **options: Any) -> tuple[str, str]:
        return caught(FullBatchClosure(model, loss_fn, share, backward=True, **options))

    found["lockstep"] = call(chunks()[: 2 + rank], process_group=everyone)
    found["lockstep, same"] = call(chunks()[: 2 + rank])
    found["other chunks"] = call(chunks()[rank:] + chunks()[:rank])
    found["weights"] = call(chunks(), weight=lambda chunk: 1 + rank)
    found["accumulator"] = caught(lambda: ragged(model, rank))

    def failing() -> Iterator[Any]:
        yield from chunks()[:2]
        if rank == 1:
            raise ZeroDivisionError("a fault")
        yield chunks()[2]

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            return failing()

    found["failing"] = call(Failing(), process_group=everyone)
    found["failing, same"] = call(Failing())

    def fail_on_one() -> None:
        if rank == 1:
            raise ZeroDivisionError("a fault")

    share = chunks()[rank :: mesh.size()]
    found["failing before"] = call(share, process_group=everyone, on_pass_start=fail_on_one)
    found["after"] = call(share, process_group=everyone)
    found |= misused(mesh, model, share)
    return found


def misused(mesh: Any, model: Any, share: Any) -> dict[str, tuple[str, str]]:
    """Settings of FSDP2 under which gradients are no means, and shards that are not there yet."""
    from torch.distributed.fsdp import fully_shard

    loss_fn, options = nn.functional.cross_entropy, {"process_group": dist.group.WORLD}
    x, y = share[0]
    accumulator = GradientAccumulator(model.parameters(), **options)
    closure = FullBatchClosure(model, loss_fn, share, backward=True, **options)

    def accumulate() -> None:
        accumulator.backward(loss_fn(model(x), y), len(x))

    found = {}
    model.up.set_gradient_divide_factor(3.0)
    found["factor"], found["factor, accumulator"] = caught(closure), caught(accumulate)
    model.up.set_gradient_divide_factor(2.0)
    model.set_requires_gradient_sync(False)
    found["sync"], found["sync, accumulator"] = caught(closure), caught(accumulate)
    with torch.no_grad():
        model(x)  # leaves the parameters of the root gathered
    found["gathered"] = caught(lambda: GradientAccumulator(model.parameters(), **options))
    late = Model()
    closure = FullBatchClosure(late, loss_fn, share, backward=True, **options)
    fully_shard(late, mesh=mesh)
    found["late"] = caught(closure)
    return found


def resumable(mesh: Any) -> tuple[nn.Module, FullBatchGD, FullBatchClosure]:
    model = sharded(mesh) if mesh else Model()
    model.never.requires_grad_(False)  # torch's checkpoints expect state of what is trained
    optimizer = FullBatchGD(model.parameters(), lr=0.2, momentum=0.9, max_norm=0.2)
    closure = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        chunks(),
        penalty=GradientPenalty(),  # its coefficient follows the learning rate
        optimizer=optimizer,
        accumulation="exact",
        backward=mesh is not None,
    )
    return model, optimizer, closure


def state_of(model: nn.Module, optimizer: FullBatchGD, closure: FullBatchClosure) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict

    return {
        "model": state_dict.get_model_state_dict(model),
        "optimizer": state_dict.get_optimizer_state_dict(model, optimizer),
        "flat": state_dict.get_optimizer_state_dict(model, optimizer, options=flat()),
        "closure": closure.state_dict(),
    }


def flat() -> Any:
    """The options under which states have keys such as state.up.weight.momentum_buffer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def killed(rank: int, world: int, folder: Path) -> None:
    """Save a checkpoint after two steps, and die in the third."""
    from torch.distributed import checkpoint

    model, optimizer, closure = resumable(ranks.mesh(world))
    for _ in range(2):
        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] /= 2
    checkpoint.save(state_of(model, optimizer, closure), checkpoint_id=folder / "checkpoint")

    def fail_on_one(*_: Any) -> None:
        if rank == 1:
            raise ZeroDivisionError("a fault")

    call = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        chunks()[rank::2],
        observe=fail_on_one,
        backward=True,
        process_group=dist.group.WORLD,
    )
    (folder / f"error of {rank}").write_text(caught(call)[0])
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Go on from it with another number of processes."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_model_state_dict as set_model
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_optimizer

    model, optimizer, closure = resumable(ranks.mesh(world))
    state = state_of(model, optimizer, closure)
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    set_model(model, state["model"])
    set_optimizer(model, optimizer, state["optimizer"])
    momentum = momenta(model, optimizer)
    set_optimizer(model, optimizer, state["flat"], options=flat())
    closure.load_state_dict(state["closure"])
    return {
        "flat": bits(momenta(model, optimizer)) == bits(momentum),
        "losses": [optimizer.step(closure) for _ in range(2)],
        "params": {n: whole(p).clone() for n, p in model.named_parameters()},
    }


def momenta(model: nn.Module, optimizer: FullBatchGD) -> list[torch.Tensor]:
    states = [optimizer.state[p] for p in model.parameters() if p.requires_grad]
    return [state["momentum_buffer"].to_local().clone() for state in states]


def older(rank: int) -> dict[str, Any]:
    """FSDP1 and ZeroRedundancyOptimizer."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found: dict[str, Any] = {}
    (x, y), loss_fn, everyone = chunks()[0], nn.functional.cross_entropy, dist.group.WORLD
    for flat in (True, False):
        model = FullyShardedDataParallel(
            Model(), use_orig_params=not flat, device_id=torch.device("cpu")
        )
        loss_fn(model(x), y).backward()
        params = list(model.parameters())
        calls: dict[str, Callable[[], Any]] = {
            "clip": lambda p=params: clip_grad_norm_(p, 1.0),
            "max_norm": lambda p=params: FullBatchGD(p, lr=0.1, max_norm=1.0),
            "closure": lambda m=model: FullBatchClosure(
                m, loss_fn, chunks(), backward=True, process_group=everyone
            ),
            "accumulator": lambda p=params: GradientAccumulator(p, process_group=everyone),
        }
        found |= {f"{name} {flat}": caught(call) for name, call in calls.items()}
        optimizer = FullBatchGD(params, lr=0.1)
        optimizer.step()
        found[f"norm {flat}"] = optimizer.last_grad_norm
    model = Model()
    loss_fn(model(x), y).backward()

    def zero(**options: Any) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(model.parameters(), FullBatchGD, lr=0.1, **options)

    found["zero"] = caught(lambda: zero(max_norm=1.0))
    zero(momentum=0.9).step()
    found["params"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found


def memory(mesh: Any) -> dict[str, float]:
    """The most memory of a call beyond what is there before, in sizes of the whole gradient."""
    from torch.distributed.fsdp import fully_shard

    chunk_addition.BATCH_BYTES = 2**14  # far less than the model, as in use
    found = {}
    for name, (penalty, options) in MEMORY.items():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x = torch.randn(2, WIDTH)
        with ranks.LiveBytes() as live:
            FullBatchClosure(
                model,
                nn.functional.mse_loss,
                [(x, x)] * (2 if name == "plain" else 1),
                penalty=PENALTIES[penalty],
                backward=True,
                **options | ({"process_group": dist.group.WORLD} if "own" in name else {}),
            )()
        found[name] = live.peak / (4 * LAYERS * (WIDTH + 1) * WIDTH)
    return found


def hybrid(rank: int) -> Any:
    """HSDP: two replicas of two shards."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    options = {"backward": True, "process_group": dist.group.WORLD}
    found = {
        name: train(
            sharded(mesh), chunks()[rank::4], penalty, 1, accumulation=accumulation, **options
        )
        for name, penalty, accumulation in (
            ("forward", "forward", "float32"),
            ("exact sums", "plain", "exact"),
        )
    }
    shards = mesh.get_group("shards")
    found["part"] = caught(
        lambda: FullBatchClosure(
            sharded(mesh),
            nn.functional.cross_entropy,
            chunks(),
            **options | {"process_group": shards},
        )()
    )
    return found


def two_dimensional(rank: int) -> dict[str, Any]:
    """Data parallelism (FSDP2) beside tensor parallelism: two processes each."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    group, place = mesh.get_group("data"), mesh.get_local_rank("data")
    share = chunks()[:4][place::2]
    options = {"backward": True, "process_group": group}
    wide = chunks(torch.float64)[:4][place::2]
    plain = Model()
    parallelize(plain, mesh["tensor"])
    return {
        "not given": caught(lambda: FullBatchClosure(plain, nn.functional.cross_entropy, share)),
        "beside": train(plain, share, "plain", 1, process_group=group),
        "own": train(sharded(mesh, torch.float64), wide, "forward", 2, **options),
        "same": train(sharded(mesh), chunks()[:1], "central", 1, backward=True),
        "exact": [
            train(sharded(mesh), order, "plain", 1, accumulation="exact", **options)
            for order in (share, share[::-1])
        ],
        **refused_groups(mesh, share),
    }


def refused_groups(mesh: Any, share: Any) -> dict[str, tuple[str, str]]:
    """Groups with processes that share the shards of a tensor-parallel layer."""
    model, found = sharded(mesh), {}
    for name, group in {"tensor": mesh.get_group("tensor"), "all": dist.group.WORLD}.items():
        options = {"process_group": group}
        found[f"closure, {name}"] = caught(
            lambda o=options: FullBatchClosure(
                model, nn.functional.cross_entropy, share, backward=True, **o
            )
        )
        found[f"accumulator, {name}"] = caught(
            lambda o=options: GradientAccumulator(model.parameters(), **o)
        )
    everywhere, some = sharded(ranks.mesh(4)), {"process_group": mesh.get_group("data")}
    found["some"] = caught(lambda: GradientAccumulator(everywhere.parameters(), **some))
    return found


def cases(rank: int, mesh: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    for world, name in TABLE:
        if world == mesh.size():
            yield name, lambda name=name: trained(mesh, rank, name)
    if mesh.size() == 2:
        yield "mixed precision", lambda: mixed_precision(mesh, rank)
        yield "accumulator", lambda: accumulated(mesh, rank)
        yield "stale", lambda: stale(mesh)
        yield "tied", lambda: tied(mesh, rank)
        yield "uncounted", lambda: uncounted(mesh, rank)
        yield "refused", lambda: refused(mesh, rank)
        yield "older", lambda: older(rank)
    else:
        yield "memory", lambda: memory(mesh)
        yield "hybrid", lambda: hybrid(rank)
        yield "two-dimensional", lambda: two_dimensional(rank)


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    return {name: case() for name, case in cases(rank, ranks.mesh(world))}


# --- what they found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each job found."""
    return ranks.run_all(work, WORLDS, tmp_path_factory.mktemp("ranks"))


def on_all(found: dict[int, list[dict[str, Any]]], world: int, case: str) -> list[Any]:
    return [one[case] for one in found[world]]


def close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def alone(world: int, name: str) -> Any:
    """What one process finds that visits all chunks, with a penalty or norms the joint ones."""
    data, penalty, dtype, steps, options = TRAIN[name]
    apart = "same" in data or (penalty == "plain" and not options.get("chunk_norms"))
    every = visited(data, dtype) if apart else joint(visited(data, dtype), world)
    return train(Model(dtype), every, penalty, steps, **options)


@pytest.mark.parametrize(("world", "name"), TABLE)
def test_training_is_that_of_one_process(found, world, name):
    expected, results = alone(world, name), on_all(found, world, name)
    tolerance = 1e-10 if TRAIN[name][2] == torch.float64 else 1e-6
    for key, value in expected.items():
        assert all(bits(one[key]) == bits(results[0][key]) for one in results), key
        if key == "grads":
            missing = {n for n, g in value.items() if g is None}
            assert missing == {"never"} == {n for n, g in results[0][key].items() if g is None}
            value, results[0][key] = (
                {n: g for n, g in held.items() if g is not None}
                for held in (value, results[0][key])
            )
        if None not in value:
            close(results[0][key], value, tolerance)


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_exact_sums_have_the_bits_of_one_process(found, world, name):
    expected = alone(world, name)
    for one in on_all(found, world, name):
        for key in ("loss", "params", "buffers"):
            assert bits(one[key]) == bits(expected[key]), key


def test_mixed_precision_reduces_what_fsdp_makes(found):
    for one in on_all(found, 2, "mixed precision"):
        close(one["float32"], one["expected"])
        # Losses are not scaled there, and bf16 rounds otherwise.
        close(one["exact"], one["expected"], 1e-3)


def test_an_accumulator_weighs_the_losses(found):
    model = Model()
    accumulator = GradientAccumulator([p for n, p in model.named_parameters() if n != "never"])
    for weigh in (len, lambda x: 1):
        accumulator.reset()
        for x, y in chunks():
            loss = nn.functional.cross_entropy(model(x), y)
            accumulator.add(torch.autograd.grad(loss, accumulator.params), weigh(x))
        for one in on_all(found, 2, "accumulator"):
            grads = one["backward" if weigh is len else "chunk"]
            close(list(grads.values()), accumulator.mean())
    for rank, one in enumerate(on_all(found, 2, "accumulator")):
        assert one["weight"] == sum(len(x) for x, _ in chunks())
        assert one["uneven"][0] == "ValueError" and "backward(loss, weight)" in one["uneven"][1]
        assert one["negative"][0] == ("ValueError" if rank else "PeerError")


def test_a_shift_reaches_parameters_that_stay_gathered(found):
    expected = train(Model(torch.float64), chunks(torch.float64), "central", 2)
    for one in on_all(found, 2, "stale"):
        close(one["params"], expected["params"], 1e-10)


REFUSED = {
    "accumulator": ("ValueError", "have added chunks of different weights"),
    "functional": ("ValueError", "backward=True"),
    "lockstep": ("ValueError", "different numbers of chunks"),
    "lockstep, same": ("ValueError", "visit different chunks"),
    "other chunks": ("ValueError", "process_group="),
    "weights": ("ValueError", "of the same weight"),
    "factor": ("ValueError", "set_gradient_divide_factor"),
    "factor, accumulator": ("ValueError", "set_gradient_divide_factor"),
    "sync": ("ValueError", "set_requires_gradient_sync"),
    "sync, accumulator": ("ValueError", "set_requires_gradient_sync"),
    "gathered": ("ValueError", "model.reshard()"),
    "late": ("ValueError", "fully_shard was called"),
    "after": ("none", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_all(found, case):
    results = [one[case] for one in on_all(found, 2, "refused")]
    kind, text = REFUSED[case]
    assert results[0] == results[1] and results[0][0] == kind and text in results[0][1]


@pytest.mark.parametrize("case", ["failing", "failing, same", "failing before"])
def test_a_process_that_fails_between_chunks_lets_none_wait(found, case):
    first, second = (one[case] for one in on_all(found, 2, "refused"))
    assert second == ("ZeroDivisionError", "a fault")
    assert first == ("PeerError", "process 1 failed: ZeroDivisionError: a fault")


def test_shared_frozen_and_offloaded_parameters(found):
    expected = thaw(Tied(), joint(words(), 2))
    for one in on_all(found, 2, "tied"):
        close(one["frozen"], expected["frozen"], 1e-10)
        close(one["params"]["params"], expected["params"]["params"], 1e-10)


def test_a_chunk_of_weight_zero_runs_without_a_trace(found):
    expected = adam(normalised(), gaps())
    seen = expected.pop("seen")
    model = normalised()
    FullBatchClosure(model, masked_mean, gaps(), weight=lambda c: (c[1] >= 0).sum())()
    for rank, one in enumerate(on_all(found, 2, "uncounted")):
        assert one["seen"] == [n for k, n in enumerate(seen) if (k % 3 == 2) == rank]
        for key, value in expected.items():
            close(one[key], value, 1e-10)
        close(one["mean"], [p.grad for p in model.parameters()], 1e-10)


def test_data_and_tensor_parallelism_on_one_mesh(found):
    wide = joint(chunks(torch.float64)[:4], 2)
    own = train(Model(torch.float64), wide, "forward", 2)
    same = train(Model(), chunks()[:1], "central", 1)
    exact = train(Model(), chunks()[:4], "plain", 1, accumulation="exact")
    results = on_all(found, 4, "two-dimensional")
    for one in results:
        for key in ("loss", "norm", "square", "params"):
            close(one["own"][key], own[key], 1e-10)
        close(one["same"]["params"], same["params"])
        close(one["exact"][0]["params"], exact["params"])
        close(one["beside"]["params"], exact["params"])
        assert one["not given"][0] == "ValueError" and "get_group()" in one["not given"][1]
        for again in one["exact"]:  # in any order of chunks
            assert bits(again["params"]) == bits(results[0]["exact"][0]["params"])
        for case in ("closure, tensor", "closure, all", "accumulator, tensor", "accumulator, all"):
            assert one[case][0] == "ValueError", case
            assert "share a tensor-parallel parameter" in one[case][1]
        assert one["some"][0] == "ValueError" and "lacks processes" in one["some"][1]


def test_hybrid_sharding(found):
    forward = train(Model(), joint(chunks(), 4), "forward", 1)
    exact = train(Model(), chunks(), "plain", 1, accumulation="exact")
    for one in on_all(found, 4, "hybrid"):
        close(one["forward"]["params"], forward["params"])
        assert bits(one["exact sums"]["params"]) == bits(exact["params"])
        assert one["part"] == ("none", "")


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("case", ["clip", "max_norm", "closure", "accumulator"])
def test_fsdp1_is_refused_where_it_would_be_wrong(found, case, flat):
    for one in on_all(found, 2, "older"):
        kind, text = one[f"{case} {flat}"]
        assert kind == "ValueError" and "FSDP1" in text and "fully_shard" in text
        assert one[f"norm {flat}"] is None


def test_a_zero_redundancy_optimizer_may_not_clip(found):
    model, (x, y) = Model(), chunks()[0]
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    for one in on_all(found, 2, "older"):
        assert one["zero"][0] == "ValueError" and "ZeroRedundancyOptimizer" in one["zero"][1]
        close(one["params"], dict(model.named_parameters()))


def test_a_killed_job_goes_on_with_another_number_of_processes(tmp_path):
    ranks.run(killed, 2, tmp_path, is_killed=True)
    # In the middle of a chunk the one that fails raises at once; the others lose the connection.
    errors = [(tmp_path / f"error of {rank}").read_text() for rank in range(2)]
    assert errors[1] == "ZeroDivisionError" and errors[0] in ("RuntimeError", "PeerError")
    results = ranks.run(resumed, 3, tmp_path)
    model, optimizer, closure = resumable(None)
    losses = []
    for step in range(4):
        losses.append(optimizer.step(closure))
        optimizer.param_groups[0]["lr"] /= 2 if step < 2 else 1
    for one in results:
        assert one["flat"] and bits(one["losses"]) == bits(losses[2:])
        assert bits(one["params"]) == bits(dict(model.named_parameters()))


def test_no_process_ever_holds_the_whole_gradient(found):
    """A process holds a quarter of everything, and all of a few layers for a moment."""
    shards = {"plain": 1, "forward": 5, "own, exact": 4}
    for one in on_all(found, 4, "memory"):
        for name, count in shards.items():
            assert one[name] < count / 4 + 8 / LAYERS, name
