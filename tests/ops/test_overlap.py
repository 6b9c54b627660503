"""Results that would be written over their own inputs are refused, before anything is changed; by
the kernels and by plain torch in the same words.
"""

from __future__ import annotations

import pytest
import torch
from conftest import TARGETS

from fbopt._build import load
from fbopt._ops import reference

pytestmark = [
    pytest.mark.skipif(load.kernels() is None, reason="no compiled kernels here"),
    pytest.mark.parametrize("target", [*TARGETS, "reference"], indirect=True),
]
N = 48  # a multiple of 16, so that flat buffers have no gaps


@pytest.fixture(autouse=True)
def device(target):
    """Make all tensors where the ops run."""
    with torch.device(target.device):
        yield


def one() -> torch.Tensor:
    return torch.ones((), dtype=torch.float64)


def memory(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=dtype).view(shape)


def exact(sums, carries, maxima, grads, scales):
    return sums, carries, maxima, grads, one(), scales


def cases() -> dict[str, tuple[str, tuple]]:
    """Calls of every op whose arguments overlap: what it is about, its op, its arguments."""
    x, y, z = memory(N), memory(2 * N), memory(N)
    rows, wide = memory(3, N), memory(2 * N, dtype=torch.float64)
    integers = torch.zeros(4 * N, dtype=torch.int64)
    sums, carries = [integers[:N]], [torch.zeros(N, dtype=torch.int32)]
    maxima, scales = memory(1, dtype=torch.float64), memory(1, dtype=torch.float64)
    momentum, lr = memory(N), torch.tensor(0.1)
    rule = (0.9, 0.0, 0.0, False, False, False)
    inside = integers.view(torch.int32)[2 : 2 + N]
    return {
        "pack_ into what is packed": ("pack_", (y, [y[:N], y[N:]])),
        "pack_ half of it": ("pack_", (y[: 2 * N], [z, y[1 : 1 + N]])),
        "perturb_ the parameters": ("perturb_", (x, [x], [z], 0.1, None)),
        "perturb_ the gradient": ("perturb_", (x, [z], [x], 0.1, None)),
        "perturb_ a part": ("perturb_", (y[:N], [y[N // 2 : N // 2 + N]], [z], 0.1, None)),
        "perturb_adaptive_": ("perturb_adaptive_", (x, [x], [z], 0.1, 0.01, one())),
        "accumulate_ itself": ("accumulate_", ([x], [x], one())),
        "accumulate_ shifted": ("accumulate_", ([y[:N]], [y[1 : 1 + N]], one())),
        "accumulate_ another": ("accumulate_", ([y[:N], y[N:]], [z, y[:N]], one())),
        "accumulate_ strided": ("accumulate_", ([y[::2]], [y[:N]], one())),
        "accumulate_ expanded": ("accumulate_", ([x[:1].expand(N)], [z], one())),
        "accumulate_ expanded, as long as its memory": (
            "accumulate_", ([memory(6).as_strided((2, 3), (5, 0))], [memory(2, 3)], one()),
        ),
        "accumulate_ twice": ("accumulate_", ([x, x], [z, z], one())),
        "accumulate_ its weight": ("accumulate_", ([x], [z], x[3])),
        "penalty": (
            "accumulate_penalty_", ([x], [z], [x], [], one(), one(), one(), 0.1),
        ),
        "penalty, behind": (
            "accumulate_penalty_", ([x], [z], [memory(N)], [x], one(), one(), one(), 0.1),
        ),
        "exact, carries": ("accumulate_exact_", exact(sums, [inside], maxima, [z], scales)),
        "exact, scales": ("accumulate_exact_", exact(sums, carries, maxima, [z], maxima)),
        "exact, twice": (
            "accumulate_exact_",
            exact([integers[:N], integers[1 : 1 + N]], [*carries, torch.zeros_like(carries[0])],
                  memory(2, dtype=torch.float64), [z, z], memory(2, dtype=torch.float64)),
        ),
        "exact_mean_": (
            "exact_mean_",
            ([integers.view(torch.float32)[:N]], sums, carries, maxima, scales, one()),
        ),
        "clip_ its norm": ("clip_", ([wide], wide[1], 0.1)),
        "clip_ twice": ("clip_", ([x, x], one(), 0.1)),
        "accumulate_ one of several, by a grad with gaps": (
            "accumulate_",
            ([y[:2], y[20:22]], [y.as_strided((2,), (50,)), memory(2)], one()),
        ),
        "clip_ columns that meet": ("clip_", ([rows[:, :5], rows[:, 4:9]], one(), 0.1)),
        "sgd_step_, gradients that are sums": (
            "sgd_step_", ([x], [x], [momentum], lr, one(), None, None, *rule),
        ),
        "sgd_step_, sums that are one": (
            "sgd_step_", ([x, z], [y[:N]] * 2, [momentum, y[N:]], lr, one(), None, None, *rule),
        ),
        "sgd_step_, another's gradient": (
            "sgd_step_",
            ([x, z], [z, y[:N]], [momentum, y[N:]], lr, None, None, None, *rule),
        ),
        "sgd_step_, a gradient that is shifted": (
            "sgd_step_", ([y[:N]], [y[1 : 1 + N]], [momentum], lr, None, None, None, *rule),
        ),
        "sgd_step_, momentum": ("sgd_step_", ([x], [z], [z], lr, None, None, None, *rule)),
        "sgd_step_, its rate": ("sgd_step_", ([x], [z], [momentum], x[0], None, None, None, *rule)),
        "row_products_": (
            "row_products_", (wide[:6], memory(3, N), *[wide.view(torch.float32)[:N]] * 2),
        ),
        "combine_rows_": ("combine_rows_", (rows[1], rows, memory(3, dtype=torch.float64))),
    }  # fmt: skip


def tensors_of(arguments: tuple) -> list[torch.Tensor]:
    found = []
    for argument in arguments:
        found += [argument] if isinstance(argument, torch.Tensor) else []
        found += argument if isinstance(argument, list) else []
    return found


@pytest.mark.parametrize("case", cases())
def test_overlaps_are_refused(case, target):
    name, arguments = cases()[case]
    tensors = tensors_of(arguments)
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=r"share|more than once") as refused:
        target.op(name)(*arguments)
    with pytest.raises(RuntimeError) as in_plain_torch:
        getattr(reference, name)(*arguments)
    assert str(in_plain_torch.value) in str(refused.value)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_what_is_interleaved_lies_apart(target):
    """Every second number of one memory, and the others; rows and columns of a matrix."""
    y = memory(2 * N)
    expected = y[::2] + 2.0 * y[1::2]
    target.op("accumulate_")([y[::2]], [y[1::2]], 2 * one())
    assert torch.equal(y[::2], expected)
    m = memory(6, 6)
    expected = m[:, :3] + m[:, 3:]
    target.op("accumulate_")([m[:, :3]], [m[:, 3:]], one())
    assert torch.equal(m[:, :3], expected)


def test_gaps_hold_numbers_of_another_dtype(target):
    """float64 in every second place of memory, and float32 beside and inside of them."""
    wide = memory(2 * N, dtype=torch.float64)
    sums, grads = [wide[::2]], [memory(N, dtype=torch.float64)]
    halves = wide.view(torch.float32)
    halves[3], halves[4 * N - 2] = 2.0, 3.0
    target.op("accumulate_")(sums, grads, halves[3])
    assert torch.equal(wide[2::2], memory(2 * N, dtype=torch.float64)[2::2] + 2 * grads[0][1:])
    target.op("accumulate_")(sums, grads, halves[4 * N - 2])
    for inside in (halves[4], halves[5]):
        with pytest.raises(RuntimeError, match="sums is written to and shares memory with weight"):
            target.op("accumulate_")(sums, grads, inside)


def test_neighbours_lie_apart(target):
    y = memory(3 * N)
    expected = y[N : 2 * N] + y[:N]
    target.op("accumulate_")([y[N : 2 * N], y[2 * N :]], [y[:N], y[:N].clone()], one())
    assert torch.equal(y[N : 2 * N], expected)
    empty = y[:0]
    target.op("accumulate_")([empty], [empty], one())


def test_lists_in_any_order(target):
    """Of 300 tensors in one memory, the last of which is an input, too."""
    y = memory(301 * 16)
    sums = [y[16 * i : 16 * i + 16] for i in (*range(299, -1, -2), *range(0, 300, 2))]
    grads = [torch.ones(16) for _ in sums]
    target.op("accumulate_")(sums, grads, one())
    assert torch.equal(y[: 300 * 16], memory(301 * 16)[: 300 * 16] + 1)
    grads[7] = y[40 : 40 + 16]
    with pytest.raises(RuntimeError, match="sums is written to and shares memory with grads"):
        target.op("accumulate_")(sums, grads, one())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_may_be_the_parameter_or_anothers_gradient(target, momentum):
    """As for torch.optim.SGD: without a divisor gradients are only read."""
    shared = memory(3 * N)
    for grads_of in (lambda p: list(p), lambda p: [shared, shared]):
        params = [memory(3 * N), memory(3 * N) / 2]
        expected = [p.clone() for p in params]
        buffers = [torch.empty_like(p) for p in params if momentum]
        rule = (torch.tensor(0.1), None, None, None, momentum, 0.0, 0.01, False, False, True)
        for p, g in zip(expected, [g.clone() for g in grads_of(params)], strict=True):
            own = [torch.empty_like(p)] if momentum else []
            reference.sgd_step_([p], [g], own, *rule)
        target.op("sgd_step_")(params, grads_of(params), buffers, *rule)
        for found, wanted in zip(params, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_columns_of_one_matrix_are_told_apart_at_once(target):
    """By their strides: a list of the places of so many elements would not end."""
    matrix = torch.ones(100_000, 2, 8)
    parts = [matrix[:, 0, :5], matrix[:, 0, 5:], matrix[:, 1, 1:4], *matrix[:, 1, 4:].unbind(1)]
    target.op("clip_")(parts, 4 * one(), 1.0)
    assert matrix[:, 1, 0].eq(1).all()
    assert matrix[:, :, 5:].max() < 0.5
    with pytest.raises(RuntimeError, match="grads and grads share memory"):
        target.op("clip_")([*parts, matrix[:, 1, 3:5]], 4 * one(), 1.0)
