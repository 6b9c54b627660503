"""Every kernel against fbopt.reference: shapes, strides, dtypes, lists, threads; opcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbopt import _build, _ops, reference
from fbopt._tensors import accumulator_dtype, flat_views

pytestmark = pytest.mark.skipif(_build.kernels() is None, reason="no compiled kernels here")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (513,), (3, 5, 7), (64, 32, 3, 3), (8193,), (0, 4), (1, 1, 1)]


def channels_last(t):
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def with_gaps(t):
    return torch.stack([t, t], -1)[..., 0]


def misaligned(t):
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].reshape(t.shape)


STRIDES = [lambda t: t, channels_last, transposed, with_gaps, misaligned]
LISTS = {
    "shapes": SHAPES,
    "one": [(100,)],
    "none": [],
    "thousand": [(16,)] * 1000,
    "large": [(200_000,), (3,), (70_001,)],
}


def make(shapes, dtype, seed, layouts=STRIDES):
    """Random tensors that cycle through the memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [layouts[(i + seed) % len(layouts)](t) for i, t in enumerate(made)]


def clone(value):
    """A copy with the same strides: what an op mutates must not leak into the next call."""
    if isinstance(value, list):
        return [clone(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value._is_view() and not value.is_contiguous():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    return value.clone(memory_format=torch.preserve_format)


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def cases(name, shapes, dtype):
    """The argument lists that an op is tried with."""
    wide = accumulator_dtype(dtype)
    params, grads, plus, minus = (make(shapes, dtype, seed) for seed in range(4))
    sums = make(shapes, wide, 4, [lambda t: t, channels_last, transposed])
    if name == "squared_norm":
        return [(params,)]
    if name == "pack_":
        return [(torch.empty(sum(p.numel() for p in params), dtype=dtype), params)]
    if name == "perturb_":
        out = torch.empty(sum(p.numel() for p in params), dtype=dtype)
        zero = [torch.zeros_like(g) for g in grads]
        return [
            (out, params, grads, 1e-2),
            (out, params, grads, -0.5, scalar(4.0)),
            (out, params, zero, 1e-2),
        ]
    if name == "accumulate_":
        return [(sums, grads, scalar(128.0)), (sums, grads, torch.tensor(3.0))]
    if name == "accumulate_penalty_":
        rest = (scalar(96.0), scalar(0.1), scalar(2.5), 1e-2)
        return [
            (sums, grads, plus, [], *rest),
            (sums, grads, plus, minus, *rest),
            (sums, grads, plus, [], scalar(1.0), scalar(0.1), scalar(0.0), 1e-2),
        ]
    if name == "clip_":
        return [(grads, scalar(10.0), 0.25), (grads, scalar(0.1), 0.25)]
    buffers = make(shapes, dtype, 5)
    step = [
        (0.0, 0.0, 0.0, False, False, False),
        (0.9, 0.0, 5e-4, True, False, True),
        (0.9, 0.0, 5e-4, True, False, False),
        (0.9, 0.3, 0.0, False, True, False),
    ]
    return [
        (params, g, buffers if rule[0] else [], scalar(0.8), divisor, norm, max_norm, *rule)
        for rule in step
        for g in ([grads] if dtype == wide else [grads, sums])
        for divisor in (None, scalar(3.0))
        for norm, max_norm in ((None, None), (scalar(2.0), 0.25), (scalar(0.1), 0.25))
    ]


def assert_same(got, wanted):
    """Equal to rounding, measured by the largest element: sums may cancel."""
    for a, b in zip(got, wanted, strict=True):
        if isinstance(b, list):
            assert_same(a, b)
        elif isinstance(b, torch.Tensor):
            eps = torch.finfo(b.dtype).eps
            largest = b.double().abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=8 * eps * largest, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("name", _ops.NAMES)
def test_kernel_equals_reference(name, shapes, dtype):
    few = slice(3) if len(shapes) == 1000 else slice(None)
    for arguments in cases(name, shapes, dtype)[few]:
        mine, theirs = [clone(a) for a in arguments], [clone(a) for a in arguments]
        if name == "squared_norm":
            assert_same([_ops.squared_norm(mine[0])], [_reference_norm(theirs[0])])
            continue
        result = getattr(_ops.table("cpu"), name)(*mine)
        expected = getattr(reference, name)(*theirs) if shapes else None
        if shapes:
            assert_same([result], [expected])
            assert_same(mine, theirs)


def _reference_norm(tensors):
    return reference.squared_norm(tensors) if tensors else torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("name", _ops.NAMES)
def test_opcheck(name):
    op = getattr(torch.ops.fbopt, name).default
    for arguments in cases(name, [(), (5,), (3, 4)], torch.float32)[:6]:
        torch.library.opcheck(op, tuple(clone(a) for a in arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _ops.NAMES)
def test_bits_do_not_depend_on_thread_count(name, dtype, threads):
    shapes = [(300_001,), (17,), (64, 64, 3, 3), (1,)]
    for arguments in cases(name, shapes, dtype)[:3]:
        results = []
        for n in (1, 2, 3, 5):
            threads(n)
            mine = [clone(a) for a in arguments]
            results.append((getattr(_ops.table("cpu"), name)(*mine), mine))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def threads():
    """Set the number of threads; put it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_sum_is_exact_where_float32_is_not():
    ones = torch.full((20_000_000,), 1.0)
    assert _ops.squared_norm([ones]).item() == 20_000_000


def test_sum_of_many_small_and_one_large():
    x = torch.full((100_000,), 1e-4)
    x[5] = 1e4
    exact = math.fsum((x.double() ** 2).tolist())
    assert _ops.squared_norm([x]).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_reaches_every_result(bad):
    g = torch.ones(1000)
    g[700] = bad
    p = torch.zeros(1000)
    norm = _ops.squared_norm([g]).sqrt()
    assert not torch.isfinite(norm)
    out = torch.empty(1000)
    _ops.table("cpu").perturb_(out, [p], [g], 1e-2)
    wanted = torch.empty(1000)
    reference.perturb_(wanted, [p], [g], 1e-2)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    sums, more = [torch.zeros(1000)], [torch.zeros(1000)]
    rest = (scalar(1.0), scalar(0.1), norm**2, 1e-2)
    _ops.accumulate_penalty_(sums, [g], [g + 1], [], *rest)
    reference.accumulate_penalty_(more, [g], [g + 1], [], *rest)
    torch.testing.assert_close(sums, more, equal_nan=True)
    clipped, expected = [g.clone()], [g.clone()]
    _ops.clip_(clipped, norm, 1.0)
    reference.clip_(expected, norm, 1.0)
    torch.testing.assert_close(clipped, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_half_precision_value_and_rounding(dtype):
    """All bit patterns of the half types, and ties, are loaded and rounded as torch does."""
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
    else:
        x = torch.randn(70_000, dtype=dtype)
    zero, out = torch.zeros_like(x), torch.empty_like(x)
    _ops.table("cpu").perturb_(out, [x], [zero], 1.0)
    assert torch.equal(out, x)
    wide = accumulator_dtype(dtype)
    grads = [torch.rand(x.shape, dtype=wide) * x.to(wide).abs().clamp(max=1e4)]
    mine, theirs = [x.clone()], [x.clone()]
    rest = ([], scalar(0.5), None, None, None, 0.0, 0.0, 0.0, False, False, False)
    _ops.table("cpu").sgd_step_(mine, grads, *rest)
    reference.sgd_step_(theirs, grads, *rest)
    assert torch.equal(mine[0], theirs[0])


def test_large_output_is_streamed_correctly():
    """Above the cache's size stores go past it, from aligned and misaligned starts alike."""
    shapes = [(5,), (6_000_000,), (3,), (7_000_000,)]
    params, grads = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
    out = torch.full((sum(p.numel() for p in params),), float("nan"))
    wanted = torch.empty_like(out)
    square = _ops.table("cpu").perturb_(out, params, grads, 0.5)
    reference.perturb_(wanted, params, grads, 0.5, square)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("pack_", lambda a: a.__setitem__(0, torch.zeros(3)), "out must have 18 elements"),
        ("pack_", lambda a: a.__setitem__(0, torch.zeros(18).double()), "another dtype than out"),
        ("accumulate_", lambda a: a[1].pop(), "grads has 2 tensors, expected 3"),
        ("accumulate_", lambda a: a[1].__setitem__(1, torch.zeros(4)), r"grads\[1\].*shape"),
        ("accumulate_", lambda a: a[1].__setitem__(1, a[1][1].double()), r"grads\[1\].*dtype"),
        ("accumulate_penalty_", lambda a: a[2].pop(), "plus has 2 tensors"),
        ("perturb_", lambda a: a.__setitem__(0, torch.zeros(3)), "out must be contiguous"),
        ("sgd_step_", lambda a: a[2].append(torch.zeros(3)), "momentum_buffers"),
        ("squared_norm", lambda a: a.__setitem__(0, [torch.zeros(3).int()]), "float32, float64"),
    ],
)
def test_kernels_refuse_what_does_not_fit(name, spoil, message):
    arguments = [clone(a) for a in cases(name, [(2,), (3, 5), ()], torch.float32)[0]]
    spoil(arguments)
    before = clone(arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(_ops.table("cpu"), name)(*arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from([n for n in _ops.NAMES if n != "squared_norm"]),
    seed=st.integers(0, 4),
)
def test_any_shapes(shapes, dtype, name, seed):
    if not shapes:
        return
    layouts = STRIDES[seed:] + STRIDES[:seed]
    for arguments in cases(name, shapes, dtype)[:2]:
        arguments = [
            [layouts[i % len(layouts)](t) for i, t in enumerate(a)]
            if isinstance(a, list) and name != "perturb_"
            else a
            for a in arguments
        ]
        mine, theirs = [clone(a) for a in arguments], [clone(a) for a in arguments]
        getattr(_ops.table("cpu"), name)(*mine)
        getattr(reference, name)(*theirs)
        assert_same(mine, theirs)


def test_flat_views_follow_memory_order():
    tensors = [t for t in make(SHAPES, torch.float32, 1) if t.numel()]
    flat = torch.arange(sum(t.numel() for t in tensors)).float()
    views = flat_views(flat, tensors)
    assert [v.shape for v in views] == [t.shape for t in tensors]
    assert torch.equal(torch.cat([v.flatten().sort().values for v in views]), flat)


def test_compiled_function_calls_the_ops():
    ops = _ops.table("cpu")

    def update(sums, grads, weight):
        ops.accumulate_(sums, grads, weight)
        return ops.squared_norm(sums).sqrt()

    sums, grads = make([(5,), (3, 4)], torch.float32, 0), make([(5,), (3, 4)], torch.float32, 1)
    expected = clone(sums)
    wanted = update(expected, grads, scalar(2.0))
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(sums, grads, scalar(2.0))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(sums, expected)
