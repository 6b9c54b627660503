"""Exact sums: the same bits in any order of the chunks; passes that are repeated."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKS = 10
ORDERS = [None, range(CHUNKS - 1, -1, -1)]
ORDERS += [random.Random(seed).sample(range(CHUNKS), CHUNKS) for seed in range(5)]
PENALTIES = {
    "none": None,
    "forward": GradientPenalty(coefficient=0.1),
    "central": GradientPenalty(coefficient=0.1, method="central"),
    "exact": GradientPenalty(coefficient=0.1, method="exact"),
}
# Those that look at the gradient of all chunks before.
WHOLE = {
    "full": GradientPenalty(coefficient=0.1, full_strength=1.0),
    "full sam": SharpnessAware(scope="full"),
}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(dtype)


def data(sizes, scale=1.0, dtype=torch.float32):
    torch.manual_seed(1)
    return [(scale * torch.randn(n, 6).to(dtype), torch.randint(0, 3, (n,))) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", (PENALTIES | WHOLE).values(), ids=PENALTIES | WHOLE)
def test_gradient_and_statistics_in_any_order(penalty, dtype, backend):
    """As with sums in float32, to rounding, and whatever the order of the chunks."""
    found = {}
    for accumulation in ("float32", "exact"):
        for order in ORDERS[:3]:
            net, chunks = model(dtype), data((8, 8, 3, 8, 7, 8, 1, 8, 5, 8)[:CHUNKS], dtype=dtype)
            chunks = [chunk for chunk in (chunks if order is None else [chunks[i] for i in order])]
            chunks = [(x, y) for x, y in chunks if len(x) > 1]  # BatchNorm
            closure = FullBatchClosure(
                net, F.cross_entropy, chunks, penalty=penalty, accumulation=accumulation
            )
            loss = closure()
            grads = [p.grad.clone() for p in net.parameters()]
            found.setdefault(accumulation, []).append([loss, *grads, *net.buffers()])
    eps = torch.finfo(dtype).eps
    for rounded, exact in zip(*found.values(), strict=True):
        torch.testing.assert_close(exact, rounded, rtol=32 * eps, atol=32 * eps)
        assert bits(exact) == bits(found["exact"][0])


class Counted:
    """Chunks that count how often they are iterated, and draw at random."""

    def __init__(self, chunks):
        self.chunks, self.visits = chunks, 0

    def __iter__(self):
        self.visits += 1
        for x, y in self.chunks:
            yield x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_repeated_pass_leaves_no_other_trace(penalty):
    """Twice through the chunks, with the same draws; all else as after going through them once."""
    after, tiny = {}, 2.0**-60  # no first unit fits
    for accumulation in ("float32", "exact"):
        net, chunks = model(), Counted(data((8, 8, 5)))
        net.insert(3, nn.Dropout(0.3))
        closure = FullBatchClosure(
            net,
            lambda output, target: tiny * F.cross_entropy(output, target),
            chunks,
            penalty=penalty,
            accumulation=accumulation,
        )
        torch.manual_seed(5)
        closure()
        assert chunks.visits == (2 if accumulation == "exact" else 1)
        grads = [p.grad / tiny for p in net.parameters()]
        after[accumulation] = [grads, list(net.buffers()), torch.get_rng_state()]
        closure()
        assert chunks.visits == (3 if accumulation == "exact" else 2)
    torch.testing.assert_close(after["exact"], after["float32"], rtol=1e-5, atol=1e-6)


def test_chunks_that_change_without_end_are_an_error_and_change_nothing():
    net, size = model(), [0]

    class Growing:
        def __iter__(self):
            size[0] += 1
            return iter(data((8, 8)))

    def loss_fn(output, target):
        return 2.0 ** (60 if size[0] % 2 == 0 else -40) * F.cross_entropy(output, target)

    closure = FullBatchClosure(net, loss_fn, Growing(), accumulation="exact")
    before = bits(net)
    with pytest.raises(RuntimeError, match="visited all chunks 4 times"):
        closure()
    assert bits(net) == before and closure.step == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_the_norm(bad):
    net, chunks = model(), data((8, 8, 8))
    chunks[1][0][3, 2] = bad
    optimizer = FullBatchGD(net.parameters(), lr=0.1, max_norm=0.25, error_if_nonfinite=True)
    closure = FullBatchClosure(
        net, F.cross_entropy, chunks, optimizer=optimizer, accumulation="exact"
    )
    before = bits(net)
    with pytest.raises(RuntimeError, match="gradient norm is nan"):
        optimizer.step(closure)
    assert bits(net) == before
    optimizer.param_groups[0]["error_if_nonfinite"] = False
    optimizer.step(closure)
    assert optimizer.last_grad_norm.isnan()


def test_saved_units_go_on_to_the_same_bits():
    """What a first step has found out about sizes is part of the state."""

    def stepped(state=None, steps=3):
        net, chunks = model(), data((8, 8, 8, 5))
        optimizer = FullBatchGD(net.parameters(), lr=0.1, momentum=0.9)
        closure = FullBatchClosure(
            net, F.cross_entropy, chunks, optimizer=optimizer, accumulation="exact"
        )
        if state is not None:
            net.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            closure.load_state_dict(state[2])
        for _ in range(steps):
            optimizer.step(closure)
        return net.state_dict(), optimizer.state_dict(), closure.state_dict()

    whole = stepped(steps=6)
    half = stepped()
    exponents = [half[2][name]["exponents"] for name in ("sums", "statistics")]
    assert all(isinstance(e, int) for e in [*exponents[0], *exponents[1]])
    resumed = stepped(half)
    assert bits(*whole[0].values()) == bits(*resumed[0].values())
    assert whole[2] == resumed[2]


@pytest.mark.parametrize("kind", ["none", *WHOLE])
def test_with_saved_units_no_pass_is_repeated(kind):
    def made(seed):
        chunks = Counted(data((8, 8, 5), scale=1e3))  # statistics too large for the first units
        torch.manual_seed(seed)
        options = {"penalty": (PENALTIES | WHOLE)[kind], "accumulation": "exact"}
        return chunks, FullBatchClosure(model(), F.cross_entropy, chunks, **options)

    chunks, closure = made(0)
    closure()
    first = chunks.visits
    closure()
    again, resumed = made(1)
    resumed.load_state_dict(closure.state_dict())
    resumed()
    assert again.visits == chunks.visits - first == (1 if kind == "none" else 2) < first
    resumed.model[0].requires_grad_(False)
    resumed()
    assert resumed.model[0].weight.grad is None


def test_lbfgs_takes_exact_sums():
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    closure = FullBatchClosure(net, F.cross_entropy, data((8, 8, 5)), accumulation="exact")
    first, last = float(optimizer.step(closure)), float(closure())
    assert last < first


def test_frozen_normalisation_layers_are_left_alone():
    net = model()
    closure = FullBatchClosure(net, F.cross_entropy, data((8, 8)), accumulation="exact")
    closure()
    net[1].eval()
    before = bits(*net[1].buffers())
    closure()
    assert bits(*net[1].buffers()) == before
    net[1].train()
    closure()
    assert bits(*net[1].buffers()) != before


def test_weights_of_chunks_are_checked():
    closure = FullBatchClosure(
        model(), F.cross_entropy, data((8, 8)), accumulation="exact", weight=lambda chunk: 1 / 3
    )
    with pytest.raises(ValueError, match="29 significant bits"):
        closure()


class Skipping(nn.Module):
    """Chunks of fewer than six samples leave a normalisation layer out; one is never run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.some, self.never = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.never.running_mean.fill_(7)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.tanh(self.some(x) if len(x) >= 6 else x))


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_statistics_are_of_the_chunks_that_ran_a_layer(penalty, accumulation):
    chunks = data((8, 3, 7, 5, 6))
    found = []
    for order in (chunks, chunks[::-1], chunks[1:] + chunks[:1]):
        net = Skipping()
        closure = FullBatchClosure(
            net, F.cross_entropy, order, penalty=penalty, accumulation=accumulation
        )
        closure()
        found.append([net.some.running_mean, net.some.running_var, *net.never.buffers()])
    runs = [(len(x), Skipping().first(x)) for x, _ in chunks if len(x) >= 6]
    mean = sum(n * h.mean(0) for n, h in runs) / sum(n for n, _ in runs)
    var = sum(n * h.var(0) for n, h in runs) / sum(n for n, _ in runs)
    for one in found:
        torch.testing.assert_close(one[:2], [mean, var])
        assert (one[2] == 7).all() and (one[3] == 1).all()
        if accumulation == "exact":
            assert bits(one) == bits(found[0])
