"""FullBatchClosure(vectorize=K): K chunks at once give what they give one by one, in float64 to
1e-12: the gradient, the loss, the mean of ||g||^2, BatchNorm's statistics and what is observed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from at_once import METHODS, chunked, make, mlp, outcome, require_equal, require_same
from torch import nn
from torch.nn.utils import parametrizations

from fbopt import GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = (2, 3, 8, 100)  # of 9 chunks, of which the last one has but two samples


def ragged(shape=(5,)):
    return chunked(n=34, size=4, shape=shape)


def conv(*extra):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), *extra, nn.ReLU(), nn.Conv2d(6, 4, 3)
    layers = *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def deep():
    """Many small tensors, which are packed."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(9)]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def halves():
    """Sums in two buckets, of float32 and of float64."""
    model = mlp(Cast(torch.float32), nn.Linear(6, 6), Cast(torch.float64))
    model[2].float()
    return model


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


NETWORKS = {
    "mlp": (lambda: mlp(nn.BatchNorm1d(6)), (5,)),
    "conv": (lambda: conv(nn.BatchNorm2d(6)), (3, 5, 5)),
    "deep": (deep, (5,)),
}
# Each count and each way to add up with each method and network once, rather than all of all.
SUMS = [("float32", None), ("exact", None), ("float32", 0.3), ("exact", 0.3)]
CASES = [
    (name, method, COUNTS[(i + k) % 4], *SUMS[(i + k + j) % 4])
    for i, name in enumerate(NETWORKS)
    for k, method in enumerate(METHODS)
    for j in range(2)
]


@pytest.mark.parametrize("name, method, count, accumulation, bound", CASES)
def test_equals_one_by_one(name, method, count, accumulation, bound):
    build, shape = NETWORKS[name]
    given = {"method": method, "accumulation": accumulation, "chunk_max_norm": bound}
    require_same(build(), ragged(shape), count, observed=True, **given)


class Twice(nn.Module):
    """One normalisation in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = layer, nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        found = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else None
        return self.last((self.layer(x) if found is None else found).mean(1))


class Dots(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.project(x).chunk(3, -1), is_causal=True)


def encoder(dropout=0.0):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)


def normed(norm):
    return lambda: mlp(norm())


def old_weight_norm():
    model = mlp()
    model[0] = torch.nn.utils.weight_norm(model[0])
    return model


def parametrised(how):
    def build():
        model = mlp()
        model[0] = how(model[0])
        return model

    return build


class Inside(nn.Module):
    """Derivatives by the input, and a branch on shapes; and what it stores is read in the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()
        self.stored, self.all = None, []

    def forward(self, x):
        self.all.clear()
        slope = torch.func.jacrev(lambda z: self.net(z).sum(0))(x).square().sum((0, 2))
        self.stored = slope.mean()
        self.all.append(self.stored)
        return self.net(x if len(x) > 1 else -x) + slope[:, None]


