"""Which parameters a closure differentiates by, and which an optimizer steps on, may change during
training: a parameter that is not trained stays as it is, and one that should be trained is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import bits
from torch import nn
from torch.nn import Parameter

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")
mse = nn.functional.mse_loss
OPTIMIZERS = {
    "FullBatchGD": lambda params: FullBatchGD(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def chunks():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=generator), torch.randn(20, 2, generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def closure_of(model, **options):
    return FullBatchClosure(model, mse, chunks(), **options)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_layer_frozen_during_training_stays(make, renewed, given):
    """Also where the closure is made anew, which does not know the frozen layer's old gradient."""
    model = mlp()
    optimizer = make(model.parameters())
    options = {"params": list(model.parameters())} if given else {}
    closure = closure_of(model, **options)
    optimizer.step(closure)
    model[0].requires_grad_(False)
    if renewed:
        closure = closure_of(model, **options)
    frozen, head = bits(model[0]), bits(model[2])
    optimizer.step(closure)
    assert bits(model[0]) == frozen and bits(model[2]) != head
    model[0].requires_grad_(True)
    optimizer.step(closure)
    assert bits(model[0]) != frozen


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_frozen_layer_of_an_optimizer_loses_its_gradient(make):
    """A closure over the head alone; the optimizer still holds the frozen rest."""
    model = mlp()
    optimizer = make(model.parameters())
    optimizer.step(closure_of(model))
    model[0].requires_grad_(False)
    head = closure_of(model, params=model[2].parameters(), optimizer=optimizer)
    frozen = bits(model[0])
    optimizer.step(head)
    assert bits(model[0]) == frozen and model[0].weight.grad is None


def test_an_old_gradient_of_a_frozen_parameter_is_refused():
    """In a loop of one's own, which sets p.grad of the others alone."""
    model = mlp()
    optimizer = FullBatchGD(model.parameters(), lr=0.1)

    def step():
        accumulator = GradientAccumulator([p for p in model.parameters() if p.requires_grad])
        for x, y in chunks():
            grads = torch.autograd.grad(mse(model(x), y), accumulator.params)
            accumulator.add(grads, len(x))
        for p, g in zip(accumulator.params, accumulator.mean(), strict=True):
            p.grad = g
        optimizer.step()

    step()
    model[0].requires_grad_(False)
    before = bits(model)
    with pytest.raises(ValueError, match=r"\(6, 4\) does not require grad.*frozen.*zero_grad"):
        step()
    assert bits(model) == before
    optimizer.zero_grad()
    step()
    assert bits(model[0]) != before and model[0].weight.grad is None


def step_with(optimizer, closure):
    """The ways to a closure with an optimizer."""
    if isinstance(optimizer, FullBatchGD):
        optimizer.step(closure)
    else:
        closure()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_parameter_that_would_never_be_trained(make):
    """An unknown coefficient beside the network, as in the fit of a differential equation."""
    model, coefficient = mlp(), Parameter(torch.ones(()))
    optimizer = make([*model.parameters(), coefficient])

    def evaluate(model, chunk):
        return mse(coefficient * model(chunk[0]), chunk[1])

    def closure(**options):
        given = {"evaluate": evaluate, "chunks": chunks(), "optimizer": optimizer}
        return FullBatchClosure(model, **given | options)

    partial = closure()
    before = bits(model, coefficient)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"1 param.*never be trained \(params\[4\] \[\]\).*ms="
        ):
            step_with(optimizer, partial)
    assert bits(model, coefficient) == before and partial.step == 0
    optimizer.step(closure(params=[*model.parameters(), coefficient]))
    assert bits(coefficient) != before[1]
    coefficient.requires_grad_(False)
    step_with(optimizer, partial)  # is right once the coefficient is a constant
    coefficient.requires_grad_(True)
    with pytest.raises(ValueError, match="never be trained"):
        step_with(optimizer, partial)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_closure_over_a_copy_of_the_model(make):
    model = mlp()
    optimizer = make(model.parameters())
    closure = closure_of(copy.deepcopy(model), optimizer=optimizer)
    with pytest.raises(ValueError, match=r"holds none of the closure's.*copy"):
        step_with(optimizer, closure)
    assert all(p.grad is None for p in closure.model.parameters())


