"""LBFGS: convergence, what it refuses, what it puts back, and how it goes on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from search_cases import SEARCHES, data, network
from torch import nn

from fbopt import LBFGS, FullBatchClosure, GradientPenalty, SharpnessAware

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"tolerance_grad": 1e-9, "tolerance_change": 0.0}


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


class Problem:
    """A function of parameters as a closure that counts, notes where it was, and may fail."""

    def __init__(self, params, function):
        self.params, self.function = params, function
        self.count, self.fails_at = 0, None

    def __call__(self):
        self.count += 1
        if self.count == self.fails_at:
            raise KeyboardInterrupt
        for p in self.params:
            p.grad = None
        value = self.function(*self.params)
        value.backward()
        return value.detach()


def valley(n=20):
    x = torch.full((n,), -1.2, dtype=torch.float64)
    x[1::2] = 1.0
    return Problem([nn.Parameter(x)], rosenbrock)


def split():
    """The same function of two groups' parameters, one of them float32."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(7))
    return Problem([a, b], lambda a, b: rosenbrock(torch.cat([a.flatten(), b.double()])))


def groups(problem, rate=0.5):
    return [{"params": [problem.params[0]]}, {"params": [problem.params[1]], "lr": rate}]


# --- convergence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
def test_rosenbrock(search, damping, backend):
    problem = valley()
    optimizer = LBFGS(problem.params, line_search=search, damping=damping, max_iter=300, **EXACT)
    first = optimizer.step(problem)
    assert first == rosenbrock(valley().params[0])
    assert optimizer.stopped == "gradient within tolerance_grad"
    assert optimizer.last_evaluations == problem.count < 300 > optimizer.n_iter
    torch.testing.assert_close(problem.params[0].detach(), torch.ones(20).double())
    rosenbrock(problem.params[0]).backward()  # on top of the gradient that is left there
    assert problem.params[0].grad.abs().max() <= 2e-9


def test_no_more_evaluations_than_torch_takes():
    ours, theirs = valley(100), valley(100)
    LBFGS(ours.params, max_iter=2000, **EXACT).step(ours)
    options = {"history_size": 10, "line_search_fn": "strong_wolfe", "tolerance_change": 0}
    torch.optim.LBFGS(theirs.params, max_iter=2000, tolerance_grad=1e-9, **options).step(theirs)
    assert ours.count <= 1.05 * theirs.count


