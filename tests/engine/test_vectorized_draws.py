"""Random numbers with vectorize=K: the same in all passes of a group, others in each chunk.

Where the passes of a group drew other numbers, a penalty by differences would be noise: of a radius
of 1e-5, a hundred thousand times the noise of the gradient. The exact penalty repeats no draws.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from at_once import chunked, flat, make, mlp, outcome, require_close
from torch import nn

from fbopt import GradientPenalty
from fbopt._engine import vectorized_gradient
from fbopt._engine.functional import ChunkFunction

pytestmark = pytest.mark.usefixtures("one_thread")


class Noise(nn.Module):
    """Does something random with the hidden layer, or with a weight."""

    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.act, self.scale = act, nn.Parameter(torch.ones(6))

    def forward(self, h):
        return self.act(self, h)


def drop_path(module, h):
    """Leaves out whole samples."""
    return h * (torch.rand(len(h), 1, dtype=h.dtype) > 0.3)


ACTS = {
    "dropout": lambda m, h: F.dropout(h, 0.5),
    "alpha dropout": lambda m, h: F.alpha_dropout(h, 0.3, training=True),
    "randn_like": lambda m, h: h + torch.randn_like(h),
    "randn": lambda m, h: h + torch.randn(h.shape, dtype=h.dtype),
    "little noise": lambda m, h: h + 1e-6 * torch.randn_like(h),
    "noise on a weight": lambda m, h: h * (m.scale + 0.1 * torch.randn_like(m.scale)),
    "dropout of a weight": lambda m, h: h * F.dropout(m.scale, 0.3),
    "bernoulli": lambda m, h: h * torch.bernoulli(torch.sigmoid(h.detach())),
    "normal": lambda m, h: h + torch.normal(torch.zeros_like(h), 1.0),
    "a permutation": lambda m, h: h[torch.randperm(len(h))],
    "drop path": drop_path,
    "gumbel": lambda m, h: F.gumbel_softmax(h),
}


def conv():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.2), nn.ReLU()
    layers = *layers, nn.Conv2d(6, 4, 3), nn.Dropout2d(0.3), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(4, 3)).double()


class Encoder(nn.Module):
    def __init__(self, **given):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
        self.last = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.last(self.layer(x).mean(1))


MODELS = {
    **{name: (lambda act=act: mlp(Noise(act)), (5,)) for name, act in ACTS.items()},
    "convolutions": (conv, (3, 5, 5)),
    "an encoder": (Encoder, (4, 8)),
}


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_all_passes_of_a_group_draw_the_same(name, count):
    """Then the penalty of radius 1e-5 is that of central differences, and not noise."""
    build, shape = MODELS[name]
    model, found = build().double(), {}
    for method in (None, "forward", "central"):
        torch.manual_seed(3)
        closure = make(model, chunked(shape=shape), vectorize=count)
        closure.penalty = method and GradientPenalty(coefficient=1.0, radius=1e-5, method=method)
        closure()
        found[method] = flat([p.grad for p in model.parameters()])
        found[method, "after"] = torch.get_rng_state()
    penalty = found["central"] - found[None]
    assert penalty.norm() > 1e-3 * found[None].norm()
    assert (found["forward"] - found["central"]).norm() < 0.01 * penalty.norm()
    assert torch.equal(found["forward", "after"], found[None, "after"])
    assert torch.equal(found["central", "after"], found[None, "after"])


def test_masks_are_the_same_in_all_passes_and_differ_between_chunks():
    """By gradients that show them: of mean(w * x) by w, where a mask leaves some out of x."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(50, dtype=torch.float64))

        def forward(self, x):
            return F.dropout(x, 0.5) * self.weight

    seen = []
    chunks = [torch.ones(2, 50, dtype=torch.float64)] * 6

    def evaluate(model, x):
        output = model(x)
        return output.mean(), output

    def observe(output, chunk):
        seen.append(output != 0)

    for method, passes in ((None, 1), ("forward", 2), ("central", 3)):
        seen.clear()
        given = {"evaluate": evaluate, "observe": observe, "vectorize": 3}
        make(Masked(), chunks, method=method, **given)()
        assert passes and len(seen) == 6
        masks = torch.stack(seen).flatten(1)
        differ = (masks[:, None] != masks).any(2)
        assert torch.equal(differ, ~torch.eye(6, dtype=torch.bool))


