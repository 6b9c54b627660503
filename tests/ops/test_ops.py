"""Every kernel against fbopt.reference: shapes, strides, dtypes, lists; on the CPU, on a GPU, and
CUDA's kernels compiled for the CPU (see tests/emulated).
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    DTYPES,
    FORMS,
    LISTS,
    NORMS,
    SHAPES,
    SUMS,
    added,
    assert_same,
    cases,
    clone,
    make,
    numbers,
    scalar,
    some_cases,
)

from fbopt._build import load
from fbopt._ops import dispatch, reference
from fbopt._ops.flat import accumulator_dtype, flat_size, flat_views, stacks_like

OTHERS = ["dispatched", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)]
pytestmark = [
    pytest.mark.skipif(load.kernels() is None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("one_thread"),  # bits do not depend on the threads, as a test shows
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("name, chunks", FORMS)
def test_kernel_equals_reference(name, chunks, shapes, dtype, target):
    chosen = some_cases if shapes == LISTS["large"] else cases
    few = target.few if len(shapes) == 1000 else None
    for arguments in chosen(name, shapes, dtype, chunks)[:few]:
        if not shapes and name in NORMS:
            continue
        result, mine = target.call(name, arguments)
        theirs = clone(list(arguments))
        if not shapes:
            continue
        expected = getattr(reference, name)(*theirs)
        if name == "accumulate_exact_penalty_":
            mine, theirs = (added(arguments, found, dtype) for found in (mine, theirs))
        assert_same([result], [expected])
        assert_same(mine, theirs, terms=1 + 2 * chunks)


def test_norm_of_nothing():
    assert dispatch.squared_norm([]).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, chunks", [f for f in FORMS if f[0] not in SUMS])
@pytest.mark.parametrize("target", OTHERS, indirect=True)
def test_every_device_gives_the_same_bits(name, chunks, dtype, target):
    """What one element becomes is one rule, whatever runs it; only sums differ by their order."""
    for arguments in some_cases(name, LISTS["shapes"] + LISTS["large"], dtype, chunks):
        if name == "perturb_" and len(arguments) == 4:
            arguments = (*arguments, numbers(3.0, chunks))
        expected = clone(list(arguments))
        getattr(dispatch.table("cpu"), name)(*expected)
        _, found = target.call(name, arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_do_not_depend_on_alignment(dtype, target):
    x = make([(70_001,)], dtype, 0)[0]
    found = set()
    for start in range(9):
        moved = torch.cat([x.new_zeros(start), x])[start:]
        result, _ = target.call("squared_norm", ([moved, moved[:5]],))
        both, _ = target.call("adaptive_norms", ([x, x[:5]], [moved, moved[:5]], 0.01))
        other, _ = target.call("adaptive_norms", ([moved, moved[:5]], [x, x[:5]], 0.01))
        assert torch.equal(both, other)
        found.add((result.item(), *both.tolist()))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_of_parameters_do_not_matter_to_their_scale(dtype, target):
    """-0, denormal and large parameters; a NaN reaches the norm and its own point alone."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    p = torch.tensor([0.0, -0.0, tiny, -tiny, 200.0, -200.0, 1.0], dtype=dtype)
    g = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, -2.0], dtype=dtype)
    t = p.double().abs()
    for eta in (0.0, 0.25):
        norms, _ = target.call("adaptive_norms", ([p], [g], eta))
        wanted = torch.stack([g.double(), (t + eta) * g.double()]).square().sum(1)
        torch.testing.assert_close(norms, wanted, rtol=1e-14, atol=0)
        arguments = (torch.zeros_like(p), [p], [g], 0.5, eta, norms[1])
        moved = target.call("perturb_adaptive_", arguments)[1][0]
        expected = p.double() + 0.5 / norms[1].sqrt() * (t + eta) ** 2 * g.double()
        torch.testing.assert_close(moved, expected.to(dtype))
    p[0] = float("nan")
    norms, _ = target.call("adaptive_norms", ([p], [g], 0.25))
    assert norms[0].isfinite() and norms[1].isnan()
    arguments = (torch.zeros_like(p), [p], [g], 0.5, 0.25, scalar(1.0))
    moved = target.call("perturb_adaptive_", arguments)[1][0]
    assert moved.isnan().tolist() == [True] + [False] * 6


