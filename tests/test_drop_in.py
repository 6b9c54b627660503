"""clip_grad_norm_ and FullBatchGD take what torch's clip_grad_norm_ and SGD take, also where
torch.compile traces the caller.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits
from torch import Tensor, nn
from torch.nn import Parameter

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, clip_grad_norm_

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.quantize"),  # models that hold such tensors remain
]
torch_clip = nn.utils.clip_grad_norm_
SGD = torch.optim.SGD


def twins(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    """Two lists of equal parameters with equal gradients."""
    shapes = shapes or ((), (7,), (3, 5))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes]
    lists: tuple[list, list] = ([], [])
    for params, (p, g) in itertools.product(lists, values):
        params.append(Parameter(p.to(dtype, copy=True)))
        params[-1].grad = g.to(dtype, copy=True)
    return lists


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0, equal_nan=True)


def grads(params: list[Parameter]) -> list[Tensor]:
    return [p.grad for p in params]


# --- clip_grad_norm_ ------------------------------------------------------------------------------

BOUNDS = {
    "number": 0.3,
    "integer": 1,
    "numpy": np.float32(0.3),
    "tensor": torch.tensor(0.3),
    "tensor of one element": torch.tensor([0.3], dtype=torch.float64),
    "integer tensor": torch.tensor(2),
    "above the norm": torch.tensor(1e3),
    "zero": torch.tensor(0.0),
    "infinite": torch.tensor(math.inf),
}


@pytest.mark.parametrize(
    "norm_type", [2, 2.0, "2", "inf", math.inf, "1.0", np.float64(3)], ids=repr
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_clip_takes_the_bounds_and_norms_that_torch_takes(bound, norm_type, backend):
    ours, theirs = twins()
    options = {
        "foreach": [None, True, False][len(bound) % 3],
        "error_if_nonfinite": bound == "tensor",
    }
    found = clip_grad_norm_(ours, BOUNDS[bound], norm_type, **options)
    assert_same(
        [found, *grads(ours)], [torch_clip(theirs, BOUNDS[bound], norm_type), *grads(theirs)]
    )


def test_a_tensor_bound_is_read_on_the_device(backend, monkeypatch):
    """On the CPU its value is checked; a step checks only what the host knows."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    ours, theirs = twins(dtype=torch.float32)
    a = FullBatchGD(ours, 0.1, momentum=0.9, max_norm=torch.tensor(0.3), norm_type="inf")
    b = SGD(theirs, 0.1, momentum=0.9)
    with monkeypatch.context() as patch:
        for method in ("item", "__float__", "__bool__", "__int__", "tolist", "numpy", "cpu"):
            patch.setattr(Tensor, method, refuse)
        a.step()
    torch_clip(theirs, 0.3, math.inf)
    b.step()
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bound", [0.3, math.inf])
def test_a_tensor_bound_with_nonfinite_gradients(value, bound, backend):
    ours, theirs = twins()
    for params in (ours, theirs):
        params[1].grad[2] = value
    found = clip_grad_norm_(ours, torch.tensor(bound))
    assert_same([found, *grads(ours)], [torch_clip(theirs, bound), *grads(theirs)])


def test_a_bound_that_turns_negative_on_the_device_shows_as_nan():
    """The step does not read the bound, so that it cannot raise: it must not flip the gradient."""
    ours, _ = twins()
    a = FullBatchGD(ours, 0.1, max_norm=(bound := torch.tensor(0.3)))
    bound.neg_()
    a.step()
    assert all(p.isnan().all() for p in ours)


def test_empty_generators_are_told_of_as_in_torch():
    for clip in (clip_grad_norm_, torch_clip):
        with pytest.warns(UserWarning, match="generator") as caught:
            assert clip((p for p in ()), 1.0).item() == 0
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert clip([], 1.0).item() == 0


def test_frozen_parameters_of_any_kind_are_passed_over():
    ours, theirs = twins()
    found = clip_grad_norm_([*frozen(), *ours], 0.3)
    assert_same([found, *grads(ours)], [torch_clip(theirs, 0.3), *grads(theirs)])


# --- FullBatchGD ----------------------------------------------------------------------------------


