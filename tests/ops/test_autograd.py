"""Ops and autograd: no derivative is silently zero, no backward takes what was overwritten."""

from __future__ import annotations

import inspect

import pytest
import torch
from op_cases import FORMS, cases, clone, make, scalar
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fbopt._build import load
from fbopt._ops import dispatch, reference, registration

pytestmark = pytest.mark.skipif(load.kernels() is None, reason="no compiled kernels here")
WAYS = ["cpu", "dispatched", "reference", "past autograd"]
SHAPES = [(5,), (3, 4)]


def op_by(way: str, name: str):
    """An op: of the table for the CPU, of torch, in plain torch, as the table for CUDA has it."""
    if way == "reference":
        return getattr(reference, name)
    table = dispatch.table("cpu")
    of_torch = getattr(torch.ops.fbopt, name).default
    if way == "past autograd":
        return registration.past_autograd(of_torch)
    return getattr(table, name) if way == "cpu" else of_torch


def call_of(name: str, chunks: int = 0) -> dict[str, object]:
    """Some arguments of an op, by their names; of sgd_step_ with momentum, divisor and clip."""
    arguments = max(cases(name, SHAPES, torch.float32, chunks), key=tensors_in)
    names = inspect.signature(getattr(reference, name)).parameters
    return dict(zip(names, arguments, strict=False))


def tensors_in(arguments) -> int:
    return sum(len(a) if isinstance(a, list) else isinstance(a, Tensor) for a in arguments)


def places_in(call: dict[str, object]) -> list[tuple[str, int | None]]:
    """Every tensor by the name of its argument, and its place in a list."""
    lists = [(name, range(len(a))) for name, a in call.items() if isinstance(a, list)]
    found: list = [(name, i) for name, places in lists for i in places]
    return found + [(name, None) for name, a in call.items() if isinstance(a, Tensor)]


def written_by(name: str) -> set[str]:
    """The arguments that the schema says are written."""
    dispatch.table("cpu")
    arguments = getattr(torch.ops.fbopt, name).default._schema.arguments
    return {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, chunks", FORMS)
def test_derivatives_are_refused(name, chunks, way):
    """A leaf and the result of a computation, as any argument; what is named is what it was."""
    call, op = call_of(name, chunks), op_by(way, name)
    for argument, i in places_in(call):
        old = call[argument] if i is None else call[argument][i]
        if not old.is_floating_point():
            continue
        leaf = old.detach().clone().requires_grad_()
        for new in (leaf, leaf * 1.0):
            value = new if i is None else [*call[argument][:i], new, *call[argument][i + 1 :]]
            changed = {**call, argument: value}
            before = clone(list(changed.values()))
            which = argument if i is None else rf"{argument}\[{i}\]"
            message = rf"{which} requires grad, and {name} has no derivative: .* {which}.detach()"
            with pytest.raises(RuntimeError, match=message):
                op(*changed.values())
            now = list(changed.values())
            torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
            with torch.no_grad():
                op(*clone(list(changed.values())))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, chunks", FORMS)
def test_versions_tell_what_was_written(name, chunks, way):
    call, op = call_of(name, chunks), op_by(way, name)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        tensors = {(a, i): call[a] if i is None else call[a][i] for a, i in places_in(call)}
        before = {place: t._version for place, t in tensors.items()}
        with mode():
            op(*call.values())
        for place, t in tensors.items():
            assert (t._version > before[place]) == (place[0] in written_by(name)), (mode, place)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in dispatch.NAMES if name.endswith("_")])
def test_a_backward_that_needs_what_was_overwritten_is_an_error(name, way):
    for argument, i in places_in(call_of(name)):
        call = call_of(name)
        saved = call[argument] if i is None else call[argument][i]
        if argument not in written_by(name) or not saved.is_floating_point():
            continue
        product = (torch.ones_like(saved).requires_grad_() * saved).sum()
        op_by(way, name)(*call.values())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_a_step_only_reads_keep_their_version(way):
    params, grads, buffers = (make(SHAPES, torch.float32, seed) for seed in range(3))
    rule = (0.9, 0.0, 0.0, False, False, False)
    op_by(way, "sgd_step_")(params, grads, buffers, scalar(0.1), None, None, None, *rule)
    assert [t._version for t in (*params, *grads, *buffers)] == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_inference_mode_have_no_versions(way):
    with torch.inference_mode():
        sums, grads = make(SHAPES, torch.float32, 0), make(SHAPES, torch.float32, 1)
    wanted = [a + 2 * g for a, g in zip(sums, grads, strict=True)]
    with torch.inference_mode():
        op_by(way, "accumulate_")(sums, grads, scalar(2.0))
    torch.testing.assert_close(sums, wanted)


def test_compiled_functions_refuse_derivatives():
    dispatch.table("cpu")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(sums, grads, weight):
        torch.ops.fbopt.accumulate_(sums, grads, weight)

    sums, grads = make(SHAPES, torch.float32, 0), make(SHAPES, torch.float32, 1)
    before = clone(sums)
    with pytest.raises(Exception, match=r"grads\[1\] requires grad"):
        update(sums, [grads[0], grads[1].requires_grad_()], scalar(2.0))
    torch.testing.assert_close(sums, before, rtol=0, atol=0)
    update(sums, [g.detach() for g in grads], scalar(2.0))
    assert all(t._version > 0 for t in sums)


def test_plain_torch_takes_tensors_without_memory():
    """Fake ones, and those of functionalization and torch.compile, which trace it."""

    def add(sums, grads):
        reference.accumulate_([sums], [grads], torch.ones((), dtype=torch.float64))
        return sums

    with FakeTensorMode():
        assert add(torch.ones(4), torch.ones(4)).shape == (4,)
    compiled = torch.compile(add, fullgraph=True, backend="eager")
    for function in (torch.func.functionalize(add), compiled):
        assert function(torch.ones(4), torch.ones(4)).tolist() == [2.0] * 4
