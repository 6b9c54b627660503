"""The library on CUDA tensors, as a user calls it: against plain torch on the CPU in float64, bit
for bit against itself, without a sync. The same tests run on the CPU, where there is no GPU.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import use_backend
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fbopt import (
    FullBatchClosure,
    FullBatchGD,
    GradientAccumulator,
    GradientPenalty,
    clip_grad_norm_,
)
from fbopt._build import load
from fbopt._engine import chunk_addition, vectorized_gradient, weights
from fbopt._engine.functional import ChunkFunction, Passes
from fbopt._engine.refilled import Samples
from fbopt._engine.vectorized_probe import Kind
from fbopt._ops import dispatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PENALTIES = {
    "none": None,
    **{m: GradientPenalty(strength=2.0, method=m) for m in ("forward", "central", "exact")},
}
in_groups_or_not = pytest.mark.parametrize("vectorize", [1, 3])
OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "max_norm": 0.25}


@pytest.fixture(params=DEVICES)
def device(request, kernels):
    """A device whose kernels are compiled."""
    if request.param == "cuda":
        assert load.cuda_kernels() is not None
    return torch.device(request.param)


def layers(*extra):
    first = [nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Tanh()]
    return nn.Sequential(*first, *extra, nn.Flatten(), nn.Linear(6 * 8, 3))


def network(*extra, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return layers(*extra).to(device, dtype)


def chunks(device="cpu", dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 2, 10, generator=generator, dtype=torch.float64).to(device, dtype)
    y = torch.randint(0, 3, (37,), generator=generator).to(device)
    return list(zip(x.split(size), y.split(size), strict=True))


def trained(model, data, penalty=None, steps=5, accumulation="float32", vectorize=1, **options):
    """The loss of every step, and what the model is afterwards."""
    optimizer = FullBatchGD(model.parameters(), **(OPTIONS | options))
    closure = FullBatchClosure(
        model,
        F.cross_entropy,
        data,
        penalty=penalty,
        optimizer=optimizer,
        accumulation=accumulation,
        vectorize=vectorize,
    )
    torch.manual_seed(7)
    losses = [optimizer.step(closure) for _ in range(steps)]
    state = [v.cpu() for v in model.state_dict().values() if v.is_floating_point()]
    return [torch.stack(losses).cpu(), optimizer.last_grad_norm.cpu(), *state]


@in_groups_or_not
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_training_equals_plain_torch_in_float64(penalty, vectorize, device, monkeypatch):
    model, data = network(device=device, dtype=torch.float64), chunks(device, torch.float64)
    found = trained(model, data, penalty, vectorize=vectorize)
    use_backend("reference", monkeypatch)
    wanted = trained(network(dtype=torch.float64), chunks(dtype=torch.float64), penalty)
    # Finite differences divide the rounding of gradients by the step.
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@in_groups_or_not
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_training_twice_gives_the_same_bits(penalty, vectorize, device):
    with deterministic():
        runs = [
            trained(
                network(nn.Dropout(0.3), device=device),
                chunks(device),
                penalty,
                vectorize=vectorize,
            )
            for _ in range(2)
        ]
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_exact_sums_know_no_order(penalty, device):
    data = chunks(device)
    with deterministic():
        runs = [
            trained(network(device=device), order, penalty, accumulation="exact")
            for order in (data, data[::-1], data[2:] + data[:2])
        ]
    torch.testing.assert_close(runs[1:], [runs[0]] * 2, rtol=0, atol=0)


@contextlib.contextmanager
def deterministic():
    """Torch's own kernels without atomics."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@pytest.mark.cuda