class Clamped(nn.Module):
    """In-place operations on its own tensors."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        h = self.net(x).clone()
        h[:, 0] = 0
        return h.mul_(2).sort(1).values


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Own(nn.Module):
    def forward(self, x):
        return Square.apply(x)


FLAT, IMAGE, SEQUENCE, TOKENS = (5,), (3, 5, 5), (4, 8), None
NO_SECOND = {"sdpa", "transformer", "transformer in eval mode", "weight_norm", "embedding bag"}
MODELS = {
    "BatchNorm without affine": (normed(lambda: nn.BatchNorm1d(6, affine=False)), FLAT),
    "BatchNorm, momentum None": (normed(lambda: nn.BatchNorm1d(6, momentum=None)), FLAT),
    "BatchNorm in eval mode": (normed(lambda: nn.BatchNorm1d(6).eval()), FLAT),
    "BatchNorm without statistics": (
        normed(lambda: nn.BatchNorm1d(6, track_running_stats=False)),
        FLAT,
    ),
    "BatchNorm twice": (Twice, FLAT),
    "LayerNorm": (normed(lambda: nn.LayerNorm(6)), FLAT),
    "GroupNorm": (lambda: conv(nn.GroupNorm(2, 6)), IMAGE),
    "InstanceNorm": (lambda: conv(nn.InstanceNorm2d(6, affine=True)), IMAGE),
    "InstanceNorm with statistics": (
        lambda: conv(nn.InstanceNorm2d(6, track_running_stats=True)),
        IMAGE,
    ),
    "max pooling": (lambda: conv(nn.MaxPool2d(2, 1)), IMAGE),
    "channels_last": (
        lambda: conv(nn.BatchNorm2d(6)).to(memory_format=torch.channels_last),
        IMAGE,
    ),
    "dropout in eval mode": (lambda: mlp(nn.Dropout()).eval(), FLAT),
    "embedding": (lambda: embedding(nn.Embedding(7, 5, padding_idx=1)), TOKENS),
    "embedding bag": (lambda: embedding(nn.EmbeddingBag(7, 5)), TOKENS),
    "attention": (lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCE),
    "sdpa": (lambda: Attention(Dots()), SEQUENCE),
    "transformer": (lambda: Attention(encoder()), SEQUENCE),
    "transformer in eval mode": (lambda: Attention(encoder(0.5)).eval(), SEQUENCE),
    "weight_norm": (parametrised(parametrizations.weight_norm), FLAT),
    "spectral_norm in eval mode": (
        lambda: parametrised(parametrizations.spectral_norm)().eval(),
        FLAT,
    ),
    "custom function": (lambda: mlp(Own()), FLAT),
    "derivatives inside": (Inside, FLAT),
    "in place": (Clamped, FLAT),
    "two dtypes": (halves, FLAT),
}


def embedding(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer, Pooled(), nn.Linear(5, 3)).double()


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1) if x.dim() == 3 else x


def chunks_for(shape):
    if shape is not None:
        return chunked(n=26, shape=shape)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(7, (26, 4), generator=generator)
    return [(t, y) for t, (_, y) in zip(tokens.split(4), chunked(26), strict=True)]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_by_one_for_models_of_all_kinds(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, given = build(), {}
    if name == "derivatives inside":
        given["evaluate"] = lambda model, chunk: (
            F.cross_entropy(model(chunk[0]), chunk[1]) + 0.1 * model.stored + 0.1 * model.all[0]
        )
    tolerance = 1e-6 if name == "two dtypes" else 1e-12
    for method in ("forward", "exact"):
        if method == "forward" or name not in NO_SECOND:
            require_same(model, chunks_for(shape), 3, tolerance, method=method, **given)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["forward", "central"])
def test_weights_that_hooks_compute_are_those_of_the_parameters_afterwards(method):
    """The older weight_norm sets an attribute; a model that has run cannot be copied."""
    results = []
    for count in (1, 3):
        model = mlp()
        model[0] = torch.nn.utils.weight_norm(model[0])
        loss = make(model, chunked(), method=method, vectorize=count)()
        results.append([loss, *(p.grad for p in model.parameters())])
    weight = torch._weight_norm(model[0].weight_v, model[0].weight_g, 0)
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_differentiated_once():
    """By torch.func: of its second derivatives terms would be lost."""
    model = torch.jit.script(mlp())
    require_same(model, chunked(), method="forward")
    with pytest.raises(RuntimeError, match=r"another product H g reaches.*pass vectorize=1"):
        make(model, chunked(), method="exact", vectorize=3)()


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half parameters"])
def test_half_precision(autocast, accumulation):
    """The forward passes alone, both in the same precision; gradients add up in float32."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model = mlp(nn.Linear(6, 6)).to(dtype)
    chunks = [(x.to(dtype), y) for x, y in ragged()]
    given = {"autocast": torch.bfloat16} if autocast else {}
    given |= {"accumulation": accumulation, "penalty": GradientPenalty(coefficient=1.0, radius=0.5)}
    found, expected = (outcome_in_half(model, chunks, vectorize=count, **given) for count in (3, 1))
    assert (found - expected).norm() <= 0.02 * expected.norm()


def outcome_in_half(model, chunks, **given):
    penalty = given.pop("penalty")
    closure = make(model, chunks, lambda o, t: F.cross_entropy(o.float(), t), **given)
    closure.penalty = penalty
    closure()
    assert all(s.dtype == torch.float32 for s in closure.sums.views)
    return torch.cat([p.grad.double().reshape(-1) for p in model.parameters()])


def test_the_callers_autocast_is_that_of_the_argument():
    model = mlp().float()
    chunks = [(x.float(), y) for x, y in ragged()]
    results = []
    for outer, inner in itertools.product([False, True], [None, torch.bfloat16]):
        closure = make(model, chunks, method="forward", autocast=inner, vectorize=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            results.append([closure(), *(p.grad.clone() for p in model.parameters())])
    for other in results[2:]:
        torch.testing.assert_close(other, results[1], rtol=0, atol=0)
    assert not torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_in_its_chunk(method, value):
    model, chunks = mlp(), [(x.clone(), y) for x, y in chunked()]
    chunks[1][0].fill_(value)
    found, expected = (
        outcome(model, chunks, method=method, vectorize=count, observed=True) for count in (3, 1)
    )
    require_equal(found, expected)
    assert [bool(output.isfinite().all()) for output, _ in found.shown].count(False) <= 1
    assert value > 1e100 or not found.scalars[0].isfinite()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", [[1], range(6)], ids=["one", "all"])
def test_gradients_of_zero_are_not_perturbed(which, method):
    model = nn.Linear(5, 3).double()
    nn.init.zeros_(model.bias)
    chunks = [(x, x[:, :3].sin()) for x, _ in chunked()]
    for i in which:
        chunks[i] = tuple(torch.zeros_like(t) for t in chunks[i])
    found = require_same(model, chunks, loss_fn=F.mse_loss, method=method)
    assert all(g.isfinite().all() for g in found.grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_minimum_is_no_difference(method, dtype):
    """There gradients are rounding alone, and other ones together than by themselves."""
    x = torch.cat([x for x, _ in chunked()])
    y = x[:, :3].sin()
    model = nn.Linear(5, 3, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    chunks = [(x, y), (x.flip(0), y.flip(0)), (x.roll(1, 0), y.roll(1, 0))]
    found = outcome(model, chunks, loss_fn=F.mse_loss, method=method, vectorize=3)
    assert found.grads[0].norm() < 100 * torch.finfo(dtype).eps
