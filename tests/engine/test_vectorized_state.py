"""vectorize=K from call to call: nothing is lost by exceptions, copies or other arguments; resumed
runs have the same bits; nothing is read from the device after the first call.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from at_once import METHODS, chunked, flat, make, mlp, outcome, penalty_of, require_close
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._engine import reduce, vectorized_gradient, weights
from fbopt._engine.snapshot import GeneratorSnapshot

pytestmark = pytest.mark.usefixtures("one_thread")


class Boom(Exception):
    pass


class Trap:
    """A loss that raises at one of its calls."""

    def __init__(self, error):
        self.error, self.calls, self.at = error, 0, 0

    def __call__(self, output, target):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return F.cross_entropy(output, target)


def normed():
    return mlp(nn.BatchNorm1d(6), nn.Dropout(0.3))


@pytest.mark.parametrize("error", [Boom("mine"), KeyboardInterrupt(), ValueError("mine")], ids=repr)
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_at_any_of_the_passes_changes_nothing(method, error):
    """In the checks of the first call, in the first passes and the shifted ones."""
    trap = Trap(error)
    fresh = normed()
    make(fresh, chunked(), trap, method=method, vectorize=3)()
    in_first_call, trap.calls = trap.calls, 0
    assert in_first_call > 6
    one = make(fresh := normed(), chunked(), method=method, vectorize=3)
    torch.manual_seed(2)
    wanted = one(), flat_grads(fresh)
    model = normed()
    closure = make(model, chunked(), trap, method=method, vectorize=3)
    before, where = bits(model), [p.data_ptr() for p in model.parameters()]
    kinds = (type(error), RuntimeError) if isinstance(error, ValueError) else type(error)
    for at in range(1, in_first_call + 1):
        closure._full_pass._vectorized.__init__()  # as in a first call again
        trap.calls, trap.at = 0, at
        with pytest.raises(kinds, match="mine" if str(error) else ""):
            closure()
        assert bits(model) == before and closure.step == 0
        assert [p.data_ptr() for p in model.parameters()] == where
        assert all(p.grad is None for p in model.parameters())
        assert model[1].momentum == 0.1
    trap.at = 0
    torch.manual_seed(2)
    assert bits(closure(), flat_grads(model)) == bits(*wanted)


def flat_grads(model):
    return flat([p.grad for p in model.parameters()])


def test_a_user_s_own_exception_is_raised_as_it_is():
    """It may end a training loop; nothing is run once more."""
    trap = Trap(Boom("mine"))
    closure = make(mlp(), chunked(), trap, vectorize=3)
    closure()
    trap.calls, trap.at = 0, 2
    with pytest.raises(Boom, match=r"^mine$"):
        closure()
    assert trap.calls == 2


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("method", [None, "forward"])
def test_resumed_runs_and_copies_have_the_same_bits(method, accumulation):
    """The checks of a first call change none."""

    def build(model):
        optimizer = FullBatchGD(model.parameters(), lr=0.1, momentum=0.9)
        given = {"method": method, "accumulation": accumulation, "vectorize": 4}
        return model, optimizer, make(model, chunked(26), **given)

    model, optimizer, closure = build(normed())
    torch.manual_seed(7)
    for _ in range(3):
        optimizer.step(closure)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), closure.state_dict()))
    copies = [
        copy.deepcopy((model, optimizer, closure)),
        pickle.loads(pickle.dumps((model, optimizer, closure))),
        build(normed()),
    ]
    for thing, state in zip(copies[-1], states, strict=True):
        thing.load_state_dict(state)
    found = []
    start = torch.get_rng_state()
    for other, steps, call in [(model, optimizer, closure), *copies]:
        torch.set_rng_state(start)
        losses = [steps.step(call) for _ in range(3)]
        found.append(bits(losses, other, steps))
    assert found[1:] == found[:1] * 3


def test_arguments_may_change_between_calls():
    """Each call gives what a fresh closure gives one by one."""
    model = mlp(nn.BatchNorm1d(6))
    closure = make(model, chunked(26), vectorize=3)
    changes = [
        {},
        {"vectorize": 2},
        {"penalty": penalty_of("forward")},
        {"vectorize": 100, "penalty": penalty_of("central")},
        {"vectorize": 1},
        {"penalty": penalty_of("exact"), "vectorize": 3},
        {"chunk_max_norm": 0.2},
        {"penalty": penalty_of("forward"), "chunk_norms": True},
        {"loss_fn": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2)},
        {"loss_fn": None, "evaluate": lambda m, c: F.cross_entropy(m(c[0]), c[1])},
        {"chunks": chunked(22)},
        {"chunk_max_norm": None, "penalty": None},
    ]
    for change in changes:
        for name, value in change.items():
            setattr(closure, name, value)
        loss, found = closure(), flat_grads(model)
        one = copy.deepcopy(closure)
        one.vectorize = 1
        require_close(loss, one().detach())
        require_close(found, flat_grads(one.model))


def moved_to_float(model, closure):
    model.float()
    closure.chunks = [(x.float(), y) for x, y in chunked(26)]


def moved_in_memory(model, closure):
    for p in model.parameters():
        p.data = p.data.clone() + 0.1


def transposed(model, closure):
    model[0].weight.data = model[0].weight.data.t().contiguous().t() * 1.1


def in_place(model, closure):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def in_eval_mode(model, closure):
    model.eval()


def partly_in_eval_mode(model, closure):
    model[1].eval()


def another_layer(model, closure):
    model[2] = nn.Sigmoid()


def another_norm(model, closure):
    model[1] = nn.BatchNorm1d(6, momentum=None).double()


def other_chunks(model, closure):
    closure.chunks = [(2 * x, y) for x, y in chunked(30)]


def other_values_in_place(model, closure):
    for x, _ in closure.chunks:
        x.mul_(1.5)


CHANGES = [
    *(moved_to_float, moved_in_memory, transposed, in_place, in_eval_mode, partly_in_eval_mode),
    *(another_layer, another_norm, other_chunks, other_values_in_place),
]


@pytest.mark.parametrize("method", ["forward", "exact"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_models_and_chunks_may_change_between_calls(change, method):
    model = mlp(nn.BatchNorm1d(6))
    closure = make(model, chunked(26), method=method, vectorize=3)
    closure(), closure()
    change(model, closure)
    twin = copy.deepcopy(model)
    loss, tolerance = closure(), 1e-12
    expected = make(twin, closure.chunks, method=method)()
    if change is moved_to_float:
        tolerance = 1e-4
    require_close(loss, expected, tolerance)
    require_close(flat_grads(model), flat_grads(twin), tolerance)
    tracked = [flat(list(m.buffers())) for m in (model, twin)]
    if change is not another_norm:  # which counts its passes from zero
        assert model[1].num_batches_tracked != 0
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    assert tracked[0].shape == tracked[1].shape


@pytest.mark.parametrize("kind", ["SGD", "Adam", "LBFGS"])
def test_torch_optimizers_step_as_with_chunks_one_by_one(kind):
    results = []
    for count in (1, 3):
        model = mlp(nn.LayerNorm(6))
        options = {"lr": 0.05} if kind != "LBFGS" else {"line_search_fn": "strong_wolfe"}
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        closure = make(model, chunked(26), method="central", vectorize=count)
        losses = [optimizer.step(closure) for _ in range(5 if kind != "LBFGS" else 1)]
        results.append(torch.stack([*losses, *flat([p.detach() for p in model.parameters()])]))
    require_close(results[1], results[0], 1e-9)


class Storing(nn.Module):
    """Keeps what passes through, as an attribute and in lists and dicts."""

    def __init__(self):
        super().__init__()
        self.list, self.dict, self.kept, self.number = [], {}, torch.ones(2), 0

    def forward(self, h):
        self.new = self.kept = h
        self.list.append(h)
        self.dict["h"] = h
        self.number = 3
        return h


@pytest.mark.parametrize("method", [None, "forward"])
def test_no_tensors_of_a_pass_are_left_in_attributes(method):
    model = mlp(Storing())
    kept, own = model[1].kept, model[1].list
    closure = make(model, chunked(), method=method, vectorize=3)
    closure(), closure()
    layer = model[1]
    assert layer.kept is kept and layer.list is own and layer.number == 3
    for value in (*layer.list, *layer.dict.values(), getattr(layer, "new", torch.ones(1))):
        assert value.sum().isfinite()


def test_a_model_that_stores_can_be_called_and_copied_afterwards():
    model = mlp(Storing())
    closure = make(model, chunked(), method="forward", vectorize=3)
    closure()
    model[1].list.clear()
    with torch.no_grad():
        model(chunked()[0][0])
    copy.deepcopy(model)


def test_memory_does_not_grow():
    """Also where every call brings other numbers, and so other kinds of chunks."""

    class Numbered:
        call = 0

        def __iter__(self):
            self.call += 1
            yield from ((x, y, 1 + self.call / 1000) for x, y in chunked())

    def scaled(model, chunk):
        return chunk[2] * F.cross_entropy(model(chunk[0]), chunk[1])

    closures = [
        make(normed(), chunked(26), method="forward", vectorize=3, chunk_max_norm=0.1),
        make(mlp(), Numbered(), evaluate=scaled, vectorize=3, weight=lambda chunk: 4),
    ]
    from fbopt._engine import vectorized_gradient

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorized_gradient, "MOST_KINDS", 5)
        for closure in closures:
            for _ in range(10):
                closure()
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(50):
                closure()
            gc.collect()
            assert len(gc.get_objects()) - before < 200


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_on_the_host_after_the_first_call(method, monkeypatch):
    """On a GPU each of these would wait for the device."""
    model = mlp(nn.BatchNorm1d(6), nn.Dropout(0.2)).float()
    optimizer = FullBatchGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, max_norm=0.25)
    chunks = [(x.float(), y) for x, y in chunked(26)]
    penalty = method and GradientPenalty(method=method)
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks, penalty=penalty, optimizer=optimizer, vectorize=3
    )
    optimizer.step(closure)

    def refuse(*_):
        raise AssertionError("a device value was read on the host")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(torch, "equal", refuse)
    monkeypatch.setattr(weights, "_count", lambda target, mean: len(target))  # on the CPU alone
    monkeypatch.setattr(reduce, "_lie_on_host", lambda *values: False)
    for _ in range(2):
        loss = optimizer.step(closure)
    monkeypatch.undo()
    assert torch.isfinite(loss)


def test_generators_are_not_read_without_need(monkeypatch):
    closure = make(mlp(nn.Dropout(0.2)), chunked(), vectorize=3)
    closure()
    monkeypatch.setattr(GeneratorSnapshot, "_get", lambda self: pytest.fail("in a CUDA graph"))
    closure()


def test_a_closure_that_is_at_work_refuses_to_be_entered():
    """From its own loss, and from another thread; the call goes on as if nothing had been."""
    errors = []

    def enter():
        try:
            closure()
        except RuntimeError as error:
            errors.append(str(error))

    def loss_fn(output, target):
        enter()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return F.cross_entropy(output, target)

    model = mlp()
    closure = make(model, chunked(), loss_fn, method="forward", vectorize=3)
    closure()
    assert errors and all("at work" in error for error in errors)
    require_close(flat_grads(model), flat(outcome(mlp(), chunked(), method="forward").grads))


def test_two_threads_with_models_of_their_own():
    expected = flat(outcome(mlp(), chunked(), method="forward").grads)
    found = []

    def train(model, chunks):
        closure = make(model, chunks, method="forward", vectorize=3)
        for _ in range(5):
            closure()
        found.append(flat_grads(model))

    # Made here: both seed the generator that all threads share.
    threads = [threading.Thread(target=train, args=(mlp(), chunked())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for grads in found:
        require_close(grads, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_caller_without_gradients(method):
    model = mlp()
    closure = make(model, chunked(), method=method, vectorize=3)
    with torch.no_grad():
        closure()
    require_close(flat_grads(model), flat(outcome(mlp(), chunked(), method=method).grads))


def test_a_caller_in_inference_mode_is_refused_and_its_tensors_are_taken():
    with torch.inference_mode():
        chunks = [(x.clone(), y.clone()) for x, y in chunked()]
        with pytest.raises(RuntimeError, match="inference_mode"):
            make(mlp(), chunks, vectorize=3)()
    require_close(
        flat(outcome(mlp(), chunks, vectorize=3).grads), flat(outcome(mlp(), chunked()).grads)
    )


# --- what users change --------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model with settings of every kind: a number of its own, one elsewhere, a part of it."""

    class Config:
        extra = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.scale = nn.Linear(5, 3), nn.Linear(5, 3), 1.0
        self.config, self.epoch = self.Config(), 0
        self.double()

    def forward(self, x):
        out = self.first(x) * self.scale
        return out + self.extra(x) if self.config.extra else out


