"""Sharded parameters: tensor parallelism, and mixed with plain ones, against one process.

Jobs of two and of four processes are started once; the tests read what each rank found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
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
from fbopt._engine.backward import taking
from fbopt._sharding import working_device

pytestmark = pytest.mark.usefixtures("one_thread")

WORLDS = (2, 4)
SIZES = (8, 4, 12)  # samples in the chunks
PENALTIES: dict[str, GradientPenalty | SharpnessAware | None] = {
    "plain": None,
    "forward": GradientPenalty(coefficient=0.1),
    "central": GradientPenalty(coefficient=0.1, method="central"),
    "asam": SharpnessAware(rho=0.3, adaptive=True),
    "full asam": SharpnessAware(rho=0.3, adaptive=True, scope="full", method="central"),
    "full": GradientPenalty(coefficient=0.1, full_strength=1.0),
}
NORMS = (2.0, 1.0, 3.0, float("inf"))


class Model(nn.Module):
    """A perceptron; some of its layers are sharded."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.last = nn.Linear(16, 3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("placed", torch.ones(3))  # beside the model's layers a DTensor
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.last(self.down(torch.tanh(self.up(self.norm(self.first(x))))))


def tensor_parallel(mesh: Any, dtype: torch.dtype = torch.float32, plan: str = "columns") -> Model:
    """Columns: `up` and `down` are DTensors. Sequence: `norm`, too, with Partial gradients."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor import parallel as tp

    plans: dict[str, dict[str, Any]] = {
        "columns": {"up": tp.ColwiseParallel(), "down": tp.RowwiseParallel()},
        "sequence": {
            "first": tp.RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False
            ),
            "norm": tp.SequenceParallel(sequence_dim=0),
            "up": tp.ColwiseParallel(input_layouts=Shard(0)),
            "down": tp.RowwiseParallel(),
        },
    }
    model = tp.parallelize_module(Model(dtype), mesh, plans[plan])
    model.placed = distribute_tensor(model.placed, mesh, [Replicate()])
    return model


def chunks(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in SIZES
    ]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def train(model: nn.Module, penalty: str, steps: int = 3, **options: Any) -> dict[str, Any]:
    """Clipped steps with momentum."""
    dtype = next(model.parameters()).dtype
    optimizer = FullBatchGD(model.parameters(), lr=0.2, momentum=0.9, max_norm=0.2)
    closure = FullBatchClosure(
        model,
        nn.functional.cross_entropy,
        chunks(dtype),
        penalty=PENALTIES[penalty],
        optimizer=optimizer,
        **options,
    )
    found: dict[str, Any] = {"loss": [], "norm": [], "square": []}
    for _ in range(steps):
        found["loss"].append(optimizer.step(closure))
        found["norm"].append(optimizer.last_grad_norm)
        found["square"].append(closure.mean_sqnorm)
    found["grads"] = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    found["params"] = parameters(model)
    state = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    found["buffers"] = [whole(b).clone() for b in state]
    found["kinds"] = [type(t).__name__ for p in model.parameters() for t in (p.data, p.grad)]
    found["alike"] = [
        type(b) is type(p.data) for b, p in zip(state, model.parameters(), strict=True)
    ]
    return found


# Penalty, dtype, steps and arguments of the closure; with 20 steps in float32 as in everyday use.
TRAIN: dict[str, tuple[str, torch.dtype, int, dict[str, Any]]] = {
    "plain": ("plain", torch.float64, 2, {"chunk_norms": True}),
    "exact sums": ("forward", torch.float64, 2, {"accumulation": "exact"}),
    "central": ("central", torch.float64, 2, {}),
    "chunks clipped": ("forward", torch.float64, 2, {"chunk_max_norm": 0.3}),
    "many steps": ("forward", torch.float32, 20, {}),
    "adaptive": ("asam", torch.float64, 2, {}),
    "adaptive, by all chunks": ("full asam", torch.float64, 2, {"accumulation": "exact"}),
    "by all chunks": ("full", torch.float64, 2, {}),
}
FOUR = [("columns", "central"), ("sequence", "exact sums"), ("sequence", "many steps")]
TABLE = [
    (world, plan, name)
    for world in WORLDS
    for plan in ("columns", "sequence")
    for name in TRAIN
    if (world == 4) == ((plan, name) in FOUR)
]


# --- what the processes do ------------------------------------------------------------------------


def spread(mesh: Any) -> list[Any]:
    """Parameters placed in every way, with their gradients, one of them a Partial sum."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    params = []
    placements = Shard(0), Shard(1), Replicate(), None, Replicate(), Shard(0)
    for i, (tensor, placement) in enumerate(zip(loose(), placements, strict=True)):
        if placement is None:
            p = nn.Parameter(tensor.detach().clone())
            p.grad = tensor.grad.clone()
        else:
            p = nn.Parameter(distribute_tensor(tensor.detach(), mesh, [placement]))
            p.grad = distribute_tensor(tensor.grad, mesh, [placement])
        if i == 4:
            piece = tensor.grad / mesh.size() + (mesh.get_local_rank() - (mesh.size() - 1) / 2)
            p.grad = DTensor.from_local(piece, mesh, [Partial()])
        params.append(p)
    return params