@pytest.mark.parametrize("radius", [0.05, -0.05])
def test_gradients_too_small_for_a_step_give_finite_points(radius, target):
    """The step radius / norm would be infinite in float32, and 0 times it NaN."""
    p = torch.tensor([1e-20, 0.0, 1e-20])
    for name, g, square in (
        ("perturb_", torch.tensor([1e-44, 0.0, 0.0]), scalar(1e-88)),
        ("perturb_adaptive_", torch.tensor([1e-20, 0.0, 1e-20]), scalar(2e-80)),
    ):
        eta = (0.0,) if "adaptive" in name else ()
        arguments = (torch.zeros(3), [p], [g], radius, *eta, square)
        moved = target.call(name, arguments)[1][0]
        assert moved.isfinite().all() and (moved - p).norm() <= abs(radius) and moved[1] == 0
        assert moved[0].sign() == 1 if radius > 0 else moved[0] < p[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name, chunks", FORMS)
def test_opcheck(name, chunks, device):
    dispatch.table(device)
    op = getattr(torch.ops.fbopt, name).default
    for arguments in cases(name, [(), (5,), (3, 4)], torch.float32, chunks)[:6]:
        torch.library.opcheck(op, tuple(clone(list(arguments), device)))


@pytest.mark.parametrize("name, chunks", FORMS)
def test_meta_tensors(name, chunks):
    dispatch.table("cpu")
    arguments = clone(list(cases(name, [(), (5,), (3, 4)], torch.float32, chunks)[0]), "meta")
    result = getattr(torch.ops.fbopt, name)(*arguments)
    norms = name in (*NORMS, "perturb_")
    assert (result is not None) == norms
    if norms:
        shape = (2,) * (name == "adaptive_norms") + (chunks,) * bool(chunks)
        assert (result.device.type, result.shape, result.dtype) == ("meta", shape, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, chunks", FORMS)
def test_bits_do_not_depend_on_thread_count(name, chunks, dtype, threads):
    shapes = [(300_001,), (17,), (64, 64, 3, 3), (1,)]
    for arguments in cases(name, shapes, dtype, chunks)[:3]:
        results = []
        for n in (1, 2, 3, 5):
            threads(n)
            mine = clone(list(arguments))
            results.append((getattr(dispatch.table("cpu"), name)(*mine), mine))
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
    assert dispatch.squared_norm([ones]).item() == 20_000_000


def test_sum_of_many_small_and_one_large():
    x = torch.full((100_000,), 1e-4)
    x[5] = 1e4
    exact = math.fsum((x.double() ** 2).tolist())
    assert dispatch.squared_norm([x]).item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_reaches_every_result(bad, target):
    g = torch.ones(1000)
    g[700] = bad
    zeros = torch.zeros(1000)
    square = reference.squared_norm([g])
    calls = {
        "squared_norm": ([g],),
        "perturb_": (zeros, [zeros], [g], 1e-2),
        "adaptive_norms": ([g], [zeros + 1], 0.01),
        "perturb_adaptive_": (zeros, [zeros], [g], 1e-2, 0.01, square),
        "accumulate_penalty_": ([zeros], [g], [g + 1], [], scalar(1.0), scalar(0.1), square, 1e-2),
        "clip_": ([g], square.sqrt(), 1.0),
    }
    for name, arguments in calls.items():
        result, found = target.call(name, arguments)
        expected = clone(list(arguments))
        wanted = getattr(reference, name)(*expected)
        torch.testing.assert_close([result, *found], [wanted, *expected], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_half_precision_value_and_rounding(dtype, target):
    """All bit patterns of the half types, and ties, are loaded and rounded as torch does."""
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
    else:
        x = torch.randn(70_000, dtype=dtype)
    out, zero = torch.zeros(x.numel(), dtype=dtype), torch.zeros_like(x)
    _, found = target.call("perturb_", (out, [x], [zero], 1.0))
    assert torch.equal(found[0], x)
    wide = accumulator_dtype(dtype)
    grads = [torch.rand(x.shape, dtype=wide) * x.to(wide).abs().clamp(max=1e4)]
    rest = ([], scalar(0.5), None, None, None, 0.0, 0.0, 0.0, False, False, False)
    _, found = target.call("sgd_step_", ([x], grads, *rest))
    theirs = [x.clone()]
    reference.sgd_step_(theirs, grads, *rest)
    assert torch.equal(found[0][0], theirs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_output_is_streamed_correctly(dtype):
    """Above the cache's size stores go past it, from aligned and misaligned starts alike."""
    shapes = [(5,), (2_500_001,), (3,), (3_000_000,)]
    ops, wide = dispatch.table("cpu"), accumulator_dtype(dtype)
    params, grads = make(shapes, dtype, 0), make([(3, *s) for s in shapes], dtype, 1)
    out = torch.zeros(flat_size(stacks_like(params, 3)), dtype=dtype)
    wanted = torch.zeros_like(out)
    squares = ops.perturb_(out, params, grads, 0.5)
    reference.perturb_(wanted, params, grads, 0.5, squares)
    torch.testing.assert_close(out, wanted)
    _, scaled = ops.adaptive_norms(params, grads, 0.01)
    ops.perturb_adaptive_(out, params, grads, 0.5, 0.01, scaled)
    reference.perturb_adaptive_(wanted, params, grads, 0.5, 0.01, scaled)
    torch.testing.assert_close(out, wanted)
    packed = torch.zeros(sum(g.numel() for g in grads) + 1, dtype=dtype)[1:]
    ops.pack_(packed, grads)
    assert torch.equal(packed, torch.cat([g.reshape(-1) for g in grads]))
    sums = [(p * 2**20).to(torch.int64) for p in params]
    carries = [torch.zeros_like(a, dtype=torch.int32) for a in sums]
    numbers = torch.zeros(4, dtype=torch.float64), torch.full((4,), 2.0**20, dtype=torch.float64)
    means, expected = ([torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2))
    ops.exact_mean_(means, sums, carries, *numbers, scalar(3.0))
    reference.exact_mean_(expected, sums, carries, *numbers, scalar(3.0))
    assert_same(means, expected)


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("pack_", lambda a: a.__setitem__(0, torch.zeros(3)), "out must have 18 elements"),
        ("pack_", lambda a: a.__setitem__(0, torch.zeros(18).double()), "another dtype than out"),
        (
            "accumulate_",
            lambda a: a.__setitem__(2, torch.zeros(1, 1)),
            "weight must be a 0-dim tensor",
        ),
        ("accumulate_", lambda a: a.__setitem__(2, torch.tensor(1)), "weight must be float32 or"),
        ("accumulate_", lambda a: a[1].pop(), "grads has 2 tensors, expected 3"),
        ("accumulate_", lambda a: a[1].__setitem__(1, torch.zeros(4)), r"grads\[1\].*shape"),
        ("accumulate_", lambda a: a[1].__setitem__(1, a[1][1].double()), r"grads\[1\].*dtype"),
        ("accumulate_penalty_", lambda a: a[2].pop(), "plus has 2 tensors"),
        ("perturb_", lambda a: a.__setitem__(0, torch.zeros(3)), "out must be contiguous"),
        ("adaptive_norms", lambda a: a[1].pop(), "grads has 2 tensors, expected 3"),
        ("perturb_adaptive_", lambda a: a[2].pop(), "grads has 2 tensors, expected 3"),
        ("perturb_adaptive_", lambda a: a.__setitem__(5, torch.tensor(1)), "squared_norm must be"),
        ("sgd_step_", lambda a: a[2].append(torch.zeros(3)), "momentum_buffers"),
        ("squared_norm", lambda a: a.__setitem__(0, [torch.zeros(3).int()]), "float32, float64"),
        (
            "row_products_",
            lambda a: a.__setitem__(0, torch.zeros(3).double()),
            "out must be a cont",
        ),
        ("row_products_", lambda a: a.__setitem__(1, torch.zeros(18)), "rows must be a contiguous"),
        ("row_products_", lambda a: a.__setitem__(1, a[1].half()), "rows must be float32 or"),
        ("row_products_", lambda a: a.__setitem__(3, torch.zeros(17)), "b must be .* 18 elements"),
        (
            "combine_rows_",
            lambda a: a.__setitem__(0, a[0].double()),
            "out must be .* dtype of rows",
        ),
        ("combine_rows_", lambda a: a.__setitem__(2, a[2].float()), "coefficients must be a"),
    ],
)
def test_kernels_refuse_what_does_not_fit(name, spoil, message, target):
    arguments = clone(list(cases(name, [(2,), (3, 5), ()], torch.float32)[0]))
    spoil(arguments)
    arguments = clone(arguments, target.device)
    before = clone(arguments, target.device)
    with pytest.raises(RuntimeError, match=message):
        target.op(name)(*arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0, equal_nan=True)


def test_flat_views_follow_memory_order():
    tensors = [t for t in make(SHAPES, torch.float32, 1) if t.numel()]
    flat = torch.arange(flat_size(tensors, align=1)).float()
    views = flat_views(flat, tensors, align=1)
    assert [v.shape for v in views] == [t.shape for t in tensors]
    assert torch.equal(torch.cat([v.flatten().sort().values for v in views]), flat)


def test_flat_views_are_aligned():
    tensors = make([(3,), (), (0,), (40,), (16,), (1,)], torch.float32, 0)
    flat = torch.zeros(flat_size(tensors))
    starts = [v.storage_offset() for v in flat_views(flat, tensors)]
    assert starts == [0, 16, 32, 32, 80, 96] and len(flat) == 97


def test_compiled_function_calls_the_ops():
    dispatch.table("cpu")
    ops = torch.ops.fbopt

    def update(sums, grads, weight):
        ops.accumulate_(sums, grads, weight)
        return ops.squared_norm(sums).sqrt()

    sums, grads = make([(5,), (3, 4)], torch.float32, 0), make([(5,), (3, 4)], torch.float32, 1)
    expected = clone(sums)
    wanted = update(expected, grads, scalar(2.0))
    got = torch.compile(update, fullgraph=True, backend="aot_eager")(sums, grads, scalar(2.0))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(sums, expected)
