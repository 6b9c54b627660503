"""What cannot be worked on at once is refused in words that help, and nothing is changed: neither
parameters nor buffers, generators or attributes. One by one all of these work.
"""

from __future__ import annotations

import copy
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from at_once import chunked, make, mlp, outcome
from conftest import bits
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Middle(nn.Module):
    """A network that does something with its hidden layer."""

    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.act = nn.Linear(5, 6), nn.Linear(6, 3), Act(act)
        self.double()

    def forward(self, x):
        return self.last(self.act(torch.tanh(self.first(x))))


class Act(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.calls, self.previous = act, 0, None
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", None)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return self.act(self, h) * self.scale


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class OtherRule(NoRule):
    """Mixes chunks."""

    @staticmethod
    def vmap(info, in_dims, x):
        return OtherRule.apply(x.sum(0, keepdim=True).expand_as(x)), 0


class OtherScale(torch.autograd.Function):
    """x * s, whose rule is wrong where s differs from chunk to chunk: in the shifted passes."""

    @staticmethod
    def forward(x, s):
        return x * s

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, (g * x).sum()

    @staticmethod
    def vmap(info, in_dims, x, s):
        return Scaled.apply(x, s[0] if in_dims[1] is not None else s), 0


class Scaled(OtherScale):
    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, (g * x).sum(tuple(range(1, g.dim())))

    @staticmethod
    def vmap(info, in_dims, x, s):
        return x * s, 0


def counts(module, h):
    module.count += 1
    return h


def replaces(module, h):
    module.count = module.count + 1
    return h


def remembers_in_a_buffer(module, h):
    module.table = h.detach()
    return h


def remembers(module, h):
    before, module.previous = module.previous, h.detach()
    return h if before is None or before.shape != h.shape else h + 0.1 * before


def calls(module, h):
    module.calls += 1
    return h * module.calls


def overwrites_its_weight(module, h):
    module.scale.data.mul_(1.0001)
    return h


def wide(module, h):
    z = torch.zeros(h.shape, dtype=h.dtype)
    z += h
    return z


def inner_gradient(module, h):
    z = h.detach().requires_grad_()
    return h + torch.autograd.grad(z.pow(3).sum(), z)[0]


own_generator = torch.Generator()
INSIDE = r"chunks 0 to 2 cannot be worked on at once by torch.func.vmap \(Act act\)"
MIXED = r"chunk \d gives something else together with others than by itself: "
ACTS = {
    "branch": (lambda m, h: h if h.sum() > 0 else -h, f"{INSIDE}.*data-dependent"),
    "stochastic depth": (lambda m, h: h if torch.rand(()) > 0.5 else -h, INSIDE),
    "item": (lambda m, h: h * h.mean().item(), f"{INSIDE}.*item"),
    "numpy": (lambda m, h: h * torch.from_numpy(h.detach().numpy() > 0), INSIDE),
    "boolean mask": (lambda m, h: h + h[h > 0].mean(), f"{INSIDE}.*mask"),
    "in place": (wide, INSIDE),
    "checkpoint": (lambda m, h: checkpoint(torch.tanh, h, use_reentrant=False), INSIDE),
    "autograd.grad": (inner_gradient, INSIDE),
    "rrelu": (lambda m, h: F.rrelu(h, training=True), INSIDE),
    "no setup_context": (lambda m, h: Square.apply(h), INSIDE),
    "no rule": (lambda m, h: NoRule.apply(h), INSIDE),
    "wrong rule": (lambda m, h: OtherRule.apply(h), f"{MIXED}its loss is"),
    "writes to a buffer": (counts, r"Act writes to its buffer act\.count"),
    "replaces a buffer": (replaces, r"Act writes to its buffer act\.count"),
    "fills a buffer": (remembers_in_a_buffer, r"Act writes to its buffer act\.table"),
    "a cache": (remembers, MIXED),
    "a counter": (calls, f"{MIXED}its loss"),
    "its own weight": (overwrites_its_weight, MIXED),
    "Python's numbers": (lambda m, h: h * (1 + random.random()), "Python's or NumPy's random"),
    "NumPy's numbers": (lambda m, h: h * (1 + np.random.rand()), "Python's or NumPy's random"),
    "a generator": (lambda m, h: h * torch.rand(h.shape, generator=own_generator), MIXED),
}


@pytest.mark.parametrize("method", [None, "forward"])
@pytest.mark.parametrize("name", ACTS)
def test_of_a_module(name, method):
    act, match = ACTS[name]
    if name == "its own weight":
        outcome(Middle(act), chunked())  # one by one it goes through
        with pytest.raises(RuntimeError, match=f"(?s){match}.*pass vectorize=1"):
            make(Middle(act), chunked(), method=method, vectorize=3)()
        return
    model = Middle(act)
    if name == "fills a buffer":
        outcome(model, chunked()[:1])
        model.act.table = torch.zeros(4, 6)
    require_refused(model, rf"(?s){match}.*pass vectorize=1", method=method)


def require_refused(model, match, error=RuntimeError, works=True, **given):
    """The error, twice, with all as before; one by one there is none."""
    chunks = given.pop("chunks", None) or chunked()
    if works:
        outcome(model, chunks, **given)
    closure = make(model, chunks, vectorize=3, **given)
    before, keys = bits(model, torch.get_rng_state()), [*map(sorted, map(vars, model.modules()))]
    for _ in range(2):
        with pytest.raises(error, match=match):
            closure()
        assert closure.step == 0 and all(p.grad is None for p in model.parameters())
    assert bits(model) == before[:1] and keys == [*map(sorted, map(vars, model.modules()))]
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(b) for b in model.buffers())
    copy.deepcopy(model)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = kind(5, 6, batch_first=True), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.last(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_of_recurrent_layers(kind):
    match = rf"\({kind.__name__} layer\).*pass vectorize=1"
    require_refused(Recurrent(kind), match, chunks=chunked(shape=(4, 5)))


def test_of_spectral_norm():
    model = mlp()
    model[0] = parametrizations.spectral_norm(model[0])
    match = r"_SpectralNorm writes to its buffer 0\.parametrizations\.weight\.0\._u"
    require_refused(model, match, method="forward")


def test_of_backward_hooks():
    model = mlp()
    model[1].register_full_backward_hook(lambda module, *grads: None)
    require_refused(model, r"\(Tanh 1\).*pass vectorize=1")


def test_of_hooks_on_parameters_also_later():
    """They change the gradients one by one, and torch.func would not call them."""
    model = mlp()
    closure = make(model, chunked(), vectorize=3)
    closure()
    handle = model[0].bias.register_hook(lambda g: 0.99 * g)
    with pytest.raises(RuntimeError, match=r"parameter 0\.bias has a hook.*pass vectorize=1"):
        closure()
    handle.remove()
    closure()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_parameters_that_come_from_outside_of_the_model(dtype):
    """However little they add: their gradient would be lost without a word."""
    model = mlp().to(dtype)
    params = list(model.parameters())
    chunks = [(x.to(dtype), y) for x, y in chunked()]

    def decayed(model, chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1]) + 1e-7 * params[0].square().sum()

    match = r"uses parameter 0\.weight in another way.*evaluate.*pass vectorize=1"
    require_refused(model, match, evaluate=decayed, chunks=chunks)

    def from_the_model(model, chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1]) + 1e-7 * model[0].weight.square().sum()

    outcome(model, chunks, evaluate=from_the_model, vectorize=3)