def loose() -> list[nn.Parameter]:
    """The same as plain parameters; the last has fewer rows than some meshes processes."""
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(s)) for s in ((9, 3), (4, 8), (5,), (7,), (2, 2), (2, 5))]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def clipped(params: list[Any], norm_type: float) -> dict[str, Any]:
    """The clip, and a step that clips by the same norm."""
    optimizer = FullBatchGD(params, lr=0.1, momentum=0.5, max_norm=0.7, norm_type=norm_type)
    optimizer.step()
    stepped = [whole(p.detach()).clone() for p in params]
    norm = clip_grad_norm_(params, 0.7, norm_type)
    return {
        "norms": [norm, optimizer.last_grad_norm],
        "kinds": {type(norm).__name__, type(optimizer.last_grad_norm).__name__},
        "grads": [whole(p.grad).clone() for p in params],
        "params": stepped,
    }


def accumulated(params: list[Any], accumulation: str) -> list[torch.Tensor]:
    """A weighted mean of two gradients."""
    accumulator = GradientAccumulator(params, accumulation)
    grads = [p.grad for p in params]
    for _ in accumulator.passes():
        accumulator.add(grads, weight=3)
        accumulator.add([g * 2 for g in grads], weight=5)
    return [whole(g).clone() for g in accumulator.mean()]


def not_finite(mesh: Any) -> dict[str, Any]:
    """A NaN in the first shard of one parameter."""
    found: dict[str, Any] = {}
    params = spread(mesh)
    if mesh.get_local_rank() == 0:
        params[0].grad.to_local()[0, 0] = float("nan")
    optimizer = FullBatchGD(params, lr=0.1, max_norm=1.0, error_if_nonfinite=True)
    before = bits([p.detach().to_local() for p in params if hasattr(p, "to_local")])
    found["step"] = caught(optimizer.step)
    found["clip"] = caught(lambda: clip_grad_norm_(params, 1.0, error_if_nonfinite=True))
    after = bits([p.detach().to_local() for p in params if hasattr(p, "to_local")])
    found["unchanged"] = before == after
    found["maximum"] = clip_grad_norm_(params, float("inf"), float("inf"))
    found["mean"] = accumulated(params, "exact")[0]
    return found


def failing(mesh: Any) -> dict[str, Any]:
    """A perturbed pass that raises leaves parameters as they were, bit for bit."""
    model = tensor_parallel(mesh)
    calls = []

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("a fault")
        return nn.functional.cross_entropy(output, target)

    closure = FullBatchClosure(model, loss_fn, chunks(), penalty=PENALTIES["central"])
    shards = [p.detach().to_local() for p in model.parameters() if hasattr(p, "to_local")]
    before = bits(shards)
    error = caught(closure)
    return {"error": error, "unchanged": bits(shards) == before}


def refused(mesh: Any) -> dict[str, tuple[str, str]]:
    from torch.distributed.tensor import distribute_module

    params = spread(mesh)
    accumulator = GradientAccumulator(params)
    grads = [p.grad for p in params]
    found = {"plain": caught(lambda: accumulator.add([loose()[0].grad, *grads[1:]]))}
    exact = GradientPenalty(coefficient=0.1, method="exact")
    model = tensor_parallel(mesh)
    found["exact"] = caught(
        lambda: FullBatchClosure(model, nn.functional.cross_entropy, chunks(), penalty=exact)
    )
    optimizer = FullBatchGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    for p in params:
        optimizer.state[p]["momentum_buffer"] = whole(optimizer.state[p]["momentum_buffer"])
    found["state"] = caught(optimizer.step)
    norm = distribute_module(nn.BatchNorm1d(6), mesh)
    found["statistics"] = caught(
        lambda: FullBatchClosure(norm, nn.functional.cross_entropy, chunks())
    )
    return found


