"""Stacks: K calls in one, bit for bit, on the CPU, on a GPU, and by CUDA's kernels on the CPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, LISTS, STACKED, cases, clone, make, numbers, scalar
from targets import to_cpu

from fbopt._build import load
from fbopt._ops import dispatch, reference
from fbopt._ops.flat import flat_size, flat_views, stacks_like

pytestmark = [
    pytest.mark.skipif(load.kernels() is None, reason="no compiled kernels here"),
    pytest.mark.usefixtures("one_thread"),
]
# Arguments of which each chunk has its own.
OWN = ("tensors", "grads", "plus", "minus", "weight", "squared_norm")


def of_chunk(name, arguments, k):
    """The arguments of chunk k alone: slices; what is not its own is shared by all."""
    names = inspect.signature(getattr(reference, name)).parameters
    found = {n: a for n, a in zip(names, arguments, strict=False) if n != "stacked"}
    for n in OWN:
        if n in found:
            found[n] = [t[k] for t in found[n]] if isinstance(found[n], list) else found[n][k]
    return found


def one_by_one(target, name, arguments, chunks):
    """What `target.call` returns, by a call for each chunk."""
    mine, results = clone(list(arguments), target.device), []
    for k in range(chunks):
        found = of_chunk(name, mine, k)
        if "out" in found:
            params = found["params"]
            views = flat_views(mine[0], stacks_like(params, chunks))
            found["out"] = mine[0].new_zeros(flat_size(params))
        results.append(target.op(name)(*found.values()))
        if "out" in found:
            for view, copy in zip(views, flat_views(found["out"], params), strict=True):
                view[k] = copy
    return (None if results[0] is None else torch.stack(results, -1).cpu()), to_cpu(mine)


def assert_one_by_one(target, name, arguments, chunks):
    together = target.call(name, arguments)
    alone = one_by_one(target, name, arguments, chunks)
    torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["shapes", "one", "large"])
@pytest.mark.parametrize("name", STACKED)
def test_stacks_equal_one_by_one(name, shapes, dtype, target):
    for arguments in cases(name, LISTS[shapes], dtype, chunks=3):
        assert_one_by_one(target, name, arguments, 3)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(STACKED),
    chunks=st.integers(1, 6),
)
def test_any_stacks(target, shapes, dtype, name, chunks):
    for arguments in cases(name, shapes, dtype, chunks)[:2]:
        assert_one_by_one(target, name, arguments, chunks)


@pytest.mark.parametrize("name", STACKED)
def test_many_chunks(name, target):
    """More than one launch takes on a GPU."""
    for arguments in cases(name, [(5,), (2, 24), ()], torch.float32, chunks=131):
        assert_one_by_one(target, name, arguments, 131)


def test_gradients_of_vmap(target):
    """Two chunks at two points: their norms, shifted points and sums."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    params = {n: p.detach() for n, p in model.named_parameters()}
    x, y = torch.randn(2, 7, 5), torch.randint(3, (2, 7))

    def loss(params, x, y):
        out = torch.func.functional_call(model, params, (x,))
        return torch.nn.functional.cross_entropy(out, y)

    stacks = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    out = torch.zeros(flat_size(stacks_like(list(params.values()), 2)))
    arguments = (out, list(params.values()), list(stacks.values()), 0.5)
    squares, found = target.call("perturb_", arguments)
    for k in range(2):
        alone = torch.func.grad(loss)(params, x[k], y[k])
        step = 0.5 / torch.cat([g.flatten() for g in alone.values()]).norm()
        views = flat_views(found[0], stacks_like(list(params.values()), 2))
        for view, (n, p) in zip(views, params.items(), strict=True):
            torch.testing.assert_close(view[k], p + step * alone[n])
    torch.testing.assert_close(squares, reference.squared_norm(arguments[2], True))


def test_stacks_that_repeat_one_slice(target):
    """Expanded gradients and weights, which share memory."""
    grads = [g.expand(3, *g.shape) for g in make([(5,), (40, 30), ()], torch.float32, 1)]
    sums = [torch.zeros(g.shape[1:], device=target.device) for g in grads]
    weight = torch.ones((), dtype=torch.float64, device=target.device).expand(3)
    target.op("accumulate_")(sums, [g.to(target.device) for g in grads], weight)
    torch.testing.assert_close([s.cpu() for s in sums], [3 * g[0] for g in grads])


