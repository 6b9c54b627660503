"""FullBatchClosure: the gradient of the mean over all samples, and nothing else changed."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._engine import reduce, weights
from fbopt._engine.snapshot import GeneratorSnapshot

PENALTIES = [None, *(GradientPenalty(coefficient=0.1, method=m) for m in ("forward", "central"))]


def data(n=37, features=6, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, classes, (n,), generator=generator)


def chunked(x, y, size=8):
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp(*extra, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *extra, nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def grads_of(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def state_bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_bits(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ragged_chunks_equal_one_batch():
    x, y = data()
    model = mlp()
    wanted_loss = F.cross_entropy(model(x), y)
    wanted = torch.autograd.grad(wanted_loss, list(model.parameters()))
    for size in (1, 5, 8, 36, 37):
        loss = FullBatchClosure(model, F.cross_entropy, chunked(x, y, size))()
        torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-12, atol=0)
        for g, w in zip(grads_of(model), wanted, strict=True):
            assert (g - w).norm() <= 1e-12 * w.norm()


def test_order_of_chunks_only_rounds():
    x, y = data()
    model = mlp()
    chunks = chunked(x, y)
    FullBatchClosure(model, F.cross_entropy, chunks)()
    forward = grads_of(model)
    FullBatchClosure(model, F.cross_entropy, chunks[::-1])()
    torch.testing.assert_close(grads_of(model), forward, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_every_call_gives_the_same_and_leaves_the_parameters(penalty):
    x, y = data(dtype=torch.float32)
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3), dtype=torch.float32)
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)
    pointers = [p.data_ptr() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    results = []
    for _ in range(3):
        torch.manual_seed(5)
        results.append((closure(), grads_of(model), state_bits(model), torch.rand(3)))
        for name in [k for k in results[-1][2] if k.endswith("num_batches_tracked")]:
            del results[-1][2][name]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert closure.step == 3


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    "method, at", [("forward", n) for n in range(1, 7)] + [("central", n) for n in range(1, 10)]
)
def test_nothing_is_lost_when_the_loss_raises(method, at):
    """At each of the passes over three chunks in turn, first and shifted ones alike."""
    x, y = data(n=24, dtype=torch.float32)
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3), dtype=torch.float32)
    calls = 0

    def loss_fn(output, target):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Boom
        return F.cross_entropy(output, target)

    penalty = GradientPenalty(coefficient=0.1, method=method)
    closure = FullBatchClosure(model, loss_fn, chunked(x, y), penalty=penalty)
    before, pointers = state_bits(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(Boom):
        closure()
    assert_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None for p in model.parameters())
    assert model[1].momentum == 0.1
    assert closure.step == 0


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("size", [8, 37])
def test_batchnorm_statistics_are_those_of_the_full_batch(penalty, size):
    x, y = data()
    model = mlp(nn.BatchNorm1d(16))
    chunks = chunked(x, y, size)
    hidden = model[0](x).detach().split(size)
    weights = torch.tensor([len(h) / len(x) for h in hidden], dtype=torch.float64)
    mean = sum(w * h.mean(0) for w, h in zip(weights, hidden, strict=True))
    var = sum(w * h.var(0) for w, h in zip(weights, hidden, strict=True))
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty)
    for _ in range(2):
        closure()
        torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model[1].running_var, var, rtol=1e-12, atol=1e-14)
    assert model[1].num_batches_tracked == 2 * len(chunks)
    assert model[1].momentum == 0.1
    reverse = copy.deepcopy(model)
    FullBatchClosure(reverse, F.cross_entropy, chunks[::-1], penalty=penalty)()
    torch.testing.assert_close(reverse[1].running_var, model[1].running_var, rtol=1e-14, atol=0)


def test_batchnorm_in_eval_mode_is_left_alone():
    x, y = data()
    model = mlp(nn.BatchNorm1d(16))
    model[1].eval()
    before = state_bits(model)
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=PENALTIES[1])
    closure()
    assert_bits(model, before)


def test_statistics_heal_after_a_step_that_diverged():
    x, y = data()
    model = mlp(nn.BatchNorm1d(16))
    model[1].running_mean.fill_(float("nan"))
    FullBatchClosure(model, F.cross_entropy, chunked(x, y))()
    assert torch.isfinite(model[1].running_mean).all()


class Counter(nn.Module):
    """Changes its buffers at every pass: in place, and by putting another tensor there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inplace", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("expanded", torch.zeros(1).expand(3))

    def forward(self, x):
        self.inplace += 1
        self.replaced = self.replaced + 1
        return x


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_other_buffers_see_the_first_passes_alone(penalty):
    x, y = data()
    model = mlp(Counter())
    FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)()
    assert model[1].inplace == 5
    assert model[1].replaced == 5


