"""Inputs for tests of the ops: shapes, layouts, dtypes and lists; how results are compared."""

from __future__ import annotations

import torch

from fbopt._ops import dispatch
from fbopt._ops.flat import accumulator_dtype, flat_size, stacks_like

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


def stack_channels_last(t):
    return t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if t.dim() == 5 else t


def stack_transposed(t):
    return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t


def interleaved(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


# Elements on either side of a copy, and what they hold.
FENCE, POST = 64, 77.0

STRIDES = [lambda t: t, channels_last, transposed, with_gaps, misaligned]
STACK_STRIDES = [lambda t: t, stack_channels_last, stack_transposed, interleaved]
STACK_STRIDES += [with_gaps, misaligned]
# Ops that take stacks; and all ops, with the number of chunks of their stacks or 0 for none.
STACKED = ["squared_norm", "perturb_", "adaptive_norms", "perturb_adaptive_", "accumulate_"]
STACKED += ["accumulate_penalty_", "accumulate_exact_", "accumulate_exact_penalty_"]
# Those that return sums, of which the order depends on the device.
NORMS = ["squared_norm", "adaptive_norms"]
FORMS = [(name, 0) for name in dispatch.NAMES] + [(name, 3) for name in STACKED]
# Those that take lists; and those whose results are sums over elements, in an order of their own.
LISTED = [(name, chunks) for name, chunks in FORMS if "rows" not in name and "row_" not in name]
SUMS = [*NORMS, "row_products_"]
LISTS = {
    "shapes": SHAPES,
    "one": [(100,)],
    "none": [],
    "thousand": [(16,)] * 1000,
    # More than the kernels' blocks and the CPU's runs of elements, and no multiple of them.
    "large": [(140_000,), (3,), (33_001,)],
}


def make(shapes, dtype, seed, layouts=STRIDES):
    """Random tensors that cycle through the memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [layouts[(i + seed) % len(layouts)](t) for i, t in enumerate(made)]


def clone(value, device="cpu"):
    """A copy that lies in memory as the original does, by strides and alignment.

    What an op mutates must not leak into the next call. The copy has a fence on either side, see
    `fences_hold`.
    """
    if isinstance(value, list):
        return [clone(v, device) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    start = FENCE + value.storage_offset() % FENCE
    storage = torch.full((start + last + 1 + FENCE,), POST, dtype=value.dtype, device=device)
    return storage.as_strided(value.shape, value.stride(), start).copy_(value)


def fences_hold(value):
    """Whether nothing was written beside the elements of what `clone` returned."""
    if not isinstance(value, torch.Tensor):
        return all(fences_hold(v) for v in value) if isinstance(value, list) else True
    beside = value._base.clone()
    beside.as_strided(value.shape, value.stride(), value.storage_offset()).fill_(POST)
    return bool((beside == POST).all())


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def numbers(x, chunks):
    """x for a chunk; for several x, 0, 3 x / 4 and so on."""
    if not chunks:
        return scalar(x)
    return torch.tensor([x, 0.0, 0.75 * x, 2 * x], dtype=torch.float64).repeat(chunks)[:chunks]


def some_cases(name, shapes, dtype, chunks=0):
    """Every fifth of the many of sgd_step_, all of other ops: each option still has each value."""
    return cases(name, shapes, dtype, chunks)[:: 5 if name == "sgd_step_" else 1]


def cases(name, shapes, dtype, chunks=0):
    """The argument lists that an op is tried with, with stacks of so many chunks or none."""
    wide = accumulator_dtype(dtype)
    params, grads, plus, minus = (make(shapes, dtype, seed) for seed in range(4))
    if chunks:
        stacks = [(chunks, *s) for s in shapes]
        grads, plus, minus = (make(stacks, dtype, seed, STACK_STRIDES) for seed in range(1, 4))
    sums = make(shapes, wide, 4, [lambda t: t, channels_last, transposed])
    if name == "squared_norm":
        return [(grads, True) if chunks else (params,)]
    if name == "pack_":
        return [(torch.empty(sum(p.numel() for p in params), dtype=dtype), params)]
    if name == "adaptive_norms":
        return [(params, grads, 0.01), (params, grads, 0.0)]
    like = stacks_like(params, chunks) if chunks else params
    out = torch.zeros(flat_size(like), dtype=dtype)
    zero = [torch.zeros_like(g) for g in grads]
    if name == "perturb_adaptive_":
        return [
            (out, params, grads, 1e-2, 0.01, numbers(3.0, chunks)),
            (out, params, grads, -0.5, 0.0, numbers(4.0, chunks)),
            (out, params, zero, 1e-2, 0.01, numbers(0.0, chunks)),
        ]
    if name == "perturb_":
        return [
            (out, params, grads, 1e-2),
            (out, params, grads, -0.5, numbers(4.0, chunks)),
            (out, params, zero, 1e-2),
        ]
    if name == "accumulate_":
        weights = numbers(128.0, chunks), numbers(3.0, chunks).float()
        return [(sums, grads, weight) for weight in weights]
    if name == "accumulate_penalty_":
        rest = (numbers(96.0, chunks), scalar(0.1), numbers(2.5, chunks), 1e-2)
        return [
            (sums, grads, plus, [], *rest),
            (sums, grads, plus, minus, *rest),
            (sums, grads, plus, [], numbers(1.0, chunks), scalar(0.1), numbers(0.0, chunks), 1e-2),
        ]
    if "exact" in name:
        return exact_cases(name, shapes, sums, grads, plus, minus, chunks)
    if "row" in name:
        return row_cases(name, sum(p.numel() for p in params), wide)
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


def row_cases(name, columns, dtype):
    """Matrices of some rows, aligned and not, and vectors beside them or among their rows."""
    found = []
    for count, layout in ((1, misaligned), (9, lambda t: t), (13, misaligned)):
        rows, vectors = make([(count, columns), (2, columns)], dtype, count, [layout])
        if name == "row_products_":
            out = torch.full((2, count), float("nan"), dtype=torch.float64)
            found.append((out, rows, rows[-1].clone(), vectors[1].clone()))
        else:
            coefficients = torch.linspace(-1, 3, count, dtype=torch.float64)
            found.append((vectors[0].clone(), rows, coefficients))
    return found


def exact_cases(name, shapes, means, grads, plus, minus, chunks):
    """Sums in fixed point: some near to wrapping or beyond, and scales from coarse to out of reach.

    In units of the sums, contributions are of some 2^52, 2^57 (sums wrap), 2^70 (they carry) or
    2^100 (nothing holds them).
    """
    generator = torch.Generator().manual_seed(9)
    sums = [torch.empty_like(m, dtype=torch.int64) for m in means]
    for t in sums:
        t.random_(-(2**63), 2**63 - 1, generator=generator)
    carries = [t.bitwise_right_shift(60).to(torch.int32) for t in sums]
    maxima = torch.rand(len(shapes), generator=generator, dtype=torch.float64)
    largest = 70.0 if "penalty" in name else 100.0
    exponents = torch.tensor([52.0, 57.0, 70.0, largest, 57.0]).repeat(len(shapes))
    scales = 2.0 ** (exponents[: len(shapes)].double() - 7)
    kept = (sums, carries, maxima)
    if name == "exact_mean_":
        spoiled = maxima.clone()
        spoiled[1::3], spoiled[2::3] = float("nan"), float("inf")
        return [(means, sums, carries, m, scales, scalar(50_000.0)) for m in (maxima, spoiled)]
    if name == "accumulate_exact_":
        powers = [torch.ones_like(g).copysign(g) for g in grads]  # odd multiples of 2^63 units
        ties = scales.new_full((len(shapes),), 2.0**63)
        return [
            *((*kept, grads, numbers(w, chunks), scales) for w in (96.0, 0.5)),
            *((*kept, powers, numbers(w, chunks), ties) for w in (1.0, 3.0, 5.0)),
        ]
    rest = (numbers(96.0, chunks), scales, scalar(0.1), numbers(2.5, chunks), 1e-2)
    return [(*kept, grads, plus, side, *rest) for side in ([], minus)]


def added(arguments, afterwards, dtype):
    """What was added to sums in fixed point, in their units; and the maxima.

    In the type that contributions are rounded to where there is a penalty.
    """
    change = []
    pairs = zip(arguments[0], arguments[1], afterwards[0], afterwards[1], strict=True)
    for before, carries, after, more in pairs:
        high = (more - carries).double() * 2.0**64
        high += ((after >> 32) - (before >> 32)).double() * 2.0**32
        low = (after & 0xFFFFFFFF) - (before & 0xFFFFFFFF)
        change.append(high + low.double())
    return [t.to(accumulator_dtype(dtype)) for t in (*change, afterwards[2])]


def assert_same(got, wanted, terms=1):
    """Equal to the rounding of so many terms, measured by the largest element: sums may cancel."""
    for a, b in zip(got, wanted, strict=True):
        if isinstance(b, list):
            assert_same(a, b, terms)
        elif isinstance(b, torch.Tensor) and not b.is_floating_point():
            assert torch.equal(a, b)
        elif isinstance(b, torch.Tensor):
            eps = torch.finfo(b.dtype).eps
            largest = b.double().nan_to_num(0.0).abs().max().item() if b.numel() else 0.0
            atol = 8 * terms * eps * largest
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=atol, equal_nan=True)
