"""clip_grad_norm_ against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import bits
from torch import Tensor, nn
from torch.nn import Parameter

from fbopt import clip_grad_norm_

SHAPES = ((), (7,), (3, 5), (2, 3, 4, 4), (1, 1))
NORMS = (1.0, 2.0, 3.0, 0.5, math.inf)
HALF = (torch.bfloat16, torch.float16)
torch_clip = nn.utils.clip_grad_norm_


def gradients(dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def parameters(grads: list[Tensor | None]) -> list[Parameter]:
    """Parameters with copies of these gradients, of the same strides."""
    params = []
    for g in grads:
        p = Parameter(torch.zeros(()) if g is None else torch.zeros(g.shape, dtype=g.dtype))
        if g is not None:
            p.grad = torch.empty_strided(g.shape, g.stride(), dtype=g.dtype).copy_(g)
        params.append(p)
    return params


def both(grads: list[Tensor | None], *args, **kwargs) -> tuple[list, list, Tensor, Tensor]:
    """Clip with ours and with torch's."""
    ours, theirs = parameters(grads), parameters(grads)
    return ours, theirs, clip_grad_norm_(ours, *args, **kwargs), torch_clip(theirs, *args, **kwargs)


def assert_same_gradients(ours: list, theirs: list, **tolerance) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True, **tolerance)


