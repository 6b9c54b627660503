"""Accelerate with right weights: prepared models, optimizers, loaders; one process, and two."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import trainer_ranks
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from conftest import bits

from benchmarks import tiny_language as tiny
from fbopt import FullBatchGD, GradientPenalty
from fbopt.integrations.accelerate import accumulator, closure

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = tiny.sequences(26)
SIZES = (4, 9, 2, 11)  # of micro-batches


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget the state that all accelerators of a process share, also of other files' tests."""
    forget()
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


def micro_batches(sizes: Any = SIZES) -> list[list[Any]]:
    rest = iter(DATA)
    return [[next(rest) for _ in range(size)] for size in sizes]


def prepared(
    name: str = "gpt2", scale: float | None = None, **options: Any
) -> tuple[Accelerator, nn.Module, Any]:
    """Return prepared things; with a loss scale as under fp16, which is refused on the CPU."""
    accelerator = Accelerator(cpu=True, **options)
    model = accelerator.prepare(tiny.language_model(name))
    if scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    optimizer = torch.optim.SGD(model.parameters(), lr=tiny.LR)
    return accelerator, model, accelerator.prepare(optimizer)


def one_step(accelerator: Accelerator, model: nn.Module, optimizer: Any, sums: Any) -> None:
    """Step on all micro-batches, as a loop for Accelerate is written."""
    for samples in micro_batches():
        batch = tiny.collate(samples)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            with sums.chunk(weight=tiny.targets(batch)):
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                sums.to_grad()
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_a_step_is_that_of_one_batch(name, scale):
    accelerator, model, optimizer = prepared(name, scale, gradient_accumulation_steps=len(SIZES))
    expected = tiny.one_batch(model, [DATA] * 3, max_norm=0.5)
    sums = accumulator(accelerator, model)
    for _ in range(3):
        one_step(accelerator, model, optimizer, sums)
    assert tiny.distance(model, expected) < 1e-6
    assert accelerator.gradient_accumulation_steps == len(SIZES)


def test_an_overflow_in_one_chunk_skips_the_step():
    accelerator, model, optimizer = prepared(scale=8.0)
    sums, before = accumulator(accelerator, model), bits(model)
    for index, samples in enumerate(micro_batches()):
        with sums.chunk(weight=len(samples)):
            loss = model(**tiny.collate(samples)).loss
            accelerator.backward(loss * torch.inf if index == 1 else loss)
    sums.to_grad()
    optimizer.step()
    assert bits(model) == before and accelerator.optimizer_step_was_skipped
    assert accelerator.scaler.get_scale() == 4