class Record(nn.Module):
    """Keeps what passes through."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x == 0)
        return x


@pytest.mark.parametrize("method", ["forward", "central"])
def test_dropout_masks_are_the_same_in_all_passes_of_a_chunk(method):
    x, y = data(n=16)
    record = Record()
    model = mlp(nn.Dropout(0.5), record)
    penalty = GradientPenalty(coefficient=0.1, method=method)
    FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)()
    passes = {"forward": 2, "central": 3}[method]
    masks = [record.seen[i : i + passes] for i in range(0, len(record.seen), passes)]
    assert len(masks) == 2
    for of_chunk in masks:
        assert all(torch.equal(m, of_chunk[0]) for m in of_chunk)
    assert not torch.equal(masks[0][0], masks[1][0])


def test_random_draws_go_on_as_without_penalty():
    x, y = data()
    after = []
    for penalty in PENALTIES:
        model = mlp(nn.Dropout(0.5))
        torch.manual_seed(3)
        FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)()
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


def test_tied_frozen_unused_and_scalar_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Linear(6, 6)
            self.out = nn.Linear(6, 6)
            self.out.weight = self.embed.weight
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.scale * self.out(torch.tanh(self.embed(x)) * self.frozen)

    x, y = data(classes=6)
    model = Model().double()
    for penalty in PENALTIES:
        FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)()
        assert model.unused.grad is None
        assert model.frozen.grad is None
        assert model.scale.grad.shape == ()
    FullBatchClosure(model, F.cross_entropy, chunked(x, y))()
    params = [model.embed.weight, model.embed.bias, model.out.bias, model.scale]
    wanted = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    torch.testing.assert_close([p.grad for p in params], list(wanted), rtol=1e-12, atol=1e-14)


def test_parameter_used_by_some_chunks_only():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return (self.a if len(x) == 8 else self.b)(x)

    x, y = data()
    model = Routed().double()
    chunks = chunked(x, y)
    loss = sum(len(b) / len(x) * F.cross_entropy(model(a), b) for a, b in chunks)
    wanted = list(torch.autograd.grad(loss, list(model.parameters())))
    FullBatchClosure(model, F.cross_entropy, chunks)()
    torch.testing.assert_close(grads_of(model), wanted, rtol=1e-12, atol=1e-14)


def test_freezing_later_is_followed():
    x, y = data()
    model = mlp()
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=PENALTIES[1])
    closure()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    FullBatchGD(model.parameters(), lr=1.0).step(closure)  # not with the gradient of the last call
    assert model[0].weight.grad is None and torch.equal(model[0].weight, before)
    assert closure.accumulator.params == list(model[2].parameters())
    assert torch.equal(closure.accumulator.mean()[0], model[2].weight.grad)


def test_generators_are_not_read_without_need(monkeypatch: pytest.MonkeyPatch):
    x, y = data()
    monkeypatch.setattr(GeneratorSnapshot, "_get", lambda self: pytest.fail("in a CUDA graph"))
    FullBatchClosure(mlp(), F.cross_entropy, chunked(x, y))()


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_model_moved_to_another_dtype_and_layout(penalty):
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, 6, 6), torch.randint(0, 3, (12,))
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    chunks = [[x[:8], y[:8]], [x[8:], y[8:]]]
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty)
    closure()
    wanted = grads_of(model)
    model.to(memory_format=torch.channels_last)
    closure()
    assert model[0].weight.grad.stride() == model[0].weight.stride()
    torch.testing.assert_close(grads_of(model), wanted, rtol=1e-3, atol=1e-5)
    model.double()
    chunks[:] = [(a.double(), b) for a, b in chunks]
    assert closure().dtype == torch.float64
    got = [g.float() for g in grads_of(model)]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_half_precision_model_sums_in_float32():
    x, y = data(n=4096, dtype=torch.bfloat16)
    model = mlp(dtype=torch.bfloat16)
    closure = FullBatchClosure(model, lambda o, t: F.cross_entropy(o.float(), t), chunked(x, y, 4))
    closure()
    summed = [s.clone() for s in closure.sums.views]
    assert all(s.dtype == torch.float32 for s in summed)
    wide = mlp(dtype=torch.bfloat16)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in wide.parameters()]
    for a, b in chunked(x, y, 4):
        loss = F.cross_entropy(wide(a).float(), b)
        for e, g in zip(exact, torch.autograd.grad(loss, list(wide.parameters())), strict=True):
            e += g.double() * len(a) / len(x)
    torch.testing.assert_close([s.double() for s in summed], exact, rtol=1e-4, atol=1e-6)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_sees_the_shifted_weights(outer):
    """Autocast caches cast weights by parameter; a stale cache would make the penalty vanish."""
    x, y = data(dtype=torch.float32)
    model = mlp(dtype=torch.float32)
    penalty = GradientPenalty(coefficient=1.0, radius=0.5)
    chunks = chunked(x, y)

    def run(penalty, autocast):
        inner = None if outer else autocast
        closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty, autocast=inner)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer and autocast is not None):
            closure()
        return torch.cat([g.flatten() for g in grads_of(model)])

    exact = run(penalty, None) - run(None, None)
    cast = run(penalty, torch.bfloat16) - run(None, torch.bfloat16)
    assert (cast - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("method", ["forward", "central", "exact", None])
def test_autocast_around_the_call_or_inside_evaluate_is_that_of_the_argument(method):
    """Bit for bit: the caller's is meant for the forward passes, not for what follows them."""
    x, y = data(dtype=torch.float32)
    model = nn.Sequential(mlp(dtype=torch.float32), nn.Softmax(1), nn.Linear(3, 3))
    penalty = method and GradientPenalty(coefficient=1.0, radius=0.5, method=method)
    options = {"chunks": chunked(x, y), "penalty": penalty}

    def evaluate(model, chunk):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(chunk[0]), chunk[1])

    def run(outer=False, **given):
        closure = FullBatchClosure(model, **options | given)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            loss = closure()
            assert torch.is_autocast_enabled("cpu") == outer
        return loss, grads_of(model)

    wanted = run(loss_fn=F.cross_entropy, autocast=torch.bfloat16)
    plain = run(loss_fn=F.cross_entropy)
    assert not torch.equal(plain[1][0], wanted[1][0])
    for other in (
        run(outer=True, loss_fn=F.cross_entropy),
        run(outer=True, evaluate=evaluate),
        run(evaluate=evaluate),
    ):
        torch.testing.assert_close(other, wanted, rtol=0, atol=0)


