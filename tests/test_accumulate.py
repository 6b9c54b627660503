"""GradientAccumulator: weighted means over chunks."""

from __future__ import annotations

import copy
import gc
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fbopt import GradientAccumulator
from fbopt._engine import chunk_addition


def params(*dtypes):
    return [nn.Parameter(torch.randn(3, 4).to(d)) for d in dtypes]


def test_mean_is_weighted():
    ps = params(torch.float64, torch.float64)
    accumulator = GradientAccumulator(ps)
    chunks = [([torch.randn_like(p) for p in ps], n) for n in (8, 8, 3)]
    for grads, n in chunks:
        accumulator.add(grads, n)
    wanted = [sum(n * g[i] for g, n in chunks) / 19 for i in range(2)]
    torch.testing.assert_close(accumulator.mean(), wanted, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(accumulator.mean(), wanted, rtol=1e-14, atol=1e-15)


def test_a_new_sum_begins_after_mean():
    ps = params(torch.float32)
    accumulator = GradientAccumulator(ps)
    accumulator.add([torch.ones(3, 4)], 2)
    accumulator.mean()
    accumulator.add([torch.full((3, 4), 5.0)], 4)
    assert torch.equal(accumulator.mean()[0], torch.full((3, 4), 5.0))


def test_missing_gradients_count_as_zero_and_stay_none_if_never_seen():
    ps = params(*[torch.float32] * 3)
    accumulator = GradientAccumulator(ps)
    accumulator.add([torch.ones(3, 4), None, None])
    accumulator.add([torch.ones(3, 4), torch.ones(3, 4), None])
    mean = accumulator.mean()
    assert torch.equal(mean[0], torch.ones(3, 4))
    assert torch.equal(mean[1], torch.full((3, 4), 0.5))
    assert mean[2] is None


def test_mixed_dtypes_keep_their_own():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    ps = params(*dtypes)
    accumulator = GradientAccumulator(ps)
    for _ in range(1000):
        accumulator.add([torch.full_like(p, 0.001) for p in ps], 1)
    for mean, dtype in zip(accumulator.mean(), dtypes, strict=True):
        assert mean.dtype == dtype
        exact = torch.tensor(0.001, dtype=dtype).double()
        # A thousand additions round in float32; the float64 ones far less.
        rounding = max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 2e-5)
        assert mean.double().sub(exact).abs().max() <= rounding * exact
    assert [s.dtype for s in accumulator._sums.views].count(torch.float32) == 3


def test_gradients_in_any_memory_layout():
    p = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    accumulator = GradientAccumulator([p])
    g = torch.randn(2, 3, 4, 5)
    accumulator.add([g], 1)
    accumulator.add([g.to(memory_format=torch.channels_last)], 1)
    accumulator.add([g[:, :1].expand(2, 3, 4, 5)], 2)
    wanted = (2 * g + 2 * g[:, :1]) / 4
    torch.testing.assert_close(accumulator.mean()[0], wanted)
    assert accumulator.mean()[0].stride() == p.stride()


def test_example_of_the_docstring():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    accumulator = GradientAccumulator(model.parameters())
    for a, b in zip(x.split(4), y.split(4), strict=True):
        loss = nn.functional.mse_loss(model(a), b)
        accumulator.add(torch.autograd.grad(loss, accumulator.params), weight=len(a))
    for p, g in zip(accumulator.params, accumulator.mean(), strict=True):
        p.grad = g
    wanted = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted))


def test_mean_of_nothing():
    with pytest.raises(RuntimeError, match="nothing was added"):
        GradientAccumulator(params(torch.float32)).mean()
    accumulator = GradientAccumulator(params(torch.float32))
    accumulator.add([torch.ones_like(p) for p in accumulator.params])
    accumulator.reset()
    with pytest.raises(RuntimeError, match="nothing was added"):
        accumulator.mean()


def test_a_weight_that_is_not_given_is_one():
    (p,) = params(torch.float64)
    accumulator = GradientAccumulator([p])
    with accumulator.chunk():
        p.sum().backward()
    accumulator.add([torch.full_like(p, 2.0)])
    accumulator.backward(3 * p.sum())
    assert accumulator.total_weight == 3
    (mean,) = accumulator.mean()
    assert torch.equal(mean, torch.full_like(p, 2.0))


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
def test_passes_in_which_nothing_is_added_end(accumulation):
    accumulator = GradientAccumulator(params(torch.float32), accumulation)
    accumulator.add([torch.ones_like(p) for p in accumulator.params])
    assert list(accumulator.passes()) == [0]
    assert accumulator.total_weight == 0