def chunk_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the weighted mean over the micro-batches, added in float64."""
    total, params = 0, list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for samples in micro_batches():
        batch = tiny.collate(samples)
        grads = torch.autograd.grad(model(**batch).loss, params)
        for s, g in zip(sums, grads, strict=True):
            s += tiny.targets(batch) * g.double()
        total += tiny.targets(batch)
    return [s / total for s in sums]


def test_autocast_to_bfloat16_is_the_models():
    accelerator, model, _ = prepared(mixed_precision="bf16")
    expected = chunk_gradients(model)
    sums = accumulator(accelerator, model)
    for samples in micro_batches():
        batch = tiny.collate(samples)
        sums.backward(model(**batch).loss, weight=tiny.targets(batch))
    sums.to_grad()
    whole = closure(
        accelerator,
        model,
        chunks=[tiny.collate(samples) for samples in micro_batches()],
        evaluate=lambda model, chunk: model(**chunk).loss,
        weight=tiny.targets,
    )
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole()
    for p, f, e in zip(model.parameters(), found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.grad, f, rtol=1e-5, atol=1e-7)


def test_bfloat16_parameters_keep_their_sums_in_float32():
    errors = {}
    for ours in (False, True):
        accelerator, model, _ = prepared("llama", gradient_accumulation_steps=len(SIZES))
        model.bfloat16()
        expected = chunk_gradients(model)
        sums, count = accumulator(accelerator, model), sum(len(d["labels"]) - 1 for d in DATA)
        for samples in micro_batches():
            batch = tiny.collate(samples)
            weight, loss = tiny.targets(batch), model(**batch).loss
            if ours:
                sums.backward(loss, weight)
            else:  # right weights, in the parameters' own precision
                accelerator.backward(loss * weight / count * len(SIZES))
        if ours:
            sums.to_grad()
        pairs = list(zip(model.parameters(), expected, strict=True))
        off = sum(float((p.grad.double() - e).square().sum()) for p, e in pairs)
        errors[ours] = (off / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5
        forget()
    assert errors[True] < 2**-9 < errors[False]


def test_a_layer_that_begins_to_require_grad_needs_a_new_accumulator():
    accelerator, model, _ = prepared()
    model.transformer.wpe.requires_grad_(False)
    sums = accumulator(accelerator, model)
    model.transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match="make a new one"), sums.chunk(1.0):
        pass


def coefficient(step: int) -> float:
    return 0.05 * (step + 1)


def full_batch(accelerator: Accelerator, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    """Return a prepared model and FullBatchGD, and a closure over a prepared loader."""
    model = tiny.language_model("llama", seed)
    loader = torch.utils.data.DataLoader(DATA, batch_size=4, collate_fn=tiny.collate)
    optimizer = FullBatchGD(model.parameters(), lr=tiny.LR, momentum=0.9, max_norm=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    made = closure(
        accelerator,
        model,
        chunks=loader,
        evaluate=lambda model, chunk: model(**chunk).loss,
        weight=tiny.targets,
        optimizer=optimizer,
        penalty=GradientPenalty(coefficient=coefficient),
        **options,
    )
    return model, optimizer, made


def run(parts: tuple[Any, ...], steps: int) -> list[float]:
    _, optimizer, made = parts
    losses = []
    for _ in range(steps):
        optimizer.step(made)
        losses.append(float(made.loss))
    return losses


def test_saved_states_resume_to_the_bit(tmp_path):
    accelerator = Accelerator(cpu=True)
    whole = full_batch(accelerator, accumulation="exact")
    sums = accumulator(accelerator, whole[0], "exact")
    losses = run(whole, 2)
    accelerator.save_state(str(tmp_path))
    losses += run(whole, 2)
    forget()
    accelerator = Accelerator(cpu=True)
    again = full_batch(accelerator, seed=1, accumulation="exact")
    other = accumulator(accelerator, again[0], "exact")
    accelerator.load_state(str(tmp_path))
    assert run(again, 2) == losses[2:] and again[2].step == 4
    assert bits(again[0]) == bits(whole[0])
    assert bits(other.state_dict()) == bits(sums.state_dict())


def test_what_would_be_wrong_is_refused():
    accelerator, model, _ = prepared(scale=8.0)
    with pytest.raises(ValueError, match='use "bf16"'):
        closure(accelerator, model, nn.functional.mse_loss, [])
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.FSDP):
        accelerator.state.distributed_type = kind
        with pytest.raises(ValueError, match="reduces gradients by itself"):
            accumulator(accelerator, model)


# --- two processes --------------------------------------------------------------------------------

UNEVEN = {"uneven": [(0, 2), (1, 3)], "one has none": [(), (0, 1, 2, 3)]}


def on_each_rank(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "sums": {case: uneven(share[rank]) for case, share in UNEVEN.items()},
        "outside": outside(),
        "buffers": buffers(rank),
        "closure": shared_closure(folder),
        "fully sharded": [fully_sharded(rank, True), fully_sharded(rank, False)],
        "refused": refused(),
    }


def uneven(share: tuple[int, ...]) -> dict[str, torch.Tensor]:
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=7)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    sums, batches = accumulator(accelerator, model), micro_batches()
    for step in range(3):
        for index in share:
            batch = tiny.collate(batches[index])
            loss = model(**batch).loss if step else None  # within the chunk, and before it
            with sums.chunk(weight=tiny.targets(batch)):
                accelerator.backward(model(**batch).loss if loss is None else loss)
        sums.to_grad()
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    found = dict(model.module.named_parameters())
    forget()
    return found


def outside() -> str:
    accelerator, model, _ = prepared()
    accumulator(accelerator, model)
    batch = tiny.collate(DATA[:2])
    accumulator(accelerator, model).backward(model(**batch).loss)  # a second one is welcome
    with pytest.raises(RuntimeError) as caught:
        accelerator.backward(model(**batch).loss)
    forget()
    return str(caught.value)


def buffers(rank: int) -> dict[str, torch.Tensor]:
    """Return BatchNorm's buffers where the first process has a chunk less than the second."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    sums = accumulator(accelerator, model)
    for _ in range(rank):
        sums.backward(model(torch.randn(5, 3)).square().mean())
    sums.to_grad()
    forget()
    return dict(model.named_buffers())