def cases(mesh: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    for world, plan, name in TABLE:
        if world == mesh.size():
            penalty, dtype, steps, options = TRAIN[name]
            yield (
                f"{plan} {name}",
                lambda p=penalty, d=dtype, s=steps, o=options, plan=plan: train(
                    tensor_parallel(mesh, d, plan), p, s, **o
                ),
            )
    for norm_type in NORMS:
        yield f"clip {norm_type}", lambda n=norm_type: clipped(spread(mesh), n)
    for accumulation in ("float32", "exact"):
        yield f"sum {accumulation}", lambda a=accumulation: accumulated(spread(mesh), a)
    yield "not finite", lambda: not_finite(mesh)
    yield "failing", lambda: failing(mesh)
    if mesh.size() == 2:
        yield "refused", lambda: refused(mesh)


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    return {name: case() for name, case in cases(ranks.mesh(world))}


# --- what they found ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each job found."""
    return ranks.run_all(work, WORLDS, tmp_path_factory.mktemp("ranks"))


def on_all(found: dict[int, list[dict[str, Any]]], world: int, case: str) -> list[Any]:
    return [one[case] for one in found[world]]


def close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("world", "plan", "name"), TABLE)
def test_tensor_parallel_training_is_that_of_one_process(found, world, plan, name):
    penalty, dtype, steps, options = TRAIN[name]
    expected = train(Model(dtype), penalty, steps, **options)
    results = on_all(found, world, f"{plan} {name}")
    for key in ("loss", "norm", "square", "grads", "params", "buffers"):
        assert all(bits(one[key]) == bits(results[0][key]) for one in results), key
        close(results[0][key], expected[key], 1e-6 if dtype == torch.float32 else 1e-10)
    assert results[0]["kinds"].count("DTensor") == 2 * (4 if plan == "columns" else 8)
    assert all(results[0]["alike"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_that_of_the_whole_gradient(found, world, norm_type):
    expected = clipped(loose(), norm_type)
    for one in on_all(found, world, f"clip {norm_type}"):
        assert one["kinds"] == {"Tensor"}
        for key in ("norms", "grads", "params"):
            close(one[key], expected[key])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_sums_of_shards_are_those_of_one_process(found, world, accumulation):
    expected = accumulated(loose(), accumulation)
    for one in on_all(found, world, f"sum {accumulation}"):
        close(one, expected)
        # All but the Partial gradient, which is a sum in floating point before.
        assert bits([g for i, g in enumerate(one) if i != 4]) == bits(
            [g for i, g in enumerate(expected) if i != 4]
        )


@pytest.mark.parametrize("world", WORLDS)
def test_a_shard_that_is_not_finite_stops_all(found, world):
    for one in on_all(found, world, "not finite"):
        for call in ("step", "clip"):
            assert one[call][0] == "RuntimeError" and "norm is nan" in one[call][1]
        assert one["unchanged"] and one["maximum"].isnan()
        assert one["mean"].isnan().all()


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_in_a_perturbed_pass_leaves_the_shards(found, world):
    for one in on_all(found, world, "failing"):
        assert one["error"] == ("ZeroDivisionError", "a fault") and one["unchanged"]


def test_what_cannot_work_is_refused(found):
    for one in on_all(found, 2, "refused"):
        assert one["plain"][0] == "TypeError" and "parameter 0 is a plain tensor" in one["plain"][1]
        assert one["exact"][0] == "RuntimeError" and "method='forward'" in one["exact"][1]
        assert one["state"][0] == "TypeError" and "set_optimizer_state_dict" in one["state"][1]
        assert one["statistics"][0] == "TypeError" and "plain tensors" in one["statistics"][1]


def test_offloaded_gradients_are_waited_for(monkeypatch):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    mesh, shard = DeviceMesh("cuda", torch.arange(1), _init_backend=False, _rank=0), torch.ones(2)
    meta = TensorMeta(shard.shape, shard.stride(), shard.dtype)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
    param = nn.Parameter(DTensor(shard, spec, requires_grad=False))
    with taking([param], lambda index, grad: events.append("take")):
        param.grad = DTensor(shard, spec, requires_grad=False)
        for hook in list(param._post_accumulate_grad_hooks.values()):  # as FSDP2 calls them
            hook(param)
    assert events == ["wait", "take"]
    assert working_device(param) == torch.device("cuda", 0)
    assert working_device(shard) == torch.device("cpu")
