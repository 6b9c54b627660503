"""FullBatchGD(line_search=...): the direction of its own step, a length that lowers the loss."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from search_cases import SEARCHES, data, network
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "all": {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "max_norm": 0.25},
}


def training(search, lr=0.05, given=None, **options):
    net = network()
    optimizer = FullBatchGD(net.parameters(), lr, line_search=search, **options)
    return net, optimizer, FullBatchClosure(net, F.cross_entropy, data(), **(given or {}))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("search", ["armijo", "nonmonotone"])
def test_short_steps_are_those_without_a_search(search, rule, backend):
    """At t = 1 they are low enough, and p + (p' - p) is p' to rounding, as is the momentum."""
    net, optimizer, closure = training(search, **RULES[rule])
    twin, other, plain = training(None, **RULES[rule])
    for _ in range(4):
        assert optimizer.step(closure) == pytest.approx(other.step(plain).item(), rel=1e-12)
        assert optimizer.last_length == 1.0 and optimizer.last_evaluations == 3
        assert closure.step == 2 * plain.step  # besides, a look at the value alone
        torch.testing.assert_close(list(net.parameters()), list(twin.parameters()))
    if rule == "plain":
        norms = optimizer.last_grad_norm, other.last_grad_norm
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(dict(optimizer.state[p]), dict(other.state[q]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("search", SEARCHES)
def test_no_learning_rate_is_too_large(search, rule):
    """Of what is searched, the loss with the decay; where it may rise, not above the last ten."""
    net, optimizer, closure = training(search, lr=100.0, **RULES[rule])
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(15):
            decay = RULES[rule].get("weight_decay", 0) / 2
            square = sum(p.detach().square().sum() for p in net.parameters())
            values.append(float(optimizer.step(closure) + decay * square))
            assert optimizer.last_length >= 0
    if search != "nonmonotone":
        assert values == sorted(values, reverse=True)
    assert max(values) == values[0] and values[-1] < 0.97 * values[0]


def test_the_slope_is_that_of_the_loss_with_its_decay():
    """Where decay alone moves a parameter, a search on the loss alone would see no slope."""
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    def closure():
        p.grad = torch.zeros_like(p)
        return torch.zeros(())

    optimizer = FullBatchGD([p], lr=5.0, weight_decay=1.0, line_search="strong_wolfe")
    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.zeros(2).double())  # the quadratic's minimum
    assert optimizer.last_length == pytest.approx(0.2)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_maximize(options):
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def closure():
        p.grad = -2 * (p.detach() - 1)
        return 3 - (p.detach() - 1).square().sum()

    optimizer = FullBatchGD([p], 10.0, maximize=True, line_search="strong_wolfe", **options)
    for _ in range(3):
        optimizer.step(closure)
    best = 2 / (2 + options.get("weight_decay", 0))
    torch.testing.assert_close(p.detach(), torch.full((3,), best).double())


def test_momentum_that_leads_uphill_is_dropped():
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def closure():
        p.grad = p.detach().clone()
        return p.detach().square().sum() / 2

    optimizer = FullBatchGD([p], 0.5, momentum=0.9, line_search="armijo")
    optimizer.step(closure)
    optimizer.state[p]["momentum_buffer"].fill_(-10.0)
    with pytest.warns(RuntimeWarning, match="no direction of descent, and its momentum") as said:
        optimizer.step(closure)
    assert said[0].filename == __file__
    assert p.item() == 0.25 and optimizer.state[p]["momentum_buffer"].item() == 0.5
    optimizer.step(closure)
    assert optimizer.state[p]["momentum_buffer"].item() == 0.9 * 0.5 + 0.25


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_without_its_momentum_the_step_is_its_own_first(norm_type):
    """Clipped by its norm, with decay after; and what has no gradient neither moves nor counts."""
    start, slopes = torch.arange(1.0, 5.0).double(), torch.tensor([9.0, 2.0, 2.0, 2.0]).double()
    p, unused, other = nn.Parameter(start.clone()), nn.Parameter(start.clone()), start.clone()
    common = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "max_norm": 1.0}
    common |= {"norm_type": norm_type}

    def closure():
        p.grad = slopes.clone()
        return (slopes * p.detach()).sum()

    optimizer = FullBatchGD([p, unused], line_search="armijo", **common)
    optimizer.state[p]["momentum_buffer"] = torch.full((4,), -100.0).double()
    with pytest.warns(RuntimeWarning, match="no direction of descent"):
        optimizer.step(closure)
    other = nn.Parameter(start.clone())
    other.grad = slopes.clone()
    FullBatchGD([other], **common).step()
    torch.testing.assert_close(p, other, rtol=1e-14, atol=0)
    assert optimizer.last_length == 1 and unused.equal(start)
    line = optimizer._searched._line
    with torch.no_grad():
        value = line.value(0.0)
    assert value == pytest.approx(0.05 * p.detach().square().sum().item(), rel=1e-12)


def test_no_descent_without_momentum_either():
    """A clipped gradient against its decay: parameters stay, and the reason is said."""
    p = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))

    def closure():
        p.grad = torch.full_like(p, 1.5)
        return 1.5 * p.detach().sum()

    options = {"weight_decay": 1.0, "max_norm": 0.1, "line_search": "armijo"}
    optimizer = FullBatchGD([p], 0.1, **options)
    with pytest.warns(RuntimeWarning, match="neither the step nor one without momentum"):
        optimizer.step(closure)
    assert p.item() == -1 and optimizer.last_length == 0


def test_a_step_that_rounding_loses_is_told():
    p = nn.Parameter(torch.full((2,), 100.0))

    def closure():
        p.grad = torch.ones(2)
        return p.detach().sum()

    optimizer = FullBatchGD([p], 1e-7, line_search="strong_wolfe")
    with pytest.warns(RuntimeWarning, match="lost in the rounding of the parameters: raise lr"):
        optimizer.step(closure)
    assert p.tolist() == [100.0, 100.0] and optimizer.last_length == 0


def test_a_step_of_frozen_parameters_is_an_evaluation():
    p = nn.Parameter(torch.ones(2), requires_grad=False)
    assert FullBatchGD([p], line_search="armijo").step(lambda: 3.0) == 3.0
    assert p.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("search", SEARCHES)
def test_lr_of_zero_drops_nothing(search):
    """As a warm-up begins: momentum is what it is without a search."""
    found = []
    for kind in (search, None):
        net, optimizer, closure = training(kind, momentum=0.9)
        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 0.0
        kept = bits(list(net.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure)
        assert bits(list(net.parameters())) == kept
        found.append([dict(optimizer.state[p]) for p in net.parameters()])
    if search != "strong_wolfe":  # of which the first step has a length of its own
        torch.testing.assert_close(*found)
    assert all(s["momentum_buffer"].abs().max() > 0 for s in found[0])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["plain", "whole"])
def test_a_trial_whose_gradient_is_not_finite_is_too_far(kind, search):
    """The root of w is 0 for w < 0, with a gradient that is NaN."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self, x):
            return torch.where(self.w > 0, self.w.sqrt(), 0.0) * x

    model, ones = Root(), torch.ones(4, 1, dtype=torch.float64)
    whole = FullBatchClosure(model, lambda y, _: y.mean(), [(ones, ones)])

    def plain():
        w.grad = None
        loss = model(ones).mean()
        loss.backward()
        return loss.detach()

    optimizer = FullBatchGD([w], 8.0, line_search=search)
    optimizer.step(whole if kind == "whole" else plain)
    assert 0 < w.item() < 1 and w.grad.isfinite().all() and 0 < optimizer.last_length < 1


@pytest.mark.parametrize("raises", [False, True])
def test_a_start_that_is_not_finite(raises):
    """Nothing is lost, and with error_if_nonfinite nothing is changed: not even buffers."""
    net, optimizer, closure = training("armijo", momentum=0.9, error_if_nonfinite=raises)
    optimizer.step(closure)
    bad = FullBatchClosure(net, lambda y, t: F.cross_entropy(y, t) * float("nan"), data())
    before, params = bits(net, optimizer), bits(list(net.parameters()), optimizer)
    if raises:
        with pytest.raises(RuntimeError, match="the gradient norm is nan"):
            optimizer.step(bad)
        assert bits(net, optimizer) == before and bad.step == 0
        return
    with pytest.warns(RuntimeWarning, match="the loss or its gradient is not finite"):
        optimizer.step(bad)
    assert bits(list(net.parameters()), optimizer) == params and optimizer.last_length == 0


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_parameters_without_elements(search):
    for others in ([], [torch.ones(2, dtype=torch.float64)], [torch.ones(2)]):
        params = [nn.Parameter(p) for p in (torch.empty(0, 3), *others)]

        def closure(params=params):
            for p in params:
                p.grad = 2 * p.detach()
            return sum(p.detach().double().square().sum() for p in params)

        FullBatchGD(params, 0.1, line_search=search).step(closure)
        assert all(p.detach().abs().max() < 1 for p in params[1:])


def test_a_state_dict_keeps_the_values_it_was_made_with():
    _, optimizer, closure = training("nonmonotone")
    optimizer.step(closure)
    state = optimizer.state_dict()["param_groups"][0]
    kept = list(state["last_values"])
    optimizer.step(closure)
    assert state["last_values"] == kept and len(kept) == 1
    assert len(optimizer.param_groups[0]["last_values"]) == 2


def test_a_step_that_fails_forgets_the_last_values():
    net, optimizer, closure = training("nonmonotone")
    for _ in range(3):
        optimizer.step(closure)
    rise = [0]

    def loss(output, target):
        rise[0] += 100
        return F.cross_entropy(output, target) + rise[0]

    with pytest.warns(RuntimeWarning, match="no lower value"):
        optimizer.step(FullBatchClosure(net, loss, data()))
    assert "last_values" not in optimizer.param_groups[0]


def test_errors_of_the_device_are_not_taken_for_wrong_types():
    p = nn.Parameter(torch.ones(2))

    class Lost:
        def __float__(self):
            raise RuntimeError("out of memory")

    def closure(found):
        p.grad = torch.ones(2)
        return found

    optimizer = FullBatchGD([p], line_search="armijo")
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(lambda: closure(Lost()))
    for wrong in (torch.ones(2), torch.ones((), dtype=torch.complex64), None, "loss"):
        with pytest.raises(TypeError, match="closure must return the loss"):
            optimizer.step(lambda wrong=wrong: closure(wrong))


@pytest.mark.parametrize("search", SEARCHES)
def test_without_a_gradient_nothing_moves(search):
    """Not even by momentum, which has no slope."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure():
        p.grad = torch.zeros(2)
        return 0.0

    optimizer = FullBatchGD([p], 0.5, momentum=0.9, line_search=search)
    optimizer.step(closure)
    optimizer.state[p]["momentum_buffer"] = torch.ones(2)
    optimizer.step(closure)
    assert p.tolist() == [1.0, 2.0] and optimizer.last_length == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_that_fails_changes_nothing_but_the_momentum(search):
    net, optimizer, _ = training(search, momentum=0.9)
    rise = [0]

    def loss(output, target):
        rise[0] += 1
        return F.cross_entropy(output, target) + rise[0]

    closure = FullBatchClosure(net, loss, data())
    before = bits(list(net.parameters()))
    with pytest.warns(RuntimeWarning, match="no lower value was found") as said:
        optimizer.step(closure)
    assert said[0].filename == __file__ and optimizer.last_length == 0
    twin = network()
    FullBatchClosure(twin, F.cross_entropy, data())()
    assert bits(list(net.parameters())) == before
    assert bits(list(net.buffers())[:2]) == bits(list(twin.buffers())[:2])
    assert all(s["momentum_buffer"] is None for s in optimizer.state.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_exception_puts_everything_back(call, search):
    net, optimizer, closure = training(search, lr=50.0, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(2):
            optimizer.step(closure)
    before = bits(net, optimizer)
    passes, fails = [0], 4 * call + 2  # in the second chunk of a visit of four

    def evaluate(model, chunk):
        passes[0] += 1
        if passes[0] == fails:
            raise KeyboardInterrupt
        return F.cross_entropy(model(chunk[0]), chunk[1])

    failing = FullBatchClosure(net, chunks=data(), evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert bits(net, optimizer) == before and failing.step == 0


def test_a_penalty_is_searched_with_its_objective():
    penalty = {"penalty": GradientPenalty(coefficient=0.5, method="exact")}
    _, optimizer, closure = training("armijo", lr=20.0, given=penalty | {"returns": "objective"})
    values = [optimizer.step(closure).item() for _ in range(8)]
    assert values == sorted(values, reverse=True) and optimizer.last_evaluations >= 2
    assert closure.step > 8  # the objective takes whole calls
    for given in (penalty, {"penalty": SharpnessAware()}, {"chunk_max_norm": 1.0}):
        net, optimizer, closure = training("armijo", given=given)
        before = bits(net, optimizer)
        with pytest.raises(ValueError, match="line_search compares values of the function"):
            optimizer.step(closure)
        assert bits(net, optimizer) == before and closure.step == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_resumed_steps_have_the_same_bits(search):
    net, optimizer, closure = training(search, lr=30.0, momentum=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(4):
            optimizer.step(closure)
        twin, other, plain = training(search, lr=1.0)
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(4):
            optimizer.step(closure)
            other.step(plain)
    assert bits(twin, other) == bits(net, optimizer)


@pytest.mark.parametrize("search", SEARCHES)
def test_copies_go_on_to_the_same_bits(search):
    net, optimizer, closure = training(search, lr=30.0, momentum=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(4):
            optimizer.step(closure)
        twin, other, plain = copy.deepcopy((net, optimizer, closure))
        for _ in range(4):
            optimizer.step(closure)
            other.step(plain)
    assert bits(twin, other) == bits(net, optimizer)
    assert other.last_length == optimizer.last_length


def test_arguments_are_checked():
    net, optimizer, _ = training("armijo")
    with pytest.raises(ValueError, match=r"line_search evaluates the loss: call step\(closure\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="line_search must be one of"):
        FullBatchGD(net.parameters(), line_search="wolfe")
    a, b = (nn.Parameter(torch.zeros(2)) for _ in "ab")
    with pytest.raises(ValueError, match="line_search differs between parameter groups"):
        FullBatchGD([{"params": [a]}, {"params": [b], "line_search": "armijo"}])
    mixed = [{"params": [a]}, {"params": [b], "maximize": True}]
    with pytest.raises(ValueError, match="maximize differs between parameter groups"):
        FullBatchGD(mixed, line_search="armijo").step(lambda: 0.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    sgd.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
    assert optimizer.param_groups[0]["line_search"] == "armijo"