def test_autocast_around_the_call_keeps_no_shifted_weights():
    x, y = data(dtype=torch.float32)
    model = mlp(dtype=torch.float32)
    penalty = GradientPenalty(coefficient=1.0, radius=0.5)
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)
    with torch.autocast("cpu", torch.bfloat16):
        closure()
        found = model(x)
        torch.clear_autocast_cache()
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_compiled_model_gives_the_same(penalty):
    x, y = data(n=24, dtype=torch.float32)
    model = mlp(nn.BatchNorm1d(16), dtype=torch.float32)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager")
    for m in (model, compiled):
        closure = FullBatchClosure(m, F.cross_entropy, chunked(x, y), penalty=penalty)
        for _ in range(2):
            closure()
    torch.testing.assert_close(grads_of(other), grads_of(model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other[1].running_var, model[1].running_var)


def test_lbfgs_fits_a_quadratic():
    torch.manual_seed(0)
    x, w = torch.randn(50, 4, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    closure = FullBatchClosure(model, F.mse_loss, chunked(x, x @ w + 0.5, 16))
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=50)
    optimizer.step(closure)
    assert closure() < 1e-10
    torch.testing.assert_close(model.weight.detach().T, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_torch_optimizers_step_as_on_one_batch(kind):
    x, y = data()
    ours, theirs = mlp(), mlp()
    mine = getattr(torch.optim, kind)(ours.parameters(), lr=0.05)
    other = getattr(torch.optim, kind)(theirs.parameters(), lr=0.05)
    closure = FullBatchClosure(ours, F.cross_entropy, chunked(x, y))
    for _ in range(20):
        loss = mine.step(closure)
        other.zero_grad()
        wanted = F.cross_entropy(theirs(x), y)
        wanted.backward()
        other.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        [p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()]
    )


def test_evaluate_takes_chunks_of_any_kind():
    x, y = data()
    model = mlp()
    chunks = [{"features": a, "labels": b} for a, b in chunked(x, y)]
    closure = FullBatchClosure(
        model, chunks=chunks, evaluate=lambda m, c: F.cross_entropy(m(c["features"]), c["labels"])
    )
    loss = closure()
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach())
    points = FullBatchClosure(model, chunks=x.split(8), evaluate=lambda m, c: m(c).square().mean())
    torch.testing.assert_close(points(), model(x).square().mean().detach())


def test_weights_of_the_users_own():
    x, y = data()
    model = mlp()
    chunks = chunked(x, y, 10)
    loss = FullBatchClosure(model, F.cross_entropy, chunks, weight=lambda c: 1)()
    wanted = sum(F.cross_entropy(model(a), b).item() for a, b in chunks) / len(chunks)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_dataloader_as_chunks():
    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    model = mlp()
    loss = FullBatchClosure(model, F.cross_entropy, loader)()
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach())