def test_ten_thousand_chunks_stay_accurate():
    p = nn.Parameter(torch.zeros(64))
    accumulator = GradientAccumulator([p])
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(64, dtype=torch.float64)
    for _ in range(10_000):
        g = torch.randn(64, generator=generator)
        total += g.double()
        accumulator.add([g])
    error = (accumulator.mean()[0].double() - total / 10_000).abs().max()
    assert error < 1e-6


# --- chunk(): gradients taken as loss.backward() makes them --------------------------------------


class Net(nn.Module):
    """A tied weight, a parameter that no chunk uses, and a frozen one."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 3)
        self.unused, self.frozen = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(5))
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.inner(x)) + self.frozen
        return self.outer(x)


class Checkpointed(Net):
    """The same, with reentrant checkpoints: the inner layer's gradient comes in two parts."""

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.inner(x)) + self.frozen, x, use_reentrant=True)
        return checkpoint(self.outer, x, use_reentrant=True)


def chunks(dtype=torch.float64, sizes=(4, 4, 3)):
    torch.manual_seed(1)
    return [(torch.randn(n, 5, dtype=dtype), torch.randn(n, 3, dtype=dtype)) for n in sizes]


def loss_of(model, chunk):
    return nn.functional.mse_loss(model(chunk[0]), chunk[1])


def assert_mean(model, data, tolerance=1e-13):
    """p.grad is the gradient of the mean over all samples of the chunks, by one plain pass."""
    plain = Net()
    plain.load_state_dict(model.state_dict())
    x, y = (torch.cat([chunk[i] for chunk in data]).double() for i in (0, 1))
    loss_of(plain, (x, y)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert (p.grad.double() - q.grad).norm() <= tolerance * q.grad.norm()


@pytest.mark.parametrize("kind", [Net, Checkpointed])
@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("batch", [1, 10**9])
def test_chunk_takes_what_backward_makes(kind, accumulation, batch, monkeypatch):
    monkeypatch.setattr(chunk_addition, "BATCH_BYTES", batch)
    model, data = kind(), chunks()
    accumulator = GradientAccumulator(model.parameters(), accumulation)
    for _ in range(2):  # the second time p.grad holds the first mean
        for _ in accumulator.passes():
            for chunk in data:
                with accumulator.chunk(weight=len(chunk[0])):
                    loss_of(model, chunk).backward()
                    assert all(p.grad is None for p in model.parameters())
        assert accumulator.total_weight == 11
        accumulator.to_grad()
        assert_mean(model, data)


def test_many_small_tensors_share_a_buffer():
    torch.manual_seed(0)
    model, data = nn.Sequential(*(nn.Linear(5, 5) for _ in range(12))).double(), chunks()
    targets = [(x, x.roll(1, 1)) for x, _ in data]
    for accumulation in ("float32", "exact"):
        accumulator = GradientAccumulator(model.parameters(), accumulation)
        for _ in accumulator.passes():
            for x, y in targets:
                accumulator.backward(nn.functional.mse_loss(model(x), y), torch.tensor(len(x)))
        accumulator.to_grad()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        x, y = (torch.cat([pair[i] for pair in targets]) for i in (0, 1))
        wanted = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
        torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-14)


