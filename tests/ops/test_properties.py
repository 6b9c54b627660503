"""Properties of any list of tensors: ops equal fbopt.reference, launches cover every element."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, NORMS, STRIDES, added, assert_same, cases, clone
from targets import emulator, rows, span

from fbopt._build import load
from fbopt._ops import dispatch, reference

pytestmark = pytest.mark.skipif(load.kernels() is None, reason="no compiled kernels here")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from([n for n in dispatch.NAMES if n not in NORMS]),
    seed=st.integers(0, 4),
)
def test_any_shapes(target, shapes, dtype, name, seed):
    if not shapes:
        return
    layouts = STRIDES[seed:] + STRIDES[:seed]
    for arguments in cases(name, shapes, dtype)[:2]:
        arguments = [
            [layouts[i % len(layouts)](t) for i, t in enumerate(a)]
            if isinstance(a, list) and not name.startswith("perturb_")
            else a
            for a in arguments
        ]
        theirs = clone(arguments)
        getattr(reference, name)(*theirs)
        _, found = target.call(name, arguments)
        if name == "accumulate_exact_penalty_":
            found, theirs = (added(arguments, x, dtype) for x in (found, theirs))
        assert_same(found, theirs)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    capacity=st.integers(1, 12),
    chunk=st.sampled_from([1, 7, 64]),
)
def test_every_tensor_is_in_one_launch_and_every_element_in_one_block(sizes, capacity, chunk):
    plan = rows(emulator(), sizes, capacity, chunk)
    assert [first for first, _, _ in plan] == [0, *itertools.accumulate(n for _, n, _ in plan)][:-1]
    assert sum(n for _, n, _ in plan) == len(sizes)
    assert all(n <= capacity for _, n, _ in plan)
    for first, count, blocks in plan:
        part = sizes[first : first + count]
        spans = [span(emulator(), part, chunk, b) for b in range(blocks)]
        elements = [(i, begin + k) for i, begin, length in spans for k in range(length)]
        assert elements == [(i, k) for i, n in enumerate(part) for k in range(n)]
        assert all(0 < length <= chunk for _, _, length in spans)
