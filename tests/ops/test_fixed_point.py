"""Exact sums against rational arithmetic: accuracy, order, processes, overflow, NaN, bad input."""

from __future__ import annotations

import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbopt import FullBatchClosure, GradientAccumulator
from fbopt._ops.fixed_point import FixedPointSums

CHUNKS = {"kernels": 10_000, "reference": 300}
pytestmark = pytest.mark.usefixtures("backend")


def spread(rng, n):
    """Exponents over 40 binary orders, either sign."""
    return rng.choice([-1, 1], n) * rng.uniform(1, 2, n) * 2.0 ** -rng.integers(0, 40, n)


def cancelling(rng, n):
    """All but a part in 2^30 cancels."""
    x = spread(rng, n // 2)
    return rng.permutation(np.concatenate([x, -x * (1 + 2.0**-23 * (rng.random(n // 2) < 0.01))]))


# What one element gets from every chunk.
ELEMENTS = {
    "spread": spread,
    "cancelling": cancelling,
    "one sign, large": lambda rng, n: np.full(n, 2 - 2.0**-23),
    "one sign, spread": lambda rng, n: -abs(spread(rng, n)),
    "always the same, tiny": lambda rng, n: np.full(n, 1.37 * 2.0**-44),
    "below all units": lambda rng, n: np.full(n, -1.1 * 2.0**-70),
    "one large, then tiny": lambda rng, n: np.concatenate([[1.9], spread(rng, n - 1) * 2.0**-30]),
    "normal": lambda rng, n: rng.normal(size=n),
    "zero": lambda rng, n: np.zeros(n),
}
DENORMAL = {
    "denormal": lambda rng, n: rng.integers(0, 2**20, n) * 2.0**-149,
    "one denormal": lambda rng, n: np.eye(1, n, 7)[0] * 2.0**-149,
}


def chunks(shift, n, seed=0):
    """Gradients (chunks, elements) in float32 of all kinds, and weights of chunks."""
    rng = np.random.default_rng(seed)
    kinds = [2.0**shift * make(rng, n) for make in ELEMENTS.values()]
    kinds += [make(rng, n) for make in DENORMAL.values()]
    weights = rng.integers(1, 513, n)
    weights[::2] = 128
    columns = np.stack(kinds, axis=1).astype(np.float32)
    # A cancellation needs equal weights.
    columns[:, list(ELEMENTS).index("cancelling")] *= 128 / weights
    return columns, weights.tolist()


def integers(values):
    """float32 as multiples of 2^-149."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    pairs = zip((mantissa * 2.0**53).tolist(), exponent.tolist(), strict=True)
    return [
        int(m) << (e + 149) >> 53 if e + 149 >= 0 else int(m) >> (53 - e - 149) for m, e in pairs
    ]


def rational(columns, weights):
    """The exact weighted sum of each column, and its largest contribution."""
    sums, largest = [], []
    for column in columns.T:
        terms = [w * v for w, v in zip(weights, integers(column), strict=True)]
        sums.append(Fraction(sum(terms), 2**149))
        largest.append(Fraction(max(map(abs, terms)), 2**149))
    return sums, largest


def mean_of(columns, weights, groups, accumulation, order=None):
    """The accumulated mean: columns `groups[i]` make tensor i."""
    params = [torch.zeros(len(group)) for group in groups]
    accumulator = GradientAccumulator(params, accumulation)
    parts = [torch.from_numpy(columns[:, group].copy()) for group in groups]
    for _ in accumulator.passes():
        for c in range(len(weights)) if order is None else order:
            accumulator.add([part[c] for part in parts], weights[c])
    return [m.clone() for m in accumulator.mean()]


def faults(means, sums, largest, total):
    """How many elements break the promised bound."""
    most, found = max(largest), 0
    for mean, exact in zip(means.tolist(), sums, strict=True):
        if abs(exact) * 2**24 >= most:
            right = np.float32(float(exact / total))
            found += abs(np.float32(mean) - right) > np.spacing(abs(right))
        else:
            found += abs(Fraction(mean) * total - exact) * 2**48 > most
    return found


@pytest.mark.parametrize("shift", [-40, 0, 60])
def test_accuracy_of_ten_thousand_chunks(shift, backend):
    columns, weights = chunks(shift, CHUNKS[backend])
    count, total = columns.shape[1], sum(weights)
    groups = [list(range(len(ELEMENTS))), *([i] for i in range(count))]
    sums, largest = rational(columns, weights)

    def wrong(accumulation):
        means = mean_of(columns, weights, groups, accumulation)
        return [
            faults(mean, [sums[i] for i in group], [largest[i] for i in group], total)
            for mean, group in zip(means, groups, strict=True)
        ]

    assert wrong("exact") == [0] * len(groups)
    assert sum(wrong("float32")) > 2


def test_no_order_leaves_a_trace():
    columns, weights = chunks(0, 700, seed=1)
    groups = [[0, 1, 2], [3, 4, 5, 6, 7], [9]]
    rng = np.random.default_rng(0)
    orders = [range(700), range(699, -1, -1), *(rng.permutation(700) for _ in range(5))]
    found = [mean_of(columns, weights, groups, "exact", order) for order in orders]
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))
    rounded = [mean_of(columns, weights, groups, "float32", order) for order in orders]
    assert not all(map(torch.equal, rounded[0], rounded[1]))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    jumps=st.lists(st.integers(-45, 45), min_size=1, max_size=8),
    count=st.sampled_from([1, 2, 3, 50, 129]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_whatever_the_size_sums_are_right(jumps, count, dtype):
    """Gradients that grow and shrink by any factor from step to step: never wrong."""
    rng = np.random.default_rng(count)
    accumulator = GradientAccumulator([torch.zeros(7, dtype=dtype)], "exact")
    exponent = 0
    for jump in jumps:
        exponent = max(-80, min(80, exponent + jump))
        values = torch.from_numpy(rng.normal(size=(count, 7)) * 2.0**exponent).to(dtype)
        attempts = 0
        for attempt in accumulator.passes():
            attempts = attempt + 1
            for row in values:
                accumulator.add([row], 3)
        assert attempts <= 2
        columns = values.float().numpy()
        sums, largest = rational(columns, [3] * count)
        accumulator.mean()  # for bfloat16 a rounded copy of the float32 that is judged
        assert faults(accumulator._sums.views[0], sums, largest, 3 * count) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_is_found_wherever_it_is(bad):
    params = [torch.zeros(700), torch.zeros(3, 5), torch.zeros(600)]
    accumulator = GradientAccumulator(params, "exact")
    rng = np.random.default_rng(3)
    for _ in range(40):
        tensor, chunk = int(rng.integers(3)), int(rng.integers(4))
        element = int(rng.integers(params[tensor].numel()))
        passes = 0
        for _ in accumulator.passes():
            passes += 1
            for c in range(4):
                grads = [torch.randn(p.shape) for p in params]
                if c == chunk:
                    grads[tensor].view(-1)[element] = bad
                accumulator.add(grads, 2)
        assert passes <= 2
        finite = [bool(m.isfinite().all()) for m in accumulator.mean()]
        assert finite == [i != tensor for i in range(3)]
        assert accumulator.mean()[tensor].isnan().all()


def test_sums_beyond_float32_are_no_overflow():
    accumulator = GradientAccumulator([torch.zeros(2)], "exact")
    for _ in accumulator.passes():
        for sign in (1, 1, -1):
            accumulator.add([torch.tensor([3e38, -3e38]) * sign], 100)
    torch.testing.assert_close(accumulator.mean()[0], torch.tensor([1e38, -1e38]))


class Thread:
    """Stands for one of several processes, which sum where they meet."""

    is_single = False
    meeting: threading.Barrier
    brought: list[torch.Tensor]

    def all_reduce_coalesced_(self, tensors):
        assert not tensors

    def all_reduce_(self, tensors):
        for tensor in tensors:
            self.brought.append(tensor.clone())
            self.meeting.wait()
            total = torch.stack(self.brought).sum(0)
            self.meeting.wait()
            tensor.copy_(total)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_sums_of_processes_carry(processes):
    """Sums near to wrapping, on either side, give the integers that Python gets."""
    rng = np.random.default_rng(processes)
    parts = [[torch.zeros(40), torch.zeros(2, 3)]]
    fixed = [FixedPointSums() for _ in range(processes)]
    for part in fixed:
        part.allocate(parts, [])
    expected = np.zeros(fixed[0]._flats[0][0].numel(), dtype=object)
    for part in fixed:
        sums, carries = part._flats[0]
        sums.copy_(torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, sums.numel())))
        sums[:4] = torch.tensor([-(2**63), 2**63 - 1, 0, -1])
        carries.copy_(torch.from_numpy(rng.integers(-(2**28), 2**28, sums.numel())))
        expected += sums.numpy().astype(object) + (carries.numpy().astype(object) << 64)

    class Ranks(Thread):
        meeting, brought = threading.Barrier(processes), []

    threads = [threading.Thread(target=part.all_reduce_, args=(Ranks(),)) for part in fixed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in fixed:
        sums, carries = (t.numpy().astype(object) for t in part._flats[0])
        assert (sums + (carries << 64) == expected).all()


def test_a_pass_that_does_not_fit_is_refused_and_the_next_one_fits():
    grads = [torch.full((3,), 1e-30)]
    accumulator = GradientAccumulator([torch.zeros(3)], "exact")
    accumulator.add(grads, 4)
    with pytest.raises(RuntimeError, match=r"add all gradients once more.*passes\(\)"):
        accumulator.mean()
    accumulator.add(grads, 4)
    torch.testing.assert_close(accumulator.mean(), grads, rtol=0, atol=0)


def test_gradients_that_change_without_end_are_an_error():
    accumulator = GradientAccumulator([torch.zeros(3)], "exact")
    with pytest.raises(RuntimeError, match="gradients change from one pass to the next"):
        for attempt in accumulator.passes():
            accumulator.add([torch.full((3,), 2.0 ** (30 * (-1) ** attempt * (attempt + 1)))])


def test_saved_units_give_the_same_bits():
    torch.manual_seed(0)
    grads = [[torch.randn(50) * 2.0**-e] for e in range(30)]

    def mean(accumulator):
        for _ in accumulator.passes():
            for g in grads:
                accumulator.add(g, 7)
        return accumulator.mean()[0].clone()

    first = GradientAccumulator([torch.zeros(50)], "exact")
    first.add([torch.full((50,), 2.0**9)])
    first.mean()
    saved = first.state_dict()
    second = GradientAccumulator([torch.zeros(50)], "exact")
    second.load_state_dict(saved)
    assert torch.equal(mean(first), mean(second))
    assert GradientAccumulator([torch.zeros(50)]).state_dict() == {}


def test_saved_units_wait_for_parameters_that_they_fit():
    """A closure is made with all parameters, then loads what was saved when some were frozen."""

    def closure(frozen):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        model[0].requires_grad_(not frozen)
        chunks = [torch.randn(4, 2) * 2.0**-40]
        return FullBatchClosure(
            model,
            chunks=chunks,
            evaluate=lambda model, chunk: model(chunk).mean(),
            accumulation="exact",
        )

    saved, loaded = closure(frozen=True), closure(frozen=False)
    saved()
    state = saved.state_dict()
    loaded.load_state_dict(state)
    assert loaded.state_dict() == state
    loaded.model[0].requires_grad_(False)
    loaded.sums.reset(list(loaded.model[1].parameters()))
    assert loaded.sums.store._exponents == state["sums"]["exponents"]


@pytest.mark.parametrize("largest", [1e-290, 1e290])
def test_float64_gradients_of_any_size(largest):
    values = torch.tensor([largest, -largest / 3], dtype=torch.float64)
    accumulator = GradientAccumulator([torch.zeros(2, dtype=torch.float64)], "exact")
    for _ in accumulator.passes():
        for weight in (2**29, 1):
            accumulator.add([values], weight)
    error = (accumulator.mean()[0] - values).abs().max()
    assert error <= max(2.0**-48 * largest, 2.0**-900)


@pytest.mark.parametrize(
    "weight, message",
    [
        (1 / 3, "weight is 0.333.*29 significant bits"),
        (2.0**-25, "weight is 2.98.*multiples of 2"),
        (2.0**30, "weight is 1073741824"),
        (2**29 + 1, "weight is 536870913"),
        (-1, "weight must be at least 0"),
        (math.nan, "weight must be finite"),
    ],
)
def test_weights_that_would_round(weight, message):
    accumulator = GradientAccumulator([torch.zeros(2)], "exact")
    with pytest.raises(ValueError, match=message):
        accumulator.add([torch.ones(2)], weight)
    for _ in accumulator.passes():
        accumulator.add([torch.ones(2)], 2**29 - 1)
        accumulator.add([torch.ones(2)], 0.375)
    assert torch.equal(accumulator.mean()[0], torch.ones(2))


def test_too_many_additions_are_refused():
    fixed = FixedPointSums()
    fixed.allocate([[torch.zeros(2)]], [])
    with pytest.raises(RuntimeError, match="at most 2,097,152 gradients"):
        fixed.fit(fixed.maxima(), 2**21 + 1)


@pytest.mark.parametrize("accumulation", ["exact", "float32"])
def test_one_pass_where_nothing_has_to_be_repeated(accumulation):
    accumulator = GradientAccumulator([torch.zeros(2)], accumulation)
    assert list(accumulator.passes()) == [0]
    for _ in accumulator.passes():
        accumulator.add([torch.ones(2)])
    assert torch.equal(accumulator.mean()[0], torch.ones(2))