def test_exact_chunks_have_the_same_bits_in_any_order():
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        model, data = Net(torch.float32), chunks(torch.float32)
        accumulator = GradientAccumulator(model.parameters(), "exact")
        for _ in accumulator.passes():
            for i in order:
                accumulator.backward(loss_of(model, data[i]), weight=len(data[i][0]))
        found.append([g.clone() for g in accumulator.mean() if g is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_parameters_keep_float32_sums():
    model, data = Net(torch.bfloat16), chunks(torch.bfloat16, (2,) * 200)
    layer, accumulator = model.inner, GradientAccumulator(model.parameters())
    wanted = [torch.zeros(p.shape, dtype=torch.float64) for p in layer.parameters()]
    for chunk in data:
        grads = torch.autograd.grad(loss_of(model, chunk), list(layer.parameters()))
        for total, g in zip(wanted, grads, strict=True):
            total += g.double() / len(data)
        loss_of(model, chunk).backward()
    plain = [p.grad.double() / len(data) for p in layer.parameters()]
    model.zero_grad()
    for _ in range(2):  # the second time the copies that to_grad() made are dropped
        for chunk in data:
            accumulator.backward(loss_of(model, chunk))
        accumulator.to_grad()
        gc.collect()
    for p, rounded, exact in zip(layer.parameters(), plain, wanted, strict=True):
        assert p.grad.dtype == torch.bfloat16
        error = (p.grad.double() - exact).norm()
        assert error <= 2**-8 * exact.norm() and error < (rounded - exact).norm() / 3


@pytest.mark.filterwarnings("ignore:Using backward")
def test_several_backward_passes_make_one_chunk():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    for chunk in data:
        with accumulator.chunk(len(chunk[0])):
            loss = loss_of(model, chunk)
            (0.25 * loss).backward(retain_graph=True)
            (0.75 * loss).backward(create_graph=True)
    accumulator.to_grad()
    assert not any(p.grad.requires_grad for p in model.inner.parameters())
    assert_mean(model, data)


def test_requires_grad_may_change_between_chunks():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    accumulator.backward(loss_of(model, data[0]), 4)
    expected = torch.autograd.grad(loss_of(model, data[0]), model.outer.weight)[0]
    model.outer.weight.requires_grad_(False)
    accumulator.backward(loss_of(model, data[1]), 12)
    accumulator.to_grad()
    torch.testing.assert_close(model.outer.weight.grad, expected / 4)
    accumulator.backward(loss_of(model, data[2]))
    accumulator.to_grad()
    assert model.outer.weight.grad is None  # a frozen layer is not stepped on an old gradient


def test_a_chunk_of_weight_zero_is_dropped():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    with accumulator.chunk(0):
        (loss_of(model, data[0]) * float("nan")).backward()
    with pytest.raises(RuntimeError, match="weight 0 alone"):
        accumulator.mean()
    for chunk in data:
        accumulator.backward(loss_of(model, chunk), len(chunk[0]))
    accumulator.add([torch.full_like(p, float("nan")) for p in accumulator.params], weight=0)
    accumulator.to_grad()
    assert_mean(model, data)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), True, "3", torch.ones(2)])
def test_weights_that_are_refused(weight):
    model = Net()
    accumulator = GradientAccumulator(model.parameters())
    for call in (
        lambda: accumulator.backward(model(torch.ones(1, 5).double()).sum(), weight),
        lambda: accumulator.add([None] * 6, weight),
    ):
        with pytest.raises((TypeError, ValueError), match="weight must be"):
            call()
    assert accumulator.total_weight == 0


def test_an_old_gradient_is_refused_and_kept():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    loss_of(model, data[0]).backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    with pytest.raises(ValueError, match="zero_grad"), accumulator.chunk():
        raise AssertionError("not reached")
    for p, g in zip(model.parameters(), before, strict=True):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    model.zero_grad()
    for chunk in data:
        accumulator.backward(loss_of(model, chunk), len(chunk[0]))
    accumulator.to_grad()
    assert_mean(model, data)


def test_gradients_in_the_memory_of_the_last_mean_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    accumulator = GradientAccumulator(model.parameters())
    accumulator.backward(model(x).square().mean())
    accumulator.to_grad()
    model.zero_grad(set_to_none=False)  # keeps p.grad in the memory of the sums
    model(x).square().mean().backward()
    with pytest.raises(ValueError, match=r"grads\[0\] lies in the accumulator's memory"):
        accumulator.add([p.grad for p in model.parameters()], 8)


def test_a_reset_takes_gradients_out_of_the_sums():
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    accumulator = GradientAccumulator(model.parameters())
    accumulator.backward(model(x).square().mean())
    accumulator.to_grad()
    accumulator.reset()
    model.zero_grad(set_to_none=False)
    model(x).square().mean().backward()  # adds to p.grad, which was the memory of the sums
    expected = [p.grad.clone() for p in model.parameters()]
    accumulator.add([p.grad for p in model.parameters()], 8)
    for mean, g in zip(accumulator.mean(), expected, strict=True):
        torch.testing.assert_close(mean, g)