def test_observer_sees_every_chunk_once():
    x, y = data()
    model, seen = mlp(), []

    def observe(output, target):
        assert not output.requires_grad and not torch.is_grad_enabled()
        seen.append((output, target))

    FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=PENALTIES[2], observe=observe)()
    outputs, targets = zip(*seen, strict=True)
    torch.testing.assert_close(torch.cat(outputs), model(x).detach())
    assert torch.equal(torch.cat(targets), y)


def huge(output, target):
    """A loss so large that exact sums need a second visit for their units."""
    return 2.0**90 * F.cross_entropy(output, target)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_observer_sees_what_evaluate_returns_in_the_first_pass(penalty, accumulation):
    """Not in the shifted passes, nor in a second visit that exact sums need."""
    x, y = data(n=39)
    model, seen, calls = mlp(), [], []
    chunks = [{"x": a, "y": b} for a, b in chunked(x, y)]

    def evaluate(model, chunk):
        calls.append(len(chunk["y"]))
        output = model(chunk["x"])
        right = (output.argmax(1) == chunk["y"]).sum()
        return huge(output, chunk["y"]), {"outputs": [output], "right": right}

    def observe(aux, chunk):
        assert not aux["outputs"][0].requires_grad and not torch.is_grad_enabled()
        seen.append((aux["outputs"][0], aux["right"], chunk["y"]))

    options = {"evaluate": evaluate, "chunks": chunks, "penalty": penalty}
    FullBatchClosure(model, observe=observe, accumulation=accumulation, **options)()
    outputs, right, targets = zip(*seen, strict=True)
    torch.testing.assert_close(torch.cat(outputs), model(x).detach())
    assert torch.equal(torch.cat(targets), y) and sum(right) == (model(x).argmax(1) == y).sum()
    assert sum(calls) > 39 or (penalty is None and accumulation == "float32")
    FullBatchClosure(model, **options)()  # aux without observe


def test_a_repeated_visit_is_announced_or_not_observed():
    x, y = data()
    seen = []

    def closure(**options):
        observe = lambda output, target: seen.append(len(target))  # noqa: E731
        options |= {"accumulation": "exact", "observe": observe}
        return FullBatchClosure(mlp(), huge, chunked(x, y), **options)

    closure()()
    assert sum(seen) == len(x)
    seen.clear()
    closure(on_pass_start=lambda: seen.append(0))()
    assert seen.count(0) == 2 and sum(seen) == 2 * len(x)


def test_gradients_replace_what_was_there():
    x, y = data()
    model = mlp()
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y))
    closure()
    wanted = grads_of(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    closure()
    torch.testing.assert_close(grads_of(model), wanted, rtol=0, atol=0)


def test_extra_parameters_outside_the_model():
    x, _ = data()
    model, constant = mlp(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    closure = FullBatchClosure(
        model,
        chunks=x.split(8),
        evaluate=lambda m, c: (m(c) - constant).square().mean(),
        params=[*model.parameters(), constant],
        penalty=PENALTIES[1],
    )
    closure()
    assert constant.grad is not None


def test_nothing_is_read_on_the_host(monkeypatch):
    """On a GPU each of these would wait for the device."""
    x, y = data(dtype=torch.float32)
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.2), dtype=torch.float32)
    optimizer = FullBatchGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, max_norm=0.25)
    closure = FullBatchClosure(
        model, F.cross_entropy, chunked(x, y), penalty=GradientPenalty(), optimizer=optimizer
    )
    optimizer.step(closure)

    def refuse(*_):
        raise AssertionError("a device value was read on the host")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(weights, "_count", lambda target, mean: len(target))  # on the CPU alone
    monkeypatch.setattr(reduce, "_lie_on_host", lambda *values: False)
    loss = optimizer.step(closure)
    monkeypatch.undo()
    assert torch.isfinite(loss)


def test_step_count_is_saved():
    x, y = data()
    seen = []
    penalty = GradientPenalty(coefficient=lambda step: seen.append(step) or 0.1)
    closure = FullBatchClosure(mlp(), F.cross_entropy, chunked(x, y), penalty=penalty)
    closure()
    closure()
    other = FullBatchClosure(mlp(), F.cross_entropy, chunked(x, y), penalty=penalty)
    other.load_state_dict(closure.state_dict())
    seen.clear()
    other()
    assert seen == [2]