@in_groups_or_not
@pytest.mark.parametrize("options", [{}, {"max_norm": None, "momentum": 0, "nesterov": False}])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_step_reads_nothing_from_the_device(penalty, options, vectorize):
    assert load.cuda_kernels() is not None
    data, model = chunks("cuda"), network(nn.Dropout(0.3), device="cuda")
    optimizer = FullBatchGD(model.parameters(), **(OPTIONS | options))
    given = {"penalty": penalty, "optimizer": optimizer, "vectorize": vectorize}
    closure = FullBatchClosure(model, F.cross_entropy, data, **given)
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step(closure)
        optimizer.step()
        clip_grad_norm_(model.parameters(), 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Anew(list):
    """Gives other tensors in each visit, as a DataLoader does."""

    def __iter__(self):
        return ((x.clone(), y.clone()) for x, y in super().__iter__())


def first_passes(function, params, buffers, stack, whole=()):
    """In place of the passes over a group at theta: results of their shapes, on their device."""
    grads = tuple(torch.randn(stack.count, *p.shape, device=p.device) for p in params)
    return Passes(grads, torch.randn(stack.count, device=params[0].device), (), buffers)


def passes_at_points(function, points, buffers, stack):
    """The same for passes at perturbed parameters."""
    return Passes(tuple(map(torch.randn_like, points)), points[0].sum(), (), buffers)


def unchecked(work, visit, observed, kinds):
    """In place of the passes that are compared in the first call."""
    passes = work._first(visit)
    kinds[work._used(passes)] = Kind(frozenset(range(len(work.work.sums.params))))
    return passes


class NoUploads(TorchDispatchMode):
    """Refuses copies from the CPU to the device, which wait for it, and which no graph repeats."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            assert (source.device.type, result.device.type) != ("cpu", "cuda"), "an upload"
        return result


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@in_groups_or_not
@pytest.mark.parametrize("options", [{}, {"max_norm": None, "momentum": 0, "nesterov": False}])
@pytest.mark.parametrize("penalty", ["none", "forward", "central"])
def test_a_step_on_fake_cuda_tensors_reads_nothing(
    penalty, options, vectorize, kernels, monkeypatch
):
    """Without a GPU: fake tensors of the device run all code but the kernels, and hold no values.

    Their autograd would ask for a driver; random gradients stand for it. In groups the first call
    compares, and reads: without that, it makes what later calls find.
    """
    table = dispatch.table("cpu")
    monkeypatch.setattr(dispatch, "table", lambda device_type: table)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.autograd, "grad", lambda _, params, **options: [torch.randn_like(p) for p in params]
    )
    monkeypatch.setattr(ChunkFunction, "first", first_passes)
    monkeypatch.setattr(ChunkFunction, "gradient", passes_at_points)
    monkeypatch.setattr(vectorized_gradient.VectorizedGradient, "_checked", unchecked)
    monkeypatch.setattr(vectorized_gradient, "check_shifted", lambda *passes, **more: None)
    monkeypatch.setattr(Samples, "check", lambda *chunks: None)  # in the first call, too
    count = mock.Mock(side_effect=lambda target, mean: len(target))  # reads, in the first call
    monkeypatch.setattr(weights, "_count", count)
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda:0"):
            model = layers(nn.Dropout(0.3))
            x, y = torch.randn(16, 2, 10), torch.zeros(16, dtype=int)
        optimizer = FullBatchGD(model.parameters(), **(OPTIONS | options))
        data = list(zip(x.split(6), y.split(6), strict=True))
        closure = FullBatchClosure(
            model,
            F.cross_entropy,
            Anew(data),
            penalty=PENALTIES[penalty],
            optimizer=optimizer,
            vectorize=vectorize,
        )
        optimizer.step(closure)
        closure.weight = lambda chunk: 0.5  # others than in the first call
        with NoUploads():
            loss = optimizer.step(closure)
        assert count.call_count == len(data)
        optimizer.step()
        norm = clip_grad_norm_(model.parameters(), 0.1)
        assert loss.device == norm.device == optimizer.last_grad_norm.device == x.device
        with pytest.raises(DataDependentOutputException):
            loss.item()  # what a read would have raised


@pytest.mark.parametrize("method", ["forward", "central"])
def test_dropout_masks_are_the_same_in_all_passes_of_a_chunk(method, device):
    dropout = nn.Dropout(0.5)
    model = network(dropout, device=device)
    masks = []
    dropout.register_forward_hook(lambda _, __, output: masks.append(output == 0))
    penalty = GradientPenalty(coefficient=0.1, radius=1e-6, method=method)
    data = chunks(device)
    FullBatchClosure(model, F.cross_entropy, data, penalty=penalty)()
    passes = {"forward": 2, "central": 3}[method]
    assert len(masks) == passes * len(data)
    of_chunk = [masks[i : i + passes] for i in range(0, len(masks), passes)]
    assert all(torch.equal(m, first) for first, *others in of_chunk for m in others)
    assert not torch.equal(of_chunk[0][0], of_chunk[1][0])


def test_a_loss_that_raises_leaves_everything(device):
    model, calls = network(nn.Dropout(0.3), device=device), []

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("boom")
        return F.cross_entropy(output, target)

    penalty = GradientPenalty(coefficient=0.1)
    closure = FullBatchClosure(model, loss_fn, chunks(device), penalty=penalty)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        closure()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_summed_in_float32(dtype, device):
    params = [torch.randn(300, device=device).to(dtype), torch.randn(7, 9, device=device).to(dtype)]
    grads = [torch.full_like(p, 1 + 2**-7) for p in params]
    accumulator = GradientAccumulator(params)
    for _ in range(1000):
        accumulator.add(grads, weight=3)
    assert all(s.dtype == torch.float32 for s in accumulator._sums.views)
    for mean, g in zip(accumulator.mean(), grads, strict=True):
        assert mean.dtype == dtype and torch.equal(mean, g)


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_chunks_on_several_streams(accumulation, device, monkeypatch):
    """Layers run on streams of their own, so that autograd calls the hooks on those."""
    monkeypatch.setattr(chunk_addition, "BATCH_BYTES", 400)
    model, data = network(device=device), chunks(device)
    accumulator = GradientAccumulator(model.parameters(), accumulation)
    streams = [torch.cuda.Stream() for _ in model] if device.type == "cuda" else []

    def forward(x):
        for layer, stream in zip(model, streams, strict=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                x = layer(x)
            torch.cuda.current_stream().wait_stream(stream)
        return x if streams else model(x)

    for _ in accumulator.passes():
        for x, y in data:
            with accumulator.chunk(len(x)):
                F.cross_entropy(forward(x), y).backward()
    accumulator.to_grad()
    expected = network(dtype=torch.float64)
    for x, y in chunks(dtype=torch.float64):
        (F.cross_entropy(expected(x), y) * len(x) / 37).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double().cpu(), q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [3, 1000])
def test_clipping_equals_torch(count, device):
    grads = [torch.randn(1 + i % 40, dtype=torch.float64) for i in range(count)]
    mine = [nn.Parameter(torch.zeros_like(g, device=device)) for g in grads]
    theirs = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for a, b, g in zip(mine, theirs, grads, strict=True):
        a.grad, b.grad = g.to(device), g.clone()
    found = clip_grad_norm_(mine, 0.5)
    wanted = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-12, atol=0)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "shapes", [[(16,)] * 1000, [(3,), (40, 5), ()] * 30], ids=["tiny", "mixed"]
)
def test_many_tensors_step_as_torch_does(shapes, device):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    found = []
    for kind, where in ((FullBatchGD, device), (torch.optim.SGD, "cpu")):
        params = [nn.Parameter(t.to(where)) for t in start]
        optimizer = kind(params, **rule)
        for _ in range(3):
            sum((p**2).sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_state_moves_between_devices_and_optimizers(device):
    model = network(device=device)
    optimizer = FullBatchGD(model.parameters(), **OPTIONS)
    closure = FullBatchClosure(model, F.cross_entropy, chunks(device))
    optimizer.step(closure)
    other = network()
    other.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    sgd.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = optimizer.state[p], sgd.state[q]
        assert torch.equal(mine["momentum_buffer"].cpu(), theirs["momentum_buffer"])