def frozen() -> list[Tensor]:
    """Parameters that quantised, sparse and complex models hold and do not train."""
    values = [
        torch.arange(4),
        torch.ones(3, dtype=torch.uint8),
        torch.ones(3, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(1).expand(4),
        torch.ones(2, device="meta"),
    ]
    return [Parameter(v, requires_grad=False) for v in values]


def test_every_argument_of_sgd_is_taken_by_name_and_position():
    signatures = [inspect.signature(make).parameters for make in (SGD, FullBatchGD)]
    theirs, ours = ({k: (p.default, p.kind) for k, p in s.items()} for s in signatures)
    assert theirs.items() <= ours.items()
    assert list(ours)[: len(theirs)] == list(theirs)


OPTIONS = {
    "none": {},
    "foreach": {"lr": 0.1, "foreach": True},
    "no foreach": {"lr": 0.1, "foreach": False},
    "fused": {"lr": 0.1, "fused": True, "momentum": 0.9},
    "differentiable is off": {"lr": 0.1, "differentiable": False},
    "lr is an integer tensor": {"lr": torch.tensor(1)},
    "weight_decay is a tensor": {"lr": 0.1, "weight_decay": torch.tensor(0.1)},
    "momentum is a tensor": {"lr": 0.1, "momentum": torch.tensor(0.9), "nesterov": True},
    "dampening is a tensor": {"lr": 0.1, "momentum": 0.5, "dampening": torch.tensor(0.25)},
    "all are tensors": {
        "lr": torch.tensor([0.1], dtype=torch.float64),
        "momentum": torch.tensor(0.5, dtype=torch.float64),
        "weight_decay": torch.tensor(0.1, dtype=torch.float64),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_sgd(name, backend):
    ours, theirs = twins()
    plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    a, b = FullBatchGD(ours, **OPTIONS[name]), SGD(theirs, **plain | {"fused": None})
    for _ in range(3):
        a.step()
        b.step()
    assert_same(ours, theirs)
    c = SGD(twins()[1])
    c.load_state_dict(a.state_dict())
    assert c.param_groups[0]["foreach"] == OPTIONS[name].get("foreach")


WAYS: dict[str, Callable[[list[Parameter]], Any]] = {
    "generator": lambda params: (p for p in params),
    "tuple": tuple,
    "values of a dict": lambda params: dict(enumerate(params)).values(),
    "named": lambda params: ((f"p{i}", p) for i, p in enumerate(params)),
    "groups": lambda params: [{"params": p} for p in params],
    "named groups": lambda params: [{"params": [(f"p{i}", p)]} for i, p in enumerate(params)],
    "group with a generator": lambda params: [{"params": (p for p in params), "lr": 0.2}],
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_hand_over_parameters(way):
    ours, theirs = twins()
    a, b = FullBatchGD(WAYS[way](ours), max_norm=0.5), SGD(WAYS[way](theirs))
    a.step()
    torch_clip(theirs, 0.5)
    b.step()
    assert_same(ours, theirs)
    groups = [
        [
            {k: v for k, v in g.items() if k in b.param_groups[0]}
            for g in o.state_dict()["param_groups"]
        ]
        for o in (a, b)
    ]
    assert groups[0] == groups[1]


def test_what_is_no_collection_of_parameters_is_refused_as_in_torch():
    p = twins()[0][0]
    for make, bad in itertools.product((FullBatchGD, SGD), (p, {"p": p}, [], [[p]])):
        with pytest.raises((TypeError, ValueError)):
            make(bad, lr=0.1)
    for make in (FullBatchGD, SGD):
        with pytest.raises(TypeError, match="set"):
            make([{"params": {p}}], lr=0.1)


def test_frozen_parameters_of_any_kind_in_a_group(backend):
    ours, theirs = twins()
    held = [*frozen(), *ours]
    a = FullBatchGD(held, lr=0.1, momentum=0.9, max_norm=0.5, weight_decay=0.1)
    b = SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.1)
    before = bits(held[: -len(ours)])
    for _ in range(2):
        a.step()
        for p, g in zip(theirs, grads(ours), strict=True):
            p.grad = g.clone()
        torch_clip(theirs, 0.5)
        b.step()
    assert_same(ours, theirs)
    assert bits(held[: -len(ours)]) == before and len(a.state) == len(ours)


def test_a_parameter_that_overlaps_itself_is_refused_when_it_thaws():
    (p,), _ = twins((3,))
    bad = Parameter(torch.ones(1).expand(4), requires_grad=False)
    a = FullBatchGD([p, bad], lr=0.1)
    bad.requires_grad_()
    bad.grad = torch.ones(4)
    before = bits(p, bad)
    with pytest.raises(ValueError, match="overlaps itself"):
        a.step()
    assert bits(p, bad) == before


@pytest.mark.parametrize("spoilt", [{"momentum": torch.tensor(-1.0)}, {"differentiable": True}])
def test_options_changed_between_steps_are_checked_before_anything_is_changed(spoilt):
    ours, _ = twins()
    a = FullBatchGD(ours, lr=0.1)
    a.param_groups[0].update(spoilt)
    before = bits(ours)
    with pytest.raises(ValueError, match=f"{next(iter(spoilt))} must be"):
        a.step()
    assert bits(ours) == before


def test_groups_may_say_the_same_norm_in_different_ways():
    ours, theirs = twins((2,), (3,))
    bound = torch.tensor(0.3, dtype=torch.float64)
    groups = [{"params": [p], "norm_type": t} for p, t in zip(ours, ("inf", math.inf), strict=True)]
    a, b = FullBatchGD(groups, 0.1, max_norm=bound), SGD(theirs, 0.1)
    a.step()
    torch_clip(theirs, bound, math.inf)
    b.step()
    assert_same(ours, theirs)
    a.param_groups[1]["max_norm"] = 0.3
    with pytest.raises(ValueError, match="one max_norm for all groups"):
        a.step()


# --- torch.compile of the caller ------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """torch.compile from nothing; aot_eager traces what inductor does, and needs no compiler."""
    torch.compiler.reset()
    yield lambda f, **options: torch.compile(f, backend="aot_eager", **options)
    torch.compiler.reset()


@pytest.mark.parametrize("bound", [0.3, 1e3, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, "inf", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clip_is_traced_whole_and_gives_the_same_bits(dtype, norm_type, bound, compiled):
    ours, theirs = twins(dtype=dtype)
    norms = []
    for params, wrap in ((ours, lambda f: compiled(f, fullgraph=True)), (theirs, lambda f: f)):

        def scaled(params: list = params) -> Tensor:
            norm = clip_grad_norm_(params, bound, norm_type)
            params[1].grad.mul_(2)
            return norm + 1

        norms.append(wrap(scaled)())
    assert bits(norms[0], grads(ours)) == bits(norms[1], grads(theirs))


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, "float32"), (None, "float64")])
def test_the_tracer_knows_the_dtype_of_the_norm(dtype, expected, compiled):
    ours = (
        twins((3,), dtype=dtype or torch.float32)[0] + twins((3,), dtype=dtype or torch.float64)[0]
    )

    def clipped() -> tuple[Tensor, str]:
        norm = clip_grad_norm_(ours, 0.3)
        return norm, str(norm.dtype)

    norm, traced = compiled(clipped, fullgraph=True)()
    assert traced == str(norm.dtype) == f"torch.{expected}"


def test_errors_of_the_clip_are_those_without_tracing(compiled):
    ours, _ = twins()
    ours[0].grad.fill_(math.nan)
    before = bits(ours, grads(ours))
    with pytest.raises(RuntimeError, match="norm is nan"):
        compiled(lambda: clip_grad_norm_(ours, 0.1, error_if_nonfinite=True), fullgraph=True)()
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        compiled(lambda: clip_grad_norm_(ours, -0.1), fullgraph=True)()
    assert bits(ours, grads(ours)) == before
    assert compiled(lambda: clip_grad_norm_([], 0.1), fullgraph=True)().item() == 0


class Training:
    """A model, an optimizer and a closure; ways to take a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
        x, y = torch.randn(20, 4), torch.randn(20, 2)
        self.chunks = list(zip(x.split(8), y.split(8), strict=True))
        self.optimizer = FullBatchGD(self.model.parameters(), 0.1, momentum=0.9, max_norm=0.1)
        self.closure = FullBatchClosure(
            self.model,
            nn.functional.mse_loss,
            self.chunks,
            penalty=GradientPenalty(coefficient=0.1),
        )

    def plain(self) -> Tensor:
        x, y = self.chunks[0]
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def with_closure(self) -> Tensor:
        return self.optimizer.step(self.closure)

    def closure_alone(self) -> Tensor:
        loss = self.closure()
        self.optimizer.step()
        return loss

    def with_function(self) -> Tensor:
        return self.optimizer.step(self.closure.__call__)

    def after_a_look(self) -> Tensor:
        loss = self.closure.loss_only()
        self.optimizer.step(self.closure)
        return loss


STEPS = ("plain", "with_closure", "closure_alone", "with_function", "after_a_look")


@pytest.mark.parametrize("way", STEPS)
def test_a_step_in_a_compiled_function_breaks_the_graph_and_is_right(way, compiled):
    a, b = Training(), Training()
    step = compiled(getattr(a, way))
    for _ in range(3):
        assert bits(step()) == bits(getattr(b, way)())
    assert bits(a.model, a.optimizer, a.optimizer.last_grad_norm) == bits(
        b.model, b.optimizer, b.optimizer.last_grad_norm
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("whose", ["its own parameter", "one for all"])
def test_gradients_that_share_memory_are_taken(momentum, whose):
    found = {}
    for kind in (FullBatchGD, torch.optim.SGD):
        params = [torch.nn.Parameter(torch.linspace(-1, k, 100)) for k in (1, 2)]
        optimizer = kind(params, lr=0.1, momentum=momentum, weight_decay=0.01)
        shared = torch.linspace(0, 1, 100)
        for _ in range(3):
            for p in params:
                p.grad = shared if whose == "one for all" else p.detach()
            optimizer.step()
        found[kind] = params
    for mine, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