@pytest.mark.parametrize("per_step", [1, 5])
def test_without_a_search_the_steps_are_those_of_torch(per_step):
    """Where both begin at full length: pairs, scaling, and those between two steps."""
    torch.manual_seed(0)
    root = torch.randn(30, 30).double()
    hessian = (root @ root.T / 60 + torch.eye(30)) / 10_000
    start = 60 * torch.randn(30).double()
    mine, other = (
        Problem([nn.Parameter(start.clone())], lambda x: x @ hessian @ x / 2) for _ in "ab"
    )
    common = {"lr": 0.7, "history_size": 4, "max_iter": per_step}
    common |= {"max_eval": 99, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    ours = LBFGS(mine.params, line_search=None, **common)
    theirs = torch.optim.LBFGS(other.params, **common)
    for _ in range(10 // per_step):
        assert ours.step(mine) == pytest.approx(theirs.step(other).item(), rel=1e-6)
        torch.testing.assert_close(mine.params, other.params, rtol=1e-7, atol=1e-13)
    assert mine.count == other.count


def test_groups_have_rates_of_their_own():
    """The second group's part of the first step is half as long; a rate of 0 leaves it alone."""
    for rate in (0.5, 0.0):
        problem = split()
        before = [p.detach().clone() for p in problem.params]
        optimizer = LBFGS(groups(problem, rate), line_search=None, max_iter=1)
        optimizer.step(problem)
        moved = [q - p.detach() for p, q in zip(problem.params, before, strict=True)]
        size = torch.cat([p.grad.double().flatten() for p in problem.params]).norm()
        torch.testing.assert_close(moved[0], problem.params[0].grad / size)
        torch.testing.assert_close(moved[1], (rate * problem.params[1].grad / size).float())
    problem = split()
    optimizer = LBFGS(groups(problem), max_iter=400, tolerance_grad=1e-3)
    optimizer.step(problem)
    assert rosenbrock(torch.cat([p.detach().flatten() for p in problem.params])) < 1e-4


def test_maximize():
    problem = Problem([nn.Parameter(torch.zeros(5).double())], lambda x: 3 - (x - 2).square().sum())
    LBFGS(problem.params, maximize=True).step(problem)
    torch.testing.assert_close(problem.params[0].detach(), torch.full((5,), 2.0).double())


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_no_step_is_longer_than_max_norm(search):
    problem = valley()
    optimizer = LBFGS(problem.params, 0.5, max_norm=0.1, max_iter=1, line_search=search)
    lengths = []
    for _ in range(25):
        before = problem.params[0].detach().clone()
        optimizer.step(problem)
        lengths.append((problem.params[0].detach() - before).norm().item())
    assert max(lengths) <= 0.05 + 1e-12 and sum(lengths[5:]) > 0.1


def test_half_precision_and_absent_gradients():
    torch.manual_seed(0)
    a, unused = nn.Parameter(torch.randn(9).bfloat16()), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    problem = Problem([a], lambda a: (a.float() - 1).square().sum())
    kept = bits(unused, frozen)
    optimizer = LBFGS([a, unused, frozen])
    optimizer.step(problem)
    assert (a - 1).abs().max() < 0.01 and bits(unused, frozen) == kept


def test_what_is_frozen_or_moved_begins_anew():
    problem = split()
    optimizer = LBFGS(problem.params, max_iter=5, max_eval=99)
    optimizer.step(problem)
    problem.params[1].requires_grad_(False)
    kept, before = bits(problem.params[1]), problem.count
    optimizer.step(problem)
    assert bits(problem.params[1]) == kept and optimizer.n_iter == 10
    assert problem.count - before == optimizer.last_evaluations


# --- why it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"max_iter": 3, "max_eval": 99}, "max_iter reached"),
        ({"max_iter": 30, "max_eval": 9}, "max_eval reached"),
        ({"tolerance_grad": 1e9}, "gradient within tolerance_grad"),
        ({"tolerance_change": 1e9}, "slope within tolerance_change"),
        ({"tolerance_change": 0.5}, "change of the parameters within tolerance_change"),
    ],
)
def test_it_says_why_it_stopped(options, reason):
    problem = valley()
    optimizer = LBFGS(problem.params, **options)
    assert optimizer.stopped is None
    optimizer.step(problem)
    assert optimizer.stopped == reason
    assert optimizer.last_evaluations == problem.count


def test_a_change_of_the_loss_ends_a_step():
    bowl = Problem([nn.Parameter(torch.tensor(0.5).double())], lambda x: 0.45 * x * x)
    optimizer = LBFGS(bowl.params, tolerance_change=0.15)
    optimizer.step(bowl)
    assert optimizer.stopped == "change of the loss within tolerance_change"


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_that_fails_changes_nothing_and_says_so_once(search):
    problem = valley()
    optimizer = LBFGS(problem.params, line_search=search, max_iter=5, max_eval=99)
    optimizer.step(problem)
    honest, kept = problem.function, bits(problem.params[0])
    problem.function = lambda x: rosenbrock(x) + 1e6 * problem.count  # ever higher
    with pytest.warns(RuntimeWarning, match="no lower value .* goes along the gradient") as said:
        optimizer.step(problem)
    assert len(said) == 1 and said[0].filename == __file__
    assert bits(problem.params[0]) == kept and "no lower value" in optimizer.stopped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(problem)
        assert bits(problem.params[0]) == kept
        problem.function = honest
        optimizer.param_groups[0].update(max_iter=300, max_eval=999)
        optimizer.step(problem)
    assert rosenbrock(problem.params[0]) < 1e-8


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_nan_is_a_failure(search):
    """Far from the start there is no loss: searches come nearer, a step without one is undone."""
    problem = valley()
    kept = bits(problem.params[0])
    start = problem.params[0].detach().clone()
    near = 1e-3 if search else 0.0
    problem.function = lambda x: rosenbrock(x) / ((x.detach() - start).norm() <= near).double()
    optimizer = LBFGS(problem.params, line_search=search, max_iter=2)
    problem.function(problem.params[0])
    if search is None:
        with pytest.warns(RuntimeWarning, match="LBFGS"):
            optimizer.step(problem)
        assert bits(problem.params[0]) == kept
    else:
        before = rosenbrock(start)
        optimizer.step(problem)
        assert rosenbrock(problem.params[0]) < before
        assert (problem.params[0].detach() - start).norm() <= near