def test_a_group_that_is_added_during_training():
    model, extra = mlp(), Parameter(torch.ones(3))
    optimizer = FullBatchGD(model.parameters(), lr=0.1)
    closure = closure_of(model)
    optimizer.step(closure)
    optimizer.add_param_group({"params": [extra]})
    before = bits(model)
    with pytest.raises(ValueError, match=r"params\[4\] \[3\]"):
        optimizer.step(closure)
    assert bits(model) == before


def test_a_head_is_fine_tuned_with_gradients_of_all():
    """The closure may differentiate by more than the optimizer steps on."""
    model = mlp()
    optimizer = FullBatchGD(model[2].parameters(), lr=0.1)
    before = bits(model[0], model[2])
    optimizer.step(closure_of(model, optimizer=optimizer))
    assert bits(model[0]) == before[:1] and bits(model[2]) != before[1:]


def test_two_optimizers_with_a_share_each():
    """Generator and discriminator; each closure leaves the other's gradient alone."""
    model = mlp()
    shares = [list(model[i].parameters()) for i in (0, 2)]
    optimizers = [FullBatchGD(share, lr=0.1) for share in shares]
    closures = [
        closure_of(model, params=share, optimizer=o, penalty=GradientPenalty())
        for share, o in zip(shares, optimizers, strict=True)
    ]
    optimizers[0].step(closures[0])
    kept, rest = bits(shares[0], [p.grad for p in shares[0]]), bits(shares[1])
    optimizers[1].step(closures[1])
    assert bits(shares[0], [p.grad for p in shares[0]]) == kept and bits(shares[1]) != rest


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_closure_over_a_copy_is_refused_where_the_optimizer_is_not_given(make):
    model = mlp()
    optimizer, before = make(model.parameters()), bits(model)
    with pytest.raises(ValueError, match=r"holds none of the closure's.*not of a copy"):
        optimizer.step(closure_of(copy.deepcopy(model)))
    assert bits(model) == before


def test_an_optimizer_may_hold_what_another_closure_trains():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in (model[0], model[2]):
        optimizer.zero_grad()
        before = bits(model[0]), bits(model[2])
        optimizer.step(closure_of(model, params=list(layer.parameters())))
        moved = [old != bits(part) for old, part in zip(before, (model[0], model[2]), strict=True)]
        assert moved == [layer is model[0], layer is model[2]]


def test_a_closure_of_another_model_within_a_step():
    """As of a critic: the inner closure's model is none of the outer optimizer's business."""
    outer, inner = mlp(), mlp()
    optimizer, fit = torch.optim.SGD(outer.parameters(), lr=0.1), closure_of(inner)

    def evaluate(model, chunk):
        return mse(model(chunk[0]), chunk[1] + fit())

    def loss():
        target = torch.cat([y for _, y in chunks()]) + fit()
        return mse(outer(torch.cat([x for x, _ in chunks()])), target)

    old = list(outer.parameters())
    wanted = [p - 0.1 * g for p, g in zip(old, torch.autograd.grad(loss(), old), strict=True)]
    optimizer.step(FullBatchClosure(outer, evaluate=evaluate, chunks=chunks()))
    torch.testing.assert_close(list(outer.parameters()), wanted)


def test_a_frozen_layer_stays_where_only_the_head_is_differentiated():
    """The old gradient is another closure's, and the optimizer is known by its call alone."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step(closure_of(model))
    model[0].requires_grad_(False)
    frozen = bits(model[0])
    optimizer.step(closure_of(model, params=list(model[2].parameters())))
    assert bits(model[0]) == frozen