def shared_closure(folder: Path) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    parts = full_batch(accelerator)
    model, optimizer, _ = parts
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    accelerator.prepare(scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run(parts, 3)
    found = {"losses": losses, "params": dict(model.module.named_parameters())}
    found = copy.deepcopy(found) | {"warned": [str(w.message) for w in caught]}
    accelerator.save_state(str(folder / "state"))
    accelerator.wait_for_everyone()
    found["next"] = run(parts, 1)
    accelerator.load_state(str(folder / "state"))
    found["again"] = run(parts, 1)
    forget()
    return found


def fully_sharded(rank: int, by_closure: bool) -> dict[str, torch.Tensor]:
    """Return the parameters after three steps, two chunks on each process in each."""
    accelerator, model = Accelerator(cpu=True), tiny.language_model("llama")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (trainer_ranks.WORLD,))
    for module in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    # Accelerate itself shards on GPUs only.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=tiny.LR)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    chunks = [tiny.collate(micro_batches()[index]) for index in (rank, 2 + rank)]
    if by_closure:
        options = {"evaluate": lambda model, chunk: model(**chunk).loss, "weight": tiny.targets}
        made = closure(accelerator, model, chunks=chunks, backward=True, **options)
    else:
        sums = accumulator(accelerator, model)
    for _ in range(3):
        if by_closure:
            made()
        else:
            for chunk in chunks:
                sums.backward(model(**chunk).loss, tiny.targets(chunk))
            sums.to_grad()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    found = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    forget()
    return found


def refused() -> list[str]:
    found = []
    for config in (DataLoaderConfiguration(dispatch_batches=True), None):
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        data = DATA if config else Streamed()
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=tiny.collate)
        model, loader = accelerator.prepare(tiny.language_model("llama"), loader)
        with pytest.raises(ValueError) as caught:
            closure(accelerator, model, nn.functional.mse_loss, loader)
        found.append(str(caught.value))
        forget()
    return found


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trainer_ranks.together(
        on_each_rank, tmp_path_factory.mktemp("ranks"), "transformers.trainer"
    )


@pytest.mark.parametrize("case", UNEVEN)
def test_processes_may_have_different_numbers_of_chunks(found, case):
    params, others = (one["sums"][case] for one in found)
    assert bits(params) == bits(others)
    model = tiny.language_model("gpt2")
    expected = tiny.one_batch(model, [DATA] * 3, max_norm=0.5)
    model.load_state_dict(params, strict=False)
    assert tiny.distance(model, expected) < 1e-6


def test_a_backward_pass_outside_of_a_chunk_is_an_error(found):
    for one in found:
        assert "outside of accumulator.chunk()" in one["outside"]


def test_buffers_are_the_first_processs(found):
    assert bits(found[0]["buffers"]) == bits(found[1]["buffers"])
    assert not found[1]["buffers"]["module.1.num_batches_tracked"]


def test_a_closure_on_a_prepared_loader_visits_every_sample_once(found):
    first, second = (one["closure"] for one in found)
    alone = full_batch(Accelerator(cpu=True))
    losses = run(alone, 3)
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-6)
    assert bits(first["params"]) == bits(second["params"])
    model = tiny.language_model("llama")
    model.load_state_dict(first["params"])
    assert tiny.distance(model, alone[0]) < 1e-6
    assert first["next"] == first["again"] == second["again"]
    assert [w for w in first["warned"] if "goes 2 steps forward" in w]


def test_fully_sharded_models(found):
    expected = tiny.one_batch(tiny.language_model("llama"), [DATA] * 3, max_norm=0.5)
    for params in found[0]["fully sharded"]:
        model = tiny.language_model("llama")
        model.load_state_dict(params)
        assert tiny.distance(model, expected) < 1e-6


def test_loaders_that_repeat_samples_are_refused(found):
    for message in found[0]["refused"]:
        assert "dispatch_batches=False" in message