def test_a_step_that_led_to_nan_is_undone_by_the_next():
    problem = valley()
    kept = bits(problem.params[0])
    optimizer = LBFGS(problem.params, lr=0.5, line_search=None, max_iter=1)
    optimizer.step(problem)
    assert bits(problem.params[0]) != kept
    honest, problem.function = problem.function, lambda x: rosenbrock(x) * float("nan")
    with pytest.warns(RuntimeWarning, match="the loss or its gradient is not finite"):
        optimizer.step(problem)
    assert bits(problem.params[0]) == kept
    problem.function = honest
    before = optimizer.step(problem)
    assert rosenbrock(problem.params[0]) < before


def test_a_loss_that_is_nan_at_the_start():
    problem = valley()
    optimizer = LBFGS(problem.params, max_iter=3)
    optimizer.step(problem)
    kept, honest = bits(problem.params[0]), problem.function
    problem.function = lambda x: rosenbrock(x) * float("nan")
    with pytest.warns(RuntimeWarning, match="the loss or its gradient is not finite"):
        assert optimizer.step(problem).isnan()
    assert optimizer.stopped == "the loss or its gradient is not finite"
    problem.function, optimizer.param_groups[0]["max_iter"] = honest, 300
    assert bits(problem.params[0]) == kept
    optimizer.step(problem)
    assert rosenbrock(problem.params[0]) < 1e-8


@pytest.mark.parametrize("search", [*SEARCHES, None])
@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_an_exception_puts_the_last_iterate_back(at, search):
    """And the next step goes on as if it had not been."""
    problem, twin = valley(), valley()
    options = {"line_search": search, "max_iter": 9, "max_eval": 99}
    optimizer, other = (LBFGS(p.params, 0.1, **options) for p in (problem, twin))
    seen = []
    problem.function = lambda x: seen.append(x.detach().clone()) or rosenbrock(x)
    problem.fails_at = at
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(problem)
    assert problem.count == at == optimizer.last_evaluations + 1
    held = [torch.equal(problem.params[0], x) for x in seen]
    assert any(held) if seen else bits(problem.params) == bits(twin.params)
    done = optimizer.n_iter
    if done:
        other.param_groups[0]["max_iter"] = done
        other.step(twin)
        other.param_groups[0]["max_iter"] = 9
        if search is None:
            assert problem.params[0].equal(twin.params[0])
            return
    assert bits(problem.params) == bits(twin.params)
    for one, closure in ((optimizer, problem), (other, twin)):
        one.step(closure)
    assert bits(problem.params) == bits(twin.params)


def test_buffers_belong_to_the_parameters():
    """After steps, failed searches and exceptions BatchNorm's are those of a pass where p is."""
    model = network()
    fails, calls = [0], [0]

    def loss(output, target):
        calls[0] += 1
        if calls[0] == fails[0]:
            raise KeyError
        return F.cross_entropy(output, target)

    closure = FullBatchClosure(model, loss, data())
    optimizer = LBFGS(model.parameters(), max_iter=4)
    optimizer.step(closure)

    def expected():
        twin = copy.deepcopy(model)
        FullBatchClosure(twin, F.cross_entropy, data())()
        return bits(list(twin.buffers())[:2], [p.grad for p in twin.parameters()])

    assert bits(list(model.buffers())[:2], [p.grad for p in model.parameters()]) == expected()
    fails[0] = calls[0] + 6  # in the second call
    before = bits(model)
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert bits(model)[0]["params"] == before[0]["params"]
    assert bits(list(model.buffers())[:2]) == expected()[:1]


# --- closures ------------------------------------------------------------------------------------