def test_of_values_from_outside_of_the_model_that_the_shifted_passes_miss():
    """The value of a parameter without its gradient: right at theta, and wrong at other points."""
    model = mlp()
    weight = model[0].weight

    def scaled(model, chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1]) * weight.detach().norm()

    outcome(model, chunked(), evaluate=scaled, vectorize=3)
    require_refused(model, f"{MIXED}.*pass vectorize=1", evaluate=scaled, method="forward")


@pytest.mark.parametrize("method", ["forward", "central"])
def test_of_rules_that_fail_at_shifted_points_alone(method):
    model = Middle(lambda m, h: OtherScale.apply(h, m.scale))
    outcome(model, chunked(), vectorize=3)
    require_refused(model, f"{MIXED}.*pass vectorize=1", method=method)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_of_branches_that_depend_on_parameters(method):
    """They differ from chunk to chunk at shifted points alone."""
    model = Middle(lambda m, h: h if m.scale > 0 else -h)
    outcome(model, chunked(), vectorize=3)
    require_refused(model, f"(?s){INSIDE}.*pass vectorize=1", method=method)


def test_of_tensors_that_are_no_parameters_of_the_model():
    model, constant = mlp(), nn.Parameter(torch.ones(()))
    given = {"params": [*model.parameters(), constant]}
    given["evaluate"] = lambda model, chunk: (model(chunk[0]) - constant).square().mean()
    with pytest.raises(ValueError, match=r"params\[4\].*no parameter of the model.*vectorize=1"):
        make(model, chunked(), vectorize=3, **given)()