def same_as_one_by_one(models, closures):
    losses = [closure() for closure in closures]
    require_close(losses[0], losses[1])
    for mine, other in zip(*(m.parameters() for m in models), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            require_close(mine.grad, other.grad)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("how", ["observe", "weight", "chunks"])
def test_code_that_runs_between_groups_may_change_the_model(how, count, monkeypatch):
    """Compiled passes then cannot do without their guards, as they would in a single thread."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    models = [Scaled(), Scaled()]

    def closure(model, compiled):
        calls = [0]

        def change(*given):
            calls[0] += 1
            model.scale = 3.0 if (calls[0] - 1) % 6 >= 2 else 1.0
            return 4

        class Chunks:
            def __iter__(self):
                for chunk in chunked():
                    change()
                    yield chunk

        given = {} if how == "chunks" else {how: change}
        chunks = Chunks() if how == "chunks" else chunked()
        return make(model, chunks, vectorize=count, compile=compiled, **given)

    closures = [closure(m, compiled) for m, compiled in zip(models, (True, False), strict=True)]
    for _ in range(3):
        same_as_one_by_one(models, closures)


@pytest.mark.parametrize(("count", "compiled"), [(3, False), (1, True)])
def test_settings_that_no_attribute_of_a_module_tells(count, compiled, monkeypatch):
    """Parameters that are used no longer have no gradient; what changes nothing checks nothing."""
    made, real = [], vectorized_gradient.Checks
    monkeypatch.setattr(
        vectorized_gradient, "Checks", lambda *given: made.append(1) or real(*given)
    )
    models = [Scaled(), Scaled()]
    closures = [make(models[0], chunked(), vectorize=count, compile=compiled)]
    closures.append(make(models[1], chunked()))
    for extra in (False, True, False, True):
        for model in models:
            model.config.extra = extra
            model.epoch += 1
        same_as_one_by_one(models, closures)
    assert len(made) == 2


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.double()

    def forward(self, x):
        return (self.head if hasattr(self, "head") else self.top)(self.body(x))


@pytest.mark.parametrize("change", ["layers", "name"])
def test_layers_and_names_may_change_while_the_parameters_stay(change):
    models = [Named(), Named()]
    closures = [
        make(m, chunked(), vectorize=k, params=list(m.parameters()))
        for m, k in zip(models, (3, 1), strict=True)
    ]
    same_as_one_by_one(models, closures)
    for model in models:
        if change == "layers":
            model.body[0], model.body[1] = model.body[1], model.body[0]
        else:
            model.top = model.head
            del model.head
    same_as_one_by_one(models, closures)


def test_swapped_weights_are_followed():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double())
    closures = [
        make(m, chunked(), vectorize=k, params=list(m.parameters()))
        for m, k in zip(models, (3, 1), strict=True)
    ]
    for _ in range(3):
        same_as_one_by_one(models, closures)
        for m in models:
            m[0].weight, m[2].weight = m[2].weight, m[0].weight


def test_points_take_the_memory_of_the_largest_group():
    """Also where larger groups come after smaller ones."""
    model = mlp(width=60)
    size = sum(p.numel() for p in model.parameters())
    closure = make(model, [], method="forward", vectorize=6)
    chunks, other = chunked(), chunked(36, 6)
    for count in (1, 2, 3, 4, 5, 6, 2):
        closure.chunks = [*chunks[:count], *other[: 6 - count]]
        closure()
    memory = closure._full_pass._vectorized._memory
    flats = [f.untyped_storage() for points in memory._points.values() for f in points.flats]
    nbytes = sum({f.data_ptr(): f.nbytes() for f in flats}.values())
    assert nbytes <= 6 * 8 * (size + 16 * 4)  # each parameter begins at a multiple of 16