PENALTY = GradientPenalty(coefficient=0.5, method="exact")
REFUSED = {
    "the loss with a penalty": ({"penalty": PENALTY}, 'returns="objective"'),
    "SAM": ({"penalty": SharpnessAware()}, "SharpnessAware is that of no function"),
    "clipped chunks": ({"chunk_max_norm": 1.0}, "chunk_max_norm is that of no function"),
    "a penalty that changes": (
        {"penalty": GradientPenalty(coefficient=lambda step: 0.1), "returns": "objective"},
        "pass a number as coefficient",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_search_needs_the_function_of_its_gradient(kind):
    given, message = REFUSED[kind]
    model = network()
    closure = FullBatchClosure(model, F.cross_entropy, data(), **given)
    optimizer = LBFGS(model.parameters())
    before = bits(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert bits(model, optimizer) == before and closure.step == 0
    optimizer.param_groups[0]["line_search"] = None
    optimizer.step(closure)
    assert closure.step > 0


def fitted(sees_penalty):
    """The largest element of J's gradient where a search on J, or on L alone, ends; and why."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    penalty = GradientPenalty(coefficient=2.0, method="exact")
    closure = FullBatchClosure(model, F.cross_entropy, data(), penalty=penalty, returns="objective")

    def searched():
        objective = closure()
        return objective if sees_penalty else objective - 2.0 / 2 * closure.mean_sqnorm

    optimizer = LBFGS(
        model.parameters(), max_iter=300, max_eval=999, tolerance_grad=1e-5, tolerance_change=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step(searched)
    closure()
    return max(p.grad.abs().max() for p in model.parameters()), optimizer.stopped


def test_a_search_on_the_objective_converges_where_one_on_the_loss_stalls():
    steepness, stopped = fitted(sees_penalty=True)
    assert steepness <= 1e-5 and stopped == "gradient within tolerance_grad"
    steepness, stopped = fitted(sees_penalty=False)
    assert steepness > 1e-3 and "no lower value" in stopped


def test_the_penalty_follows_the_steps_learning_rate():
    """As with FullBatchGD, lambda = lr strength / 4 of the optimizer that steps."""
    model = network()
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=2)
    penalty = GradientPenalty(strength=8.0, method="exact")
    closure = FullBatchClosure(
        model, F.cross_entropy, data(), penalty=penalty, returns="objective", optimizer=optimizer
    )
    optimizer.step(closure)
    loss = FullBatchClosure(copy.deepcopy(model), F.cross_entropy, data())()
    torch.testing.assert_close(closure.objective, loss + 0.5 * closure.mean_sqnorm)


# --- state ---------------------------------------------------------------------------------------


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KINDS = {
    "strong_wolfe": {},
    "nonmonotone": {"line_search": "nonmonotone", "damping": True},
    "no search": {"line_search": None, "lr": 0.05},
    "elsewhere": {"history_device": "cpu", "history_size": 3},
}


@pytest.mark.parametrize("done", [0, 1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_steps_have_the_same_bits(kind, done):
    options = {"max_iter": 2, "max_eval": 99} | KINDS[kind]
    problem, twin = split(), split()
    optimizer, other = (LBFGS(groups(p), **options) for p in (problem, twin))
    for _ in range(done):
        optimizer.step(problem)
    with torch.no_grad():
        for p, q in zip(twin.params, problem.params, strict=True):
            p.copy_(q)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    for _ in range(6):
        optimizer.step(problem)
        other.step(twin)
    assert bits(twin.params, other) == bits(problem.params, optimizer)
    assert other.n_iter == optimizer.n_iter == 2 * (done + 6)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_go_on_alike(way):
    problem = split()
    optimizer = LBFGS(groups(problem), max_iter=2)
    for _ in range(4):
        optimizer.step(problem)
    pair = problem.params, optimizer
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        params, other = torch.load(file, weights_only=False)
    else:
        params, other = (
            copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        )
    assert (other.stopped, other.n_iter) == (optimizer.stopped, optimizer.n_iter)
    twin = Problem(params, problem.function)
    for _ in range(4):
        optimizer.step(problem)
        other.step(twin)
    assert bits(params, other) == bits(problem.params, optimizer)


OTHERS = {
    "longer": [torch.zeros(5), torch.zeros(50)],
    "as long": [torch.zeros(4, 3).double(), torch.zeros(7)],
    "as padded": [torch.zeros(3, 4).double(), torch.zeros(9)],
    "fewer": [torch.zeros(3, 4).double()],
}


@pytest.mark.parametrize("kind", ["another size", *OTHERS, "torch"])
def test_states_that_do_not_fit_are_refused(kind):
    problem = split()
    optimizer = LBFGS(problem.params, max_iter=2)
    optimizer.step(problem)
    state = saved(optimizer.state_dict())
    other = problem
    if kind == "torch":
        theirs = torch.optim.LBFGS(problem.params, max_iter=1)
        theirs.step(problem)
        state = theirs.state_dict()
    elif kind in OTHERS:
        other = Problem([nn.Parameter(p) for p in OTHERS[kind]], None)
    else:
        state["param_groups"][0]["history_size"] = 7
    target = LBFGS(other.params, history_size=10)
    before = bits(target)
    with pytest.raises(ValueError, match="state dict"):
        target.load_state_dict(state)
    assert bits(target) == before


def test_what_was_pickled_of_others_is_forgotten():
    """As by an optimizer that lives on."""
    problem = split()
    optimizer = LBFGS(problem.params, max_iter=3)
    optimizer.step(problem)
    problem.params[1].requires_grad_(False)
    params, other = pickle.loads(pickle.dumps((problem.params, optimizer)))
    twin = Problem(params, problem.function)
    optimizer.step(problem)
    other.step(twin)
    assert bits(params, other) == bits(problem.params, optimizer)
    assert other.n_iter == optimizer.n_iter > 3


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_lr_of_zero_forgets_nothing(search):
    problem, twin = valley(), valley()
    optimizer, other = (LBFGS(p.params, 0.1, line_search=search) for p in (problem, twin))
    for one, closure in ((optimizer, problem), (other, twin)):
        one.param_groups[0].update(max_iter=4, max_eval=99)
        one.step(closure)
    kept = bits(problem.params)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(problem)
    assert search is None or bits(problem.params) == kept
    assert optimizer._method._history.count >= 3
    optimizer.param_groups[0]["lr"] = 0.1
    if search is None:
        return
    for one, closure in ((optimizer, problem), (other, twin)):
        one.step(closure)
    assert bits(problem.params) == bits(twin.params)


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_parameters_without_elements(search):
    for others in ([], [torch.ones(2, dtype=torch.float64)], [torch.ones(2)]):
        params = [nn.Parameter(p) for p in (torch.empty(0, 3), *others)]
        problem = Problem(params, lambda *p: sum(q.double().square().sum() for q in p))
        optimizer = LBFGS(params, line_search=search)
        optimizer.step(problem)
        assert optimizer.stopped == "gradient within tolerance_grad"
        assert all(p.detach().abs().max() < 1e-6 for p in params[1:])


@pytest.mark.parametrize("search", SEARCHES)
def test_a_trial_whose_gradient_is_not_finite_is_too_far(search):
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    problem = Problem([x], lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum())
    LBFGS([x], lr=8.0, line_search=search, max_iter=1).step(problem)
    assert 0 < x.item() < 1 and x.grad.isfinite().all()


def test_schedulers_and_hooks_work():
    problem = valley()
    optimizer = LBFGS(problem.params, max_iter=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        optimizer.step(problem)
        schedule.step()
    assert seen == [1, 0.5, 0.25]


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"line_search": "wolfe"}, "line_search must be one of"),
        ({"history_size": 0}, "history_size must be at least 1"),
        ({"history_size": 2.5}, "history_size must be a whole number"),
        ({"max_iter": True}, "max_iter must be a whole number"),
        ({"max_eval": 0}, "max_eval must be at least 1"),
        ({"max_norm": 0.0}, "max_norm must be greater than 0"),
        ({"tolerance_grad": float("nan")}, "tolerance_grad must be finite"),
        ({"tolerance_change": -1.0}, "tolerance_change must be at least 0"),
        ({"damping": 1}, "damping must be True or False"),
        ({"history_device": "gpu"}, "history_device is no device"),
    ],
)
def test_options_are_checked(options, message):
    problem = valley()
    with pytest.raises((TypeError, ValueError), match=message):
        LBFGS(problem.params, **options)
    optimizer = LBFGS(problem.params)
    optimizer.param_groups[0].update(options)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step(problem)
    assert problem.count == 0


def test_parameters_are_checked():
    x = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"pass \[params\]"):
        LBFGS(x)
    with pytest.raises(TypeError, match=r"complex64: fbopt takes .*view_as_real"):
        LBFGS([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="damping differs between parameter groups"):
        LBFGS([{"params": [x]}, {"params": [nn.Parameter(torch.zeros(2))], "damping": True}])
    optimizer = LBFGS([x])
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(x.detach()[1:])]})
    assert len(optimizer.param_groups) == 1


def test_closures_are_checked():
    problem = valley()
    optimizer = LBFGS(problem.params)
    with pytest.raises(TypeError, match="closure must be callable, got Tensor"):
        optimizer.step(problem())
    with pytest.raises(TypeError, match=r"closure must return the loss, .* got NoneType"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match="closure must return the loss"):
        optimizer.step(lambda: torch.ones(3))