@pytest.mark.parametrize(
    "chunk, match",
    [
        ((np.zeros((2, 5)), torch.zeros(2)), "holds a ndarray"),
        ((torch.eye(5).to_sparse(), torch.zeros(5)), "holds a torch.sparse_coo tensor"),
        ((torch.zeros(2, 5), slice(2)), "holds a slice"),
    ],
)
def test_of_chunks_that_hold_other_things(chunk, match):
    given = {"evaluate": lambda model, chunk: model(chunk[0]), "weight": lambda chunk: 1}
    with pytest.raises(TypeError, match=f"chunk 1 {match}.*vectorize=2.*pass vectorize=1"):
        make(mlp(), [chunked()[0], chunk], vectorize=2, **given)()


@pytest.mark.parametrize("aux", [3, "text", [1.0], {"a": object()}])
def test_of_observed_things_that_are_no_tensors(aux):
    def evaluate(model, chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1]), aux

    match = "what is observed of chunk 0 holds.*pass vectorize=1"
    given = {"evaluate": evaluate, "observe": lambda *shown: None}
    require_refused(mlp(), match, error=TypeError, works=False, **given)
    outcome(mlp(), chunked(), evaluate=evaluate, vectorize=3)  # which nobody looks at


class Refilled:
    """Fills the same memory for every chunk, or some in turn."""

    def __init__(self, chunks, buffers=1, numpy=False):
        self.chunks, self.numpy = chunks, numpy
        self.memory = [tuple(t.clone() for t in chunks[0]) for _ in range(buffers)]

    def __iter__(self):
        for i, chunk in enumerate(self.chunks):
            memory = self.memory[i % len(self.memory)]
            for mine, given in zip(memory, chunk, strict=True):
                mine.numpy()[:] = given.numpy()  # which counts no version
            yield memory


@pytest.mark.parametrize("buffers", [1, 2])
def test_of_chunks_whose_memory_is_filled_again(buffers):
    match = r"chunk \d has changed while the chunks after it were fetched.*pass vectorize=1"
    require_refused(mlp(), match, chunks=Refilled(chunked(), buffers))


def test_of_memory_that_larger_groups_alone_see_filled_again():
    closure = make(mlp(), Refilled(chunked(), 2), vectorize=2)
    closure()
    closure.vectorize = 3
    with pytest.raises(RuntimeError, match="has changed"):
        closure()
    closure.vectorize = 2
    closure()


LOSSES = {
    "ignored targets": (lambda o, t: F.cross_entropy(o, t, ignore_index=2), "ignored targets"),
    "class weights": (
        lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 2, 3]).double()),
        "class weights",
    ),
    "a sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "is a sum"),
    "a vector": (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"shape \(4,\)"),
    "detached": (lambda o, t: F.cross_entropy(o.detach(), t), "does not depend on any trainable"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_checks_of_losses_are_those_one_by_one(name):
    loss_fn, match = LOSSES[name]
    errors = []
    for count in (1, 3):
        with pytest.raises(ValueError, match=match) as caught:
            make(mlp(), chunked(), loss_fn, vectorize=count)()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_double_backward_that_loses_terms_is_refused_as_one_by_one():
    class Lossy(NoRule):
        generate_vmap_rule = True

        @staticmethod
        def backward(ctx, g):
            with torch.no_grad():
                return 2 * ctx.saved_tensors[0] * g

    model = Middle(lambda m, h: Lossy.apply(h))
    for count in (1, 3):
        with pytest.raises(RuntimeError, match="Lossy leaves no graph"):
            make(model, chunked(), method="exact", vectorize=count)()
    outcome(model, chunked(), method="forward", vectorize=3)


def test_sparse_gradients_are_refused_as_one_by_one():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
    chunks = [(torch.randint(5, (4, 2)), y) for _, y in chunked()]
    for count in (1, 3):
        with pytest.raises(TypeError, match="sparse=False"):
            make(model, chunks, vectorize=count)()


GIVEN = {
    "vectorize": (0, ValueError, "vectorize must be a number of chunks"),
    "backward": (True, ValueError, "backward=True takes gradients from loss.backward"),
    "compile": (1, TypeError, "compile must be True or False"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_of_arguments_given_or_replaced(name):
    value, error, match = GIVEN[name]
    with pytest.raises(error, match=match):
        make(mlp(), chunked(), **{"vectorize": 3, name: value})
    closure = make(mlp(), chunked(), vectorize=3)
    closure()
    setattr(closure, name, value)
    with pytest.raises(error, match=match):
        closure()


def test_of_compiled_models():
    model = mlp()
    model[1] = torch.compile(model[1], backend="eager")
    match = re.escape("1 is compiled: pass that model, with compile=True to the closure")
    with pytest.raises(ValueError, match=match):
        make(model, chunked(), vectorize=3)