def test_a_loss_that_is_not_one_number_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError, match=r"loss must be one number, the mean, not of shape \(4, 2\)"
    ):
        GradientAccumulator(model.parameters()).backward(model(torch.randn(4, 3)))


def test_an_error_before_gradients_are_added_changes_nothing():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    for chunk in data:
        with pytest.raises(ZeroDivisionError), accumulator.chunk(99):
            loss_of(model, chunk).backward()  # what is small still waits, and is dropped
            raise ZeroDivisionError
        accumulator.backward(loss_of(model, chunk), len(chunk[0]))
    accumulator.to_grad()
    assert_mean(model, data)


def test_an_error_half_way_has_to_be_reset(monkeypatch):
    monkeypatch.setattr(chunk_addition, "BATCH_BYTES", 1)
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    with pytest.raises(ZeroDivisionError), accumulator.chunk():
        loss_of(model, data[0]).backward()
        raise ZeroDivisionError
    assert all(p.grad is None for p in model.parameters())
    for use in (
        accumulator.mean,
        accumulator.to_grad,
        lambda: accumulator.add([None] * 6),
        lambda: accumulator.chunk().__enter__(),
    ):
        with pytest.raises(RuntimeError, match=r"half-way.*reset\(\)"):
            use()
    accumulator.reset()
    for chunk in data:
        accumulator.backward(loss_of(model, chunk), len(chunk[0]))
    accumulator.to_grad()
    assert_mean(model, data)


def test_nested_and_threaded_chunks_are_refused():
    model, data = Net(), chunks()
    accumulator, other = (GradientAccumulator(model.parameters()) for _ in range(2))
    outer = GradientAccumulator(model.outer.parameters())
    errors = []

    def enter(taker):
        try:
            with taker.chunk():
                loss_of(model, data[0]).backward()
        except RuntimeError as error:
            errors.append(str(error))

    with accumulator.chunk():
        for taker in (accumulator, other, outer):
            enter(taker)
            thread = threading.Thread(target=enter, args=[taker])
            thread.start()
            thread.join()
        for use in (accumulator.mean, accumulator.reset, accumulator.to_grad):
            with pytest.raises(RuntimeError, match="is open"):
                use()
        loss_of(model, data[0]).backward()
    assert len(errors) == 6
    accumulator.to_grad()
    assert_mean(model, data[:1])
    with pytest.raises(ValueError, match="zero_grad"):
        enter(other)  # whose mean is not this one's to drop


def test_a_chunk_without_gradient_is_an_error():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    with pytest.raises(RuntimeError, match="inside the with block"), accumulator.chunk():
        torch.autograd.grad(loss_of(model, data[0]), model.outer.weight)
    assert accumulator.total_weight == 0


def test_gradients_that_hooks_do_not_see_are_refused():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    with pytest.raises(RuntimeError, match=r"hooks did not see"), accumulator.chunk():
        loss_of(model, data[0]).backward()
        model.unused.grad = torch.ones(2, dtype=torch.float64)
    hook = model.inner.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match="another post-accumulate-grad hook"):
        accumulator.backward(loss_of(model, data[0]))
    hook.remove()
    table = nn.Embedding(9, 4, sparse=True)
    with pytest.raises(TypeError, match="sparse=False"):
        GradientAccumulator(table.parameters()).backward(table(torch.arange(3)).sum())


def test_hooks_are_gone_after_a_chunk():
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())
    accumulator.backward(loss_of(model, data[0]))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, data[0]).backward()
    assert model.outer.weight.grad is not None


@pytest.mark.parametrize("how", ["chunk", "backward"])
def test_the_caller_may_be_compiled(how):
    model, data = Net(), chunks()
    accumulator = GradientAccumulator(model.parameters())

    def visit(chunk):
        if how == "backward":
            accumulator.backward(loss_of(model, chunk), len(chunk[0]))
        else:
            with accumulator.chunk(len(chunk[0])):
                loss_of(model, chunk).backward()

    compiled = torch.compile(visit, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about what it traces
        for chunk in data:
            compiled(chunk)
    accumulator.to_grad()
    assert_mean(model, data)