def test_the_first_call_does_not_move_the_generators():
    """Its checks draw what a group draws, and put the generators back."""
    model = mlp(nn.Dropout(0.5))
    for method in (None, "forward", "exact"):
        closure = make(model, chunked(), method=method, vectorize=3)
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            loss = closure()
            states.append((loss, torch.rand(3), flat([p.grad for p in model.parameters()])))
        torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("more", [True, False], ids=["more numbers", "in another order"])
def test_passes_that_draw_other_numbers_are_refused(method, more, monkeypatch):
    """As if shifted passes were computed in another layout, which masks depend on."""
    original = ChunkFunction.gradient

    def gradient(self, params, buffers, stack):
        if more:
            passes = original(self, params, buffers, stack)
            torch.rand(1)
            return passes
        state = torch.get_rng_state()
        torch.rand(1)
        passes = original(self, params, buffers, stack)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        original(self, params, buffers, stack)  # so that as many are drawn
        assert not torch.equal(after, torch.get_rng_state())
        return passes

    monkeypatch.setattr(ChunkFunction, "gradient", gradient)
    model = mlp(Noise(ACTS["little noise"]))
    model.double()
    with pytest.raises(RuntimeError, match=r"draw other random numbers.*pass vectorize=1"):
        make(model, chunked(), method=method, vectorize=3)()


def test_an_unlucky_mask_is_no_lost_gradient():
    """Dropout may leave all of a layer out, in all chunks of a group."""
    model = mlp(nn.Dropout(0.999))
    for seed in range(3):
        torch.manual_seed(seed)
        make(model, chunked(), method="forward", vectorize=2)()


def test_a_gradient_that_is_lost_is_found_also_where_numbers_are_drawn(monkeypatch):
    """vmap repeats the zeros of a parameter that is not reached."""
    original = ChunkFunction.first

    def first(self, params, buffers, stack, whole=()):
        passes = original(self, params, buffers, stack, whole)
        lost = torch.zeros_like(params[0]).expand_as(passes.grads[0])
        return passes._replace(grads=(lost, *passes.grads[1:]))

    monkeypatch.setattr(ChunkFunction, "first", first)
    for extra in ([], [nn.Dropout(0.5)]):
        with pytest.raises(RuntimeError, match=r"no gradient reaches 0\.weight"):
            make(mlp(*extra), chunked(), vectorize=3)()


def test_seeds_give_the_same_masks_again():
    model = mlp(nn.Dropout(0.5))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        make(model, chunked(26), method="forward", vectorize=3)()
        results.append(flat([p.grad for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_dropout_is_checked_in_the_first_call_alone(monkeypatch):
    calls = []
    for name in ("Checks", "check_shifted", "check_draws"):
        original = getattr(vectorized_gradient, name)

        def spy(*given, name=name, original=original):
            calls.append(name)
            return original(*given)

        monkeypatch.setattr(vectorized_gradient, name, spy)
    model = mlp(nn.Dropout(0.5))
    closure = make(model, chunked(26), method="forward", vectorize=3)
    closure()
    assert calls == ["Checks", "check_shifted", "check_draws"]
    closure.chunks = chunked(22)
    closure()
    assert len(calls) == 3
    model.eval()
    closure()
    assert calls[3:] == ["Checks", "check_shifted"]
    require_close(
        flat([p.grad for p in model.parameters()]),
        flat(outcome(model, chunked(22), method="forward").grads),
    )