@pytest.mark.parametrize("how", ["call", "accumulate", "assign", "rollback", "step", "thread"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_closure_that_is_at_work_refuses_to_be_entered(how, penalty):
    """From the loss function, in the second pass or chunk; then the call goes on as if nothing
    had happened, and without the attempt the next ones are right.
    """
    x, y = data()
    model = mlp(nn.BatchNorm1d(16))
    optimizer = FullBatchGD(model.parameters(), lr=0.1)
    refused, calls = [], []

    def enter():
        try:
            {"step": lambda: optimizer.step(closure), "call": closure, "thread": closure}.get(
                how, getattr(closure, how, None)
            )()
        except RuntimeError as error:
            refused.append(str(error))

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == 2:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(enter).result() if how == "thread" else enter()
        return F.cross_entropy(output, target)

    closure = FullBatchClosure(model, loss_fn, chunked(x, y), penalty=penalty)
    fresh = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)
    loss, grads = fresh(), grads_of(model)
    for _ in range(2):
        torch.testing.assert_close((closure(), grads_of(model)), (loss, grads), rtol=0, atol=0)
    assert len(refused) == 1 and "at work" in refused[0] and closure.step == 2


@pytest.mark.parametrize("penalty", [None, GradientPenalty(coefficient=0.1, method="central")])
def test_layers_that_were_replaced_are_averaged_and_restored(penalty):
    x, y = data()
    model, fresh = mlp(nn.BatchNorm1d(16)), mlp(nn.BatchNorm1d(16))
    index = next(i for i, m in enumerate(model) if isinstance(m, nn.BatchNorm1d))
    closure = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=penalty)
    closure()
    model[index] = nn.BatchNorm1d(16).double()
    closure()
    FullBatchClosure(fresh, F.cross_entropy, chunked(x, y), penalty=penalty)()
    assert_bits(model, state_bits(fresh))


def test_a_closure_of_another_thread_on_the_same_model_is_refused():
    """It would take the shifted parameters for theta, and put them back as such."""
    x, y = data()
    model, errors = mlp(), []
    other = FullBatchClosure(model, F.cross_entropy, chunked(x, y), penalty=PENALTIES[1])

    def meddle():
        try:
            other()
        except RuntimeError as error:
            errors.append(str(error))

    def loss_fn(output, target):
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        return F.cross_entropy(output, target)

    before = state_bits(model)
    FullBatchClosure(model, loss_fn, chunked(x, y), penalty=PENALTIES[1])()
    assert errors and all("another thread's FullBatchClosure" in error for error in errors)
    assert_bits(model, before)
    other()


def test_two_losses_of_evaluate_are_refused():
    """The second one has the place of aux, and would not be differentiated."""
    x, y = data()

    def evaluate(model, chunk):
        output = model(chunk[0])
        return F.cross_entropy(output, chunk[1]), output.square().mean()

    with pytest.raises(TypeError, match=r"two losses for chunk 0.*return their sum"):
        FullBatchClosure(mlp(), evaluate=evaluate, chunks=chunked(x, y))()
    seen = []
    options = {"evaluate": evaluate, "chunks": chunked(x, y), "penalty": PENALTIES[1]}
    FullBatchClosure(mlp(), observe=lambda aux, chunk: seen.append(aux), **options)()
    assert len(seen) == 5 and not any(aux.requires_grad for aux in seen)


def test_double_backward_of_a_compiled_loss_names_the_methods():
    x, y = data()
    loss_fn = torch.compile(lambda o, t: F.cross_entropy(o, t).square(), backend="aot_eager")
    penalty = GradientPenalty(coefficient=0.1, method="exact")
    with pytest.raises(RuntimeError, match="use method='forward' or 'central'"):
        FullBatchClosure(mlp(), loss_fn, chunked(x, y), penalty=penalty)()


REPLACED = {
    "chunks": (DataLoader(range(8), batch_size=2, shuffle=True), ValueError, "shuffle=False"),
    "chunk_max_norm": (-1.0, ValueError, "chunk_max_norm must be greater than 0"),
    "penalty": (0.5, TypeError, "penalty must be a GradientPenalty"),
    "backward": (1, TypeError, "backward must be True or False"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_an_argument_that_is_replaced_is_checked_like_a_new_one(name):
    value, kind, match = REPLACED[name]
    model, chunks = nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))]
    closure = FullBatchClosure(model, F.mse_loss, chunks, penalty=GradientPenalty(coefficient=0.1))
    loss, before = closure(), getattr(closure, name)
    setattr(closure, name, value)
    for call in (closure, closure.loss_only):
        with pytest.raises(kind, match=match):
            call()
    setattr(closure, name, before)
    assert closure() == loss and closure.step == 2