@pytest.mark.parametrize("max_norm", [0.1, 1, 0.0, 1e3])
@pytest.mark.parametrize("norm_type", NORMS)
def test_equals_torch(norm_type, max_norm, backend):
    ours, theirs, found, expected = both(gradients(), max_norm, norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert_same_gradients(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm_type", NORMS)
def test_equals_torch_in_float32(norm_type, backend):
    ours, theirs, found, expected = both(gradients(torch.float32), 0.3, norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_same_gradients(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_has_its_norm_in_float32(dtype, norm_type, backend):
    grads = gradients(dtype)
    params = parameters(grads)
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    norm = clip_grad_norm_(params, 0.5, norm_type)
    expected = torch.linalg.vector_norm(flat, norm_type)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for p, g in zip(params, grads, strict=True):
        clipped = g.float() * (0.5 / (expected + 1e-6))
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad.float(), clipped, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_does_not_overflow():
    """The square of 300 is more than float16 holds."""
    (p,) = parameters([torch.full((4,), 300.0, dtype=torch.float16)])
    assert clip_grad_norm_([p], 1.0).item() == 600
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5, dtype=torch.float16))


def test_mixed_dtypes_share_one_norm(backend):
    dtypes = (torch.float32, torch.float64, *HALF)
    grads = [gradients(d, [(6, 7)])[0] * (i + 1) for i, d in enumerate(dtypes)]
    params = parameters(grads)
    norm = clip_grad_norm_(params, 1.0)
    expected = torch.cat([g.reshape(-1).double() for g in grads]).norm()
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, (g.double() / (expected + 1e-6)).to(g.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_below_max_norm_not_a_bit_changes(norm_type, dtype, backend):
    grads = gradients(dtype)
    params = parameters(grads)
    norm = clip_grad_norm_(params, 1e4, norm_type)
    assert norm > 0 and bits([p.grad for p in params]) == bits(grads)


def test_an_infinite_bound_only_measures(backend):
    """A common way to ask for the norm."""
    grads = gradients()
    ours, _, found, expected = both(grads, math.inf)
    torch.testing.assert_close(found, expected)
    assert bits([p.grad for p in ours]) == bits(grads)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonfinite_gradients_pass_as_in_torch(dtype, value, norm_type, backend):
    grads = gradients(dtype)
    grads[2][1, 1] = value
    ours, theirs, found, expected = both(grads, 0.1, norm_type)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_error_if_nonfinite_raises_before_anything_is_changed(norm_type, value, backend):
    grads = gradients()
    grads[1][0] = value
    params = parameters(grads)
    with pytest.raises(RuntimeError, match=r"norm is (nan|inf).*error_if_nonfinite=False"):
        clip_grad_norm_(params, 0.1, norm_type, error_if_nonfinite=True)
    assert bits([p.grad for p in params]) == bits(grads)


def test_error_if_nonfinite_lets_finite_gradients_pass():
    ours, theirs, found, expected = both(gradients(), 0.1, error_if_nonfinite=True)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_arguments_by_position_as_in_torch(foreach):
    ours, theirs, found, expected = both(gradients(), 0.1, 2.0, False, foreach)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(ours, theirs)


def test_a_generator_is_consumed_once():
    params = parameters(gradients())
    seen = []

    def once():
        for p in params:
            seen.append(p)
            yield p

    clip_grad_norm_(once(), 0.1)
    assert [id(p) for p in seen] == [id(p) for p in params]
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    assert clip_grad_norm_(model.parameters(), 0.1) == pytest.approx(math.sqrt(8), rel=1e-6)


def test_a_single_tensor():
    ours, theirs = parameters(gradients())[2], parameters(gradients())[2]
    torch.testing.assert_close(clip_grad_norm_(ours, 0.1), torch_clip(theirs, 0.1))
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("grads", [[], [None], [None, None]])
def test_no_gradients(grads):
    ours, _, found, expected = both(grads, 1.0)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert all(p.grad is None for p in ours)


def test_parameters_without_gradients_are_passed_over():
    ours, theirs, found, expected = both([None, *gradients(), None], 0.1)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_empty_gradients(norm_type, backend):
    params = parameters([torch.zeros(0, 3), torch.full((2,), 3.0)])
    expected = {1.0: 6.0, 2.0: math.sqrt(18), math.inf: 3.0}[norm_type]
    assert clip_grad_norm_(params, 1.0, norm_type).item() == pytest.approx(expected)
    assert clip_grad_norm_(parameters([torch.zeros(0)]), 1.0, norm_type).item() == 0


def test_zero_gradients_stay_zero():
    (p,) = parameters([torch.zeros(3)])
    assert clip_grad_norm_([p], 1.0).item() == 0 and bits(p.grad) == bits(torch.zeros(3))


LAYOUTS = {
    "transposed": lambda base: base.t(),
    "with gaps": lambda base: base[:3, 1:4],
    "every other column": lambda base: base[:, ::2],
    "channels_last": lambda base: base.reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_non_contiguous_gradients(kind, norm_type, backend):
    base = torch.arange(48.0, dtype=torch.float64).reshape(6, 8) - 10
    grad = LAYOUTS[kind](base)
    ours, theirs = Parameter(torch.zeros_like(grad)), Parameter(torch.zeros_like(grad))
    ours.grad, theirs.grad = LAYOUTS[kind](base.clone()), grad.clone()
    strides = ours.grad.stride()
    found, expected = clip_grad_norm_([ours], 2.0, norm_type), torch_clip([theirs], 2.0, norm_type)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.stride() == strides


def test_gaps_between_elements_are_not_written(backend):
    base = torch.full((4, 6), 5.0)
    p = Parameter(torch.zeros(4, 3))
    p.grad = base[:, :3]
    clip_grad_norm_([p], 0.1)
    assert (base[:, 3:] == 5).all() and (base[:, :3] < 1).all()


def test_clips_in_place_and_tells_autograd():
    params = parameters(gradients())
    grads = [p.grad for p in params]
    versions = [g._version for g in grads]
    clip_grad_norm_(params, 0.1)
    for p, g, version in zip(params, grads, versions, strict=True):
        assert p.grad is g and g._version > version


def test_returns_a_tensor_and_reads_nothing_on_the_host(backend, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    params = parameters(gradients())
    with monkeypatch.context() as patch:
        for method in ("item", "__float__", "__bool__", "__int__", "tolist", "numpy", "cpu"):
            patch.setattr(Tensor, method, refuse)
        norms = [clip_grad_norm_(params, 0.1, p) for p in (1.0, 2.0, math.inf)]
    assert all(isinstance(n, Tensor) and n.dim() == 0 and not n.requires_grad for n in norms)


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_does_not_depend_on_the_number_of_threads(norm_type, backend):
    grads = gradients(torch.float32, [(1000, 77), (5,), (64, 64, 3, 3)])
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(clip_grad_norm_(parameters(grads), 1.0, norm_type))
    finally:
        torch.set_num_threads(threads)
    assert bits(found[1:]) == bits(found[:1] * 2)


def test_gradients_with_a_graph():
    """A gradient made with create_graph=True is scaled in place without recording it."""
    p = Parameter(torch.ones(3))
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    norm = clip_grad_norm_([p], 1.0)
    assert not norm.requires_grad
    torch.testing.assert_close(p.grad.norm().item(), 1.0, rtol=1e-5, atol=0)


def test_one_thousand_tiny_gradients(backend):
    grads = [torch.full((i % 4,), float(i % 7)) for i in range(1000)]
    ours, theirs, found, expected = both(grads, 1.0)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(ours, theirs)


def test_same_gradient_given_twice_as_in_torch():
    """A parameter that is listed twice counts twice in the norm, as in torch."""
    (p,) = parameters([torch.ones(4)])
    (q,) = parameters([torch.ones(4)])
    for bound in (100.0, 0.5):
        found, expected = clip_grad_norm_([p, p], bound), torch_clip([q, q], bound)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(p.grad, q.grad)


def test_options_agree_in_every_combination():
    for norm_type, max_norm, nonfinite in itertools.product(NORMS, (0.2, 50.0), (False, True)):
        ours, theirs, found, expected = both(
            gradients(torch.float32), max_norm, norm_type, error_if_nonfinite=nonfinite
        )
        torch.testing.assert_close(found, expected)
        assert_same_gradients(ours, theirs)