def test_norms_of_stacks_on_several_dtypes():
    stacks = [torch.ones(2, 3), torch.full((2, 2), 2.0, dtype=torch.float64)]
    assert dispatch.squared_norm(stacks, stacked=True).tolist() == [11, 11]
    with pytest.raises(ValueError, match="tensors must hold at least one stack"):
        dispatch.squared_norm([], stacked=True)


def put(position, value):
    return lambda arguments: arguments.__setitem__(position, value)


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("squared_norm", put(0, [torch.zeros(0, 3)]), r"tensors\[0\] must be a stack of at least"),
        ("squared_norm", put(0, [torch.zeros(())]), r"tensors\[0\] must be a stack of at least"),
        ("squared_norm", put(0, [torch.zeros(2), torch.zeros(3)]), r"tensors\[1\].* stack of 2"),
        ("perturb_", lambda a: a[2].__setitem__(1, torch.zeros(2, 5)), r"grads\[1\].* stack of 3"),
        ("perturb_", lambda a: a[2].__setitem__(1, torch.zeros(5)), r"grads\[1\].* stack of 3"),
        ("perturb_", lambda a: a[2].__setitem__(1, torch.zeros(3, 4)), r"grads\[1\].*shape.*after"),
        ("perturb_", put(2, [torch.zeros(0, 2), torch.zeros(0, 5)]), r"grads\[0\] must be a stack"),
        ("perturb_", put(0, torch.zeros(21)), "out must be contiguous and have 31 elements"),
        ("perturb_", lambda a: a.append(scalar(1.0)), "squared_norm must be a 1-D tensor of 3"),
        ("perturb_", lambda a: a.append(numbers(1.0, 2)), "squared_norm must be a 1-D tensor of 3"),
        ("adaptive_norms", lambda a: a[1].__setitem__(1, torch.zeros(5)), r"grads\[1\].* of 3"),
        ("adaptive_norms", put(1, [torch.zeros(0, 2), torch.zeros(0, 5)]), r"grads\[0\] must be a"),
        ("perturb_adaptive_", put(0, torch.zeros(21)), "out must be contiguous and have 31 elem"),
        ("perturb_adaptive_", put(5, scalar(1.0)), "squared_norm must be a 1-D tensor of 3"),
        ("accumulate_", put(2, numbers(1.0, 2)), r"grads\[0\] must be a stack of 2"),
        ("accumulate_", put(2, scalar(1.0)), r"grads\[0\] has another shape"),
        ("accumulate_", put(2, torch.zeros(0)), "weight must be a 0-dim tensor, or 1-D"),
        ("accumulate_", put(2, torch.ones(1, 3)), "weight must be a 0-dim tensor, or 1-D"),
        ("accumulate_", put(2, torch.ones(3).int()), "weight must be float32 or float64"),
        ("accumulate_penalty_", put(6, scalar(1.0)), "squared_norm must be a 1-D tensor of 3"),
        ("accumulate_penalty_", put(5, numbers(1.0, 3)), "coefficient must be a 0-dim tensor"),
        ("accumulate_penalty_", lambda a: a[2].pop(), "plus has 1 tensors, expected 2"),
        ("accumulate_exact_", put(4, numbers(1.0, 2)), r"grads\[0\] must be a stack of 2"),
        ("accumulate_exact_penalty_", put(9, scalar(1.0)), "squared_norm must be a 1-D tensor"),
    ],
)
def test_stacks_that_do_not_fit(name, spoil, message, target):
    arguments = clone(list(cases(name, [(2,), (5,)], torch.float32, chunks=3)[0]))
    spoil(arguments)
    arguments = clone(arguments, target.device)
    before = clone(arguments, target.device)
    with pytest.raises(RuntimeError, match=message):
        target.op(name)(*arguments)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0, equal_nan=True)


def test_the_reference_refuses_stacks_of_other_lengths():
    with pytest.raises(ValueError, match="stacks must have 2 slices"):
        reference.accumulate_([torch.zeros(4)], [torch.zeros(3, 4)], torch.ones(2))


@pytest.mark.parametrize("chunks", [1, 3])
def test_views_of_shifted_points_follow_the_parameters(chunks):
    params = make([(4, 3, 2, 2), (7,), ()], torch.float32, 1)
    like = stacks_like(params, chunks)
    for view, p in zip(flat_views(torch.zeros(flat_size(like)), like), params, strict=True):
        assert view.shape == (chunks, *p.shape) and view.stride(0) == p.numel()
        assert view[0].stride() == torch.empty_like(p).stride()
