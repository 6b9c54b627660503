"""Kernels called past torch's dispatcher: what is left to torch, before anything is changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from op_cases import clone, make, scalar
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fbopt._build import load
from fbopt._ops import dispatch

kernels = load.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="no compiled kernels here")


class Own(Tensor):
    """A subclass, which may do something else at every op."""


def negated(*shape: int) -> Tensor:
    """An imaginary part of a conjugate, which torch negates when it is read."""
    x = torch.ones(shape)
    return torch.complex(x, x).conj().imag


def vmapped() -> Tensor:
    found = []
    torch.vmap(lambda x: found.append(x) or x)(torch.ones(2, 3))
    return found[0]


UNUSUAL = {
    "subclass": lambda: torch.ones(3).as_subclass(Own),
    "strided": lambda: torch.ones(6)[::2],
    "expanded": lambda: torch.ones(()).expand(3),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "meta": lambda: torch.ones(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "short": lambda: torch.ones(3, dtype=torch.int16),
    "negated": lambda: negated(3),
    "one negated": lambda: negated(1),
    "batched": vmapped,
    "zeros without memory": lambda: torch._efficientzerotensor((3,)),
    "no tensor": lambda: 3.0,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_are_left_to_torch(kind):
    odd = UNUSUAL[kind]()
    total = torch.zeros(1 if kind == "one negated" else 3)
    assert kernels.accumulate_([total], [odd], scalar(1.0)) is NotImplemented
    as_sums = [torch.zeros(3), odd], [torch.ones(3)] * 2, scalar(1.0)
    if kind == "expanded":  # its elements are one
        with pytest.raises(RuntimeError, match="more than once"):
            kernels.accumulate_(*as_sums)
    else:
        assert kernels.accumulate_(*as_sums) is NotImplemented
    assert not total.any()


def test_numbers_and_lists_of_another_kind_are_left_to_torch():
    total, one = torch.zeros(3), torch.ones(3)
    for args in (
        ([total], [one], negated(1)[0]),
        ([total], [one], 1.0),
        ([total], [one]),
        ((x for x in [total]), [one], scalar(1.0)),
        ([total], [one], scalar(1.0), 4, 5),
        (),
    ):
        assert kernels.accumulate_(*args) is NotImplemented
    assert kernels.squared_norm([one], 1) is NotImplemented
    for radius in ("1", 10**400):
        assert kernels.perturb_(torch.zeros(3), [one], [one], radius) is NotImplemented
    assert not total.any()


def test_plain_tensors_are_not_left_to_torch():
    total, weight = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert kernels.accumulate_([total], (weight,), scalar(2.0)) is None
        assert kernels.squared_norm([total], False).item() == 12.0
    assert total.tolist() == [2.0] * 3
    assert kernels.squared_norm([]).item() == 0.0


@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_negated_gradients_are_added_as_they_read(shape):
    total, grad = torch.zeros(shape), negated(*shape)
    dispatch.accumulate_([total], [grad], scalar(1.0))
    assert torch.equal(total, -torch.ones(shape))
    assert dispatch.squared_norm([grad]).item() == total.numel()


def test_modes_of_torch_see_the_ops():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        assert kernels.squared_norm([torch.ones(3)]) is NotImplemented
        dispatch.squared_norm([torch.ones(3)])
    assert torch.ops.fbopt.squared_norm.default in seen


def test_a_norm_is_an_ordinary_tensor():
    x = make([(5,), (3, 4)], torch.float32, 0)
    norm, stacked = kernels.squared_norm(x), kernels.squared_norm([x[1]], True)
    assert type(norm) is Tensor and norm.shape == () and norm.dtype == torch.float64
    assert stacked.shape == (3,) and not norm.requires_grad and norm.device == x[0].device
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm.clone()):
        assert torch.equal(twin, norm)
    norm += 1
    view = stacked[1:]
    del stacked
    assert torch.equal(view, x[1][1:].double().square().sum(1))


def test_calls_keep_no_references():
    """Nor do those that are declined or refused."""
    total, grad, weight, other = torch.zeros(3), torch.ones(3), scalar(1.0), torch.ones(4)
    everyone = total, grad, weight, other, [total]
    before = [sys.getrefcount(x) for x in everyone]
    for _ in range(5):
        kernels.accumulate_([total], [grad], weight)
        assert kernels.accumulate_([total, grad], [grad, 3], weight) is NotImplemented
        with pytest.raises(RuntimeError, match=r"grads\[0\]"):
            kernels.accumulate_([total], [other], weight)
    assert [sys.getrefcount(x) for x in everyone] == before


def test_threads_call_at_once():
    """Long calls let others run."""
    shapes = [(300_001,), (5,)]
    params, grads = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
    wanted = clone(params)
    kernels.accumulate_(wanted, grads, scalar(2.0))
    results = [clone(params) for _ in range(8)]
    work = [
        threading.Thread(target=kernels.accumulate_, args=(mine, grads, scalar(2.0)))
        for mine in results
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    for mine in results:
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def test_threads_may_change_a_list_during_a_call():
    """Small tensors are asked whether they are negated, during which others run."""
    grads, totals = [torch.ones(256), torch.ones(())], [torch.zeros(256), torch.zeros(())]
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            grads[0] = torch.ones(256)

    other = threading.Thread(target=swap)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(20_000):
            kernels.accumulate_(totals, grads, scalar(1.0))
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(before)
    assert torch.equal(totals[0], torch.full((256,), 20_000.0))


def test_a_torch_without_what_is_needed():
    """Calls go through torch's dispatcher."""
    code = """
import torch
del torch._C._len_torch_dispatch_stack
from fbopt._build import load
from fbopt._ops import dispatch
total, grad, weight = torch.zeros(3), torch.ones(3), torch.ones((), dtype=torch.float64)
assert load.kernels().accumulate_([total], [grad], weight) is NotImplemented
dispatch.accumulate_([total], [grad], weight)
print(total.tolist())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "[1.0, 1.0, 1.0]\n", found.stderr


def test_a_copy_on_write_is_a_copy():
    """Torch shares the memory of such clones until one of them is written to."""
    x = torch.ones(3)
    twin = torch._lazy_clone(x)
    dispatch.accumulate_([twin], [x], scalar(2.0))
    assert x.tolist() == [1.0] * 3 and twin.tolist() == [3.0] * 3


def test_alike_are_plain_tensors_of_one_dtype_in_the_same_memory_order():
    x = make([(5,), (3, 4)], torch.float32, 0)
    assert kernels.alike(x) and kernels.alike(x, x, [t.clone() for t in x]) and kernels.alike([])
    nn_x = [nn.Parameter(t) for t in x]
    assert kernels.alike(nn_x, x) and dispatch.are_alike(nn_x, x)
    others = {
        "dtype": [x[0], x[1].double()],
        "kind": [t.int() for t in x],
        "shape": [x[0], x[1].t().contiguous()],
        "strides": [x[0], x[1].t().contiguous().t()],
        "number": x[:1],
        "strided": [x[0], torch.ones(3, 8)[:, ::2]],
        "expanded": [x[0], torch.ones(4).expand(3, 4)],
        "subclass": [x[0], x[1].as_subclass(Own)],
        "nothing": [x[0], None],
    }
    for name, other in others.items():
        assert not kernels.alike(x, other), name
        assert kernels.alike(other) == (name in ("shape", "strides", "number")), name
    assert not dispatch.are_alike([])
