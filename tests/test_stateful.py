"""Anything in any order: closure, optimizer and accumulator against plain_training after each rule.

Freezing, added groups, copies, exceptions and interrupts in the middle of a pass, other chunks,
modes, buffers, memory, options, state dicts, chunks at once. FBOPT_STATEFUL_RUNS=1000 tries more
sequences.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import bits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_training import DROP, MOMENTUM, Net, PlainAccumulator, PlainTraining, close, largest
from torch import Tensor, nn

from fbopt import FullBatchClosure, FullBatchGD, GradientAccumulator, GradientPenalty

RUNS = int(os.environ.get("FBOPT_STATEFUL_RUNS", "0"))
ALWAYS = "last.weight"  # is never frozen: a model without anything to train is refused
LATE = ("last.weight", "last.bias")  # join the optimizer as a group of their own
SIZES = ((5, 3, 2), (4, 4, 4), (2,), (7, 2, 3, 5), (3, 2))
OPTIONS = (
    {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False},
    {"momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-2, "nesterov": True, "maximize": False},
    {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.0, "nesterov": False, "maximize": False},
    {"momentum": 0.7, "dampening": 0.0, "weight_decay": 1e-2, "nesterov": False, "maximize": True},
)
STEEP = 5.0  # where parameters of this size would blow up next, training starts from small ones
RATES = (0.05, 0.01, 0.0)
seeds = st.integers(0, 7)
somewhere = st.integers(0, 11)


class Boom(Exception):
    """Raised by a trap."""


class Interrupt(KeyboardInterrupt):
    """The same, as from Ctrl-C."""


class Trap:
    """Does something at one of the calls to come."""

    action: Callable[[], Any] | None = None
    sprung = False
    left = 0

    def set(self, left: int, action: Callable[[], Any]) -> None:
        self.left, self.action, self.sprung = left, action, False

    def unset(self) -> None:
        self.action, self.sprung = None, False

    def trip(self) -> None:
        self.left -= 1
        if self.action is not None and self.left < 0 and not self.sprung:
            self.sprung = True
            self.action()


class Loss(Trap):
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.trip()
        return nn.functional.mse_loss(output, target)


class Observer(Trap):
    """Counts the samples of a step."""

    total = 0

    def reset(self) -> None:
        self.total = 0

    def __call__(self, output: Tensor, target: Tensor) -> None:
        self.trip()
        self.total += len(target)


class Evaluate(Trap):
    """The same loss, and what AuxiliaryObserver gets."""

    def __call__(self, model: nn.Module, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.trip()
        loss = nn.functional.mse_loss(model(chunk[0]), chunk[1])
        return loss, torch.tensor(len(chunk[0]))


class AuxiliaryObserver(Observer):
    def __call__(self, aux: Tensor, chunk: tuple[Tensor, Tensor]) -> None:
        self.trip()
        self.total += int(aux)


class Chunks(Trap):
    """Chunks that only __iter__ gives."""

    def __init__(self, chunks: list) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            self.trip()
            yield chunk


def uneven(chunk: tuple[Tensor, Tensor]) -> float:
    return 0.5 + int(4 * chunk[1][0, 0].abs()) / 4  # exact sums take few digits


def skipping(chunk: tuple[Tensor, Tensor]) -> Tensor:
    return torch.tensor(0 if len(chunk[0]) == 3 else len(chunk[0]))


WEIGHTS: tuple[Callable | None, ...] = (None, uneven, skipping)


def chunks_of(seed: int, nan: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Ragged chunks; `nan`: and one whose gradient is NaN."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[seed % len(SIZES)] + (4,) * nan
    found = [torch.randn(n, 5, generator=generator).double().split([3, 2], dim=1) for n in sizes]
    if nan:
        found[-1][0].fill_(math.nan)
    return found


def shrinking(step: int) -> float:
    return 0.1 / (1 + step)


COEFFICIENTS: tuple[dict[str, Any], ...] = (
    {"coefficient": 0.1},
    {"coefficient": shrinking},
    {"strength": 4.0},
    {"coefficient": 0.0},
)


penalties = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["forward", "central", "exact", None]),
        "coefficient": st.sampled_from(COEFFICIENTS),
        "radius": st.sampled_from([1e-1, 1e-2]),
        "chunk_max_norm": st.sampled_from([None, 0.5]),
        "chunk_norms": st.booleans(),
    }
)


def reload(things: Any) -> Any:
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
    "deepcopy": copy.deepcopy,
    "torch.save": reload,
}


class Training(RuleBasedStateMachine):
    @initialize(
        depth=st.sampled_from([1, 3]),  # 3: small tensors enough to be packed into one
        seed=seeds,
        accumulation=st.sampled_from(["float32", "exact"]),
        backward=st.booleans(),
        weight=st.sampled_from(WEIGHTS),
        evaluates=st.booleans(),
        max_norm=st.sampled_from([None, 0.3, 100.0]),
        norm_type=st.sampled_from([2.0, math.inf]),
        options=st.sampled_from(OPTIONS),
        penalty=penalties,
        vectorize=st.sampled_from([1, 1, 2, 3]),
    )
    def begin(
        self, depth, seed, accumulation, backward, weight, evaluates, max_norm, norm_type, options,
        penalty, vectorize,
    ):  # fmt: skip
        torch.manual_seed(seed)
        # Chunks at once draw other numbers than one by one.
        self.vectorize = 1 if backward else vectorize
        self.model = Net(depth, DROP if self.vectorize == 1 else 0.0).double()
        self.names = list(dict(self.model.named_parameters()))
        self.fresh = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        group = {"lr": 0.05, **options}
        early = [n for n in self.names if n not in LATE]
        clip = {"max_norm": max_norm, "norm_type": norm_type}
        self.optimizer = FullBatchGD([self.named[n] for n in early], **group, **clip)
        self.plain = PlainTraining(self.model, [{**group, "names": early}], **clip)
        self.weight, self.evaluates = weight, evaluates
        self.accumulation, self.backward = accumulation, backward
        self.closure = self.make_closure(Chunks(chunks_of(seed)))
        self.penalise(**penalty)
        self.accumulator = GradientAccumulator(self.model.parameters(), accumulation)
        self.sums = PlainAccumulator(self.names)
        self.is_mean = False  # the accumulator begins a new sum at the next addition
        self.own: dict[str, Tensor] = {}  # gradients in the accumulator's memory
        self.can_assign = self.can_roll_back = False

    def make_closure(self, chunks: Any) -> FullBatchClosure:
        observer = AuxiliaryObserver() if self.evaluates else Observer()
        return FullBatchClosure(
            self.model,
            None if self.evaluates else Loss(),
            chunks,
            evaluate=Evaluate() if self.evaluates else None,
            optimizer=self.optimizer,
            accumulation=self.accumulation,
            backward=self.backward,
            weight=self.weight,
            vectorize=self.vectorize,
            observe=observer,
            on_pass_start=observer.reset,
        )

    @property
    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def chunks(self) -> list:
        return list(getattr(self.closure.chunks, "chunks", self.closure.chunks))

    def weigh(self, chunk: Any) -> float:
        return float(len(chunk[0]) if self.weight is None else self.weight(chunk))

    # --- what has to hold after every rule -------------------------------------------------------

    @invariant()
    def all_is_as_in_the_plain_model(self) -> None:
        if not hasattr(self, "plain"):
            return
        plain = self.plain
        # A gradient that is zero but for rounding has that of the others' size.
        steepness = largest([*plain.grads.values(), *plain.momenta.values()])
        for n, p in self.named.items():
            assert p.requires_grad == (n in plain.trainable), n
            assert close(p.detach(), plain.params[n]), n
            assert close(p.grad, plain.grads[n], steepness), f"gradient of {n}"
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            assert close(buffer, plain.momenta.get(n), steepness), f"momentum of {n}"
            plain.params[n] = p.detach().clone()  # rounding does not add up
            if buffer is not None:
                plain.momenta[n] = buffer.clone()
        for n, b in self.model.named_buffers():
            assert close(b, plain.buffers[n]), n
            plain.buffers[n] = b.clone()
        for n, mode in plain.modes.items():
            layer = self.model.get_submodule(n)
            assert layer.training == mode, n
            assert getattr(layer, "momentum", 0.3) == MOMENTUM, n
        groups = zip(self.optimizer.param_groups, plain.groups, strict=True)
        for ours, theirs in groups:
            assert [id(p) for p in ours["params"]] == [id(self.named[n]) for n in theirs["names"]]
            assert all(float(ours[k]) == theirs[k] for k in theirs if k != "names")
        assert self.closure.step == plain.steps
        weight = sum(w for w, _ in self.sums.added)
        assert close(self.accumulator.total_weight, weight)
        if largest(plain.params.values()) > STEEP:
            self.restart()

    def restart(self) -> None:
        """Go back to small parameters."""
        with torch.no_grad():
            for n, p in self.named.items():
                p.copy_(self.fresh[n])
        self.optimizer.state.clear()
        self.model.zero_grad()
        self.plain.params = {n: p.clone() for n, p in self.fresh.items()}
        self.plain.momenta, self.plain.grads = {}, dict.fromkeys(self.names)
        self.own, self.can_assign = {}, False

    # --- calls and steps -------------------------------------------------------------------------

    @property
    def penalty(self) -> tuple[str | None, float, float]:
        """Method, coefficient and radius; raises as the closure does."""
        penalty = self.closure.penalty
        if penalty is None:
            return None, 0.0, 0.0
        if callable(penalty.coefficient):
            value = penalty.coefficient(self.plain.steps)
        elif penalty.coefficient is not None:
            value = penalty.coefficient
        else:
            rates = {group["lr"] for group in self.plain.groups}
            if len(rates) > 1:
                raise ValueError("different learning rates")
            value = rates.pop() * penalty.strength / 4
        return penalty.method, value, penalty.radius

    def run(self, seed: int, real: Callable[[], Any], plain: Callable[[], Any]) -> tuple[Any, Any]:
        """Both, from the same random state, which they also leave alike."""
        torch.manual_seed(seed)
        found, after = real(), torch.get_rng_state()
        torch.manual_seed(seed)
        expected = plain()
        assert torch.equal(after, torch.get_rng_state())
        return found, expected

    def plain_call(self) -> tuple[float, float]:
        clip = self.closure.chunk_max_norm
        return self.plain.call(self.chunks, self.weigh, *self.penalty, clip)

    def call(self, seed: int, real: Callable[[], Any]) -> bool:
        """Visit all chunks, and compare loss and norm; False where that is refused."""
        try:
            method, coefficient, _ = self.penalty
        except ValueError:
            with pytest.raises(ValueError, match="different learning rates"):
                real()
            return False
        where = [p.data_ptr() for p in self.named.values()]
        loss, (expected, square) = self.run(seed, real, self.plain_call)
        if not self.closure.flatten_parameters:
            assert where == [p.data_ptr() for p in self.named.values()]
        assert close(loss, expected)
        needed = self.closure.chunk_max_norm is not None or self.closure.chunk_norms
        # A coefficient on the device is not read, and may be zero.
        follows = method is not None and self.closure.penalty.coefficient is None
        tensor = follows and isinstance(self.optimizer.param_groups[0]["lr"], Tensor)
        if needed or tensor or (method is not None and coefficient != 0):
            assert close(self.closure.mean_sqnorm, square)
        else:
            assert self.closure.mean_sqnorm is None
        seen = [len(chunk[0]) for chunk in self.chunks if self.weigh(chunk)]
        assert self.closure.observe.total == sum(seen)
        self.own, self.can_assign, self.can_roll_back = {}, True, True
        return True

    @rule(seed=seeds)
    def call_the_closure(self, seed):
        self.call(seed, self.closure)

    def step(self, seed: int, given: Callable[[], Any]) -> None:
        if self.call(seed, lambda: self.optimizer.step(given)):
            assert close(self.optimizer.last_grad_norm, self.plain.step())

    @rule(seed=seeds)
    def take_a_step(self, seed):
        self.step(seed, self.closure)

    @rule(seed=seeds)
    def take_a_step_with_a_function(self, seed):
        self.step(seed, self.closure.__call__)

    @rule(seeds=st.lists(seeds, min_size=2, max_size=4))
    def train(self, seeds):
        for seed in seeds:
            self.step(seed, self.closure)
            self.all_is_as_in_the_plain_model()

    @rule()
    def step_on_the_gradients(self):
        held = [n for group in self.plain.groups for n in group["names"]]
        stale = [
            n for n in held if n not in self.plain.trainable and self.plain.grads[n] is not None
        ]
        if stale:
            with pytest.raises(ValueError, match="before it was frozen"):
                self.optimizer.step()
        else:
            self.optimizer.step()
            assert close(self.optimizer.last_grad_norm, self.plain.step())

    @rule(set_to_none=st.booleans())
    def zero_the_gradients(self, set_to_none):
        """Zeros are written into the closure's memory, or the accumulator's mean."""
        if self.own and not set_to_none:
            self.start_the_sum_over()
        self.model.zero_grad(set_to_none)
        self.plain.grads = {
            n: None if set_to_none or g is None else torch.zeros_like(g)
            for n, g in self.plain.grads.items()
        }
        self.can_assign = self.can_assign and set_to_none

    @precondition(lambda self: self.can_assign)
    @rule()
    def assign_again(self):
        self.closure.assign()
        self.plain.grads |= {n: g for n, g in self.plain.means.items() if n in self.summed()}
        self.own = {}

    def summed(self) -> set[str]:
        ids = set(map(id, self.closure.sums.params))
        return {n for n, p in self.named.items() if id(p) in ids}

    @precondition(lambda self: self.can_roll_back)
    @rule()
    def roll_back(self):
        self.closure.rollback()
        self.plain.rollback()
        self.can_roll_back = False

    # --- what goes wrong on the way --------------------------------------------------------------

    @rule(
        seed=seeds,
        where=st.sampled_from(["loss", "observe", "chunks"]),
        left=somewhere,
        what=st.sampled_from(["boom", "interrupt", "nested", "nested step"]),
        step=st.booleans(),
    )
    def fail_in_the_middle(self, seed, where, left, what, step):
        """An exception out of the user's code, or a call of the closure from within itself."""
        loss = self.closure.evaluate or self.closure.loss_fn
        trap = loss if where == "loss" else getattr(self.closure, where)
        if not isinstance(trap, Trap):
            return
        error = {"boom": Boom, "interrupt": Interrupt}.get(what, RuntimeError)

        def spring() -> None:
            if what == "nested":
                self.closure()
            elif what == "nested step":
                self.optimizer.step(self.closure)
            raise error

        trap.set(left, spring)
        before = bits(self.model, self.optimizer)
        real = (lambda: self.optimizer.step(self.closure)) if step else self.closure
        try:
            if self.call(seed, real) and step:
                assert not trap.sprung
                self.plain.step()
        except error as raised:
            assert trap.sprung and ("nested" not in what or "at work" in str(raised))
            assert bits(self.model, self.optimizer) == before
            self.plain.fail()
            self.own, self.can_assign, self.can_roll_back = {}, False, False
        finally:
            trap.unset()

    def rates_differ(self) -> bool:
        try:
            self.penalty  # noqa: B018
        except ValueError:
            return True
        return False

    @rule(seed=seeds)
    def meet_a_gradient_that_is_not_finite(self, seed):
        """The step is refused; buffers are rolled back, gradients show what was wrong."""
        held = {n for group in self.plain.groups for n in group["names"]} - {"unused"}
        if self.rates_differ() or held.isdisjoint(self.plain.trainable):
            return
        chunks, self.closure.chunks = self.closure.chunks, chunks_of(seed, nan=True)
        for group in self.optimizer.param_groups:
            group["error_if_nonfinite"] = True
        before = bits(self.model)
        with pytest.raises(RuntimeError, match="norm is nan"):
            self.optimizer.step(self.closure)
        self.plain_call()
        assert all(close(p.grad, self.plain.grads[n]) for n, p in self.named.items())
        self.plain.rollback()
        assert bits(self.model) == before
        for group in self.optimizer.param_groups:
            group["error_if_nonfinite"] = False
        self.closure.chunks = chunks
        self.own, self.can_assign, self.can_roll_back = {}, False, False
        self.zero_the_gradients(True)

    # --- what changes between steps --------------------------------------------------------------

    @rule(index=somewhere, thaw=st.booleans())
    def freeze_or_thaw(self, index, thaw):
        for name in self.names[index % 3 :: 3]:
            if name != ALWAYS:
                self.named[name].requires_grad_(thaw)
                (self.plain.trainable.add if thaw else self.plain.trainable.discard)(name)

    @precondition(lambda self: len(self.plain.groups) == 1)
    @rule(options=st.sampled_from(OPTIONS), lr=st.sampled_from(RATES), named=st.booleans())
    def add_a_group(self, options, lr, named):
        group = {"lr": lr, **options}
        self.optimizer.add_param_group({"params": [self.named[n] for n in LATE], **group})
        self.plain.groups.append({**group, "names": list(LATE)})

    @rule(index=somewhere, lr=st.sampled_from(RATES), tensor=st.booleans())
    def change_the_learning_rate(self, index, lr, tensor):
        groups = self.optimizer.param_groups
        k = index % len(groups)
        groups[k]["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor else lr
        self.plain.groups[k]["lr"] = lr

    @rule(options=st.sampled_from(OPTIONS), index=somewhere)
    def change_the_rule(self, options, index):
        k = index % len(self.plain.groups)
        self.optimizer.param_groups[k].update(options)
        self.plain.groups[k].update(options)

    @rule(penalty=penalties)
    def change_the_penalty(self, penalty):
        self.penalise(**penalty)

    def penalise(self, method, coefficient, radius, chunk_max_norm, chunk_norms):
        if method == "exact" and self.backward:
            method = "central"
        self.closure.chunk_max_norm, self.closure.chunk_norms = chunk_max_norm, chunk_norms
        self.closure.penalty = method and GradientPenalty(
            method=method, radius=radius, **coefficient
        )

    @rule(flat=st.booleans())
    def flatten(self, flat):
        """The next call moves the parameters, or leaves them where they are."""
        self.closure.flatten_parameters = flat

    @precondition(lambda self: self.plain.drop == 0)
    @rule(count=st.integers(1, 4))
    def change_how_many_chunks_are_worked_on_at_once(self, count):
        self.vectorize = self.closure.vectorize = count

    @rule(seed=seeds, way=st.sampled_from([Chunks, list, tuple]))
    def take_other_chunks(self, seed, way):
        self.closure.chunks = way(chunks_of(seed))

    @rule(index=somewhere, training=st.booleans(), whole=st.booleans())
    def switch_modes(self, index, training, whole):
        names = list(self.plain.modes)
        chosen = names if whole else [names[index % len(names)]]
        if whole:
            self.model.train(training)
        for n in chosen:
            self.model.get_submodule(n).train(training)
            self.plain.modes[n] = training

    @rule(seed=seeds, kind=st.sampled_from(["new tensors", "in place", "state dict"]))
    def replace_buffers(self, seed, kind):
        torch.manual_seed(seed)
        for n, old in list(self.model.named_buffers()):
            value = torch.rand_like(old) + 0.5 if old.is_floating_point() else old + 5
            self.plain.buffers[n] = value.clone()
            if kind == "in place":
                old.copy_(value)
            elif kind == "new tensors":
                layer, _, name = n.rpartition(".")
                setattr(self.model.get_submodule(layer), name, value)
        if kind == "state dict":
            state = self.model.state_dict() | {n: b for n, b in self.plain.buffers.items()}
            self.model.load_state_dict(copy.deepcopy(state))
        self.can_roll_back = False

    @rule(index=somewhere, transpose=st.booleans())
    def move_in_memory(self, index, transpose):
        for name in self.names[index % 4 :: 4]:
            p = self.named[name]
            turn = transpose and p.dim() == 2
            p.data = p.data.t().contiguous().t() if turn else p.data.clone()
        if self.accumulation == "exact" and not self.is_mean:
            self.start_the_sum_over()  # integers do not move: copies of them are refused

    # --- copies and states -----------------------------------------------------------------------

    @rule(way=st.sampled_from(list(COPIES)), seed=seeds)
    def go_on_with_copies(self, way, seed):
        """The originals go on too, and must not reach the copies."""
        held = (self.model, self.optimizer, self.closure, self.accumulator)
        copied = COPIES[way](held)
        if not self.rates_differ():
            self.optimizer.step(self.closure)
            self.accumulator.reset()
        with torch.no_grad():
            for t in itertools.chain(self.model.parameters(), self.model.buffers()):
                t.zero_()
        self.model, self.optimizer, self.closure, self.accumulator = copied
        self.plain.grads = dict.fromkeys(self.names)  # torch copies parameters without
        self.own, self.can_roll_back = {}, False

    @rule()
    def go_through_sgd(self):
        """Its step, from our state; and back."""
        groups = [{"params": list(g["params"])} for g in self.optimizer.param_groups]
        sgd = torch.optim.SGD(groups, lr=1.0)
        sgd.load_state_dict(self.optimizer.state_dict())
        sgd.step()
        self.optimizer.load_state_dict(sgd.state_dict())
        self.plain.step(clipped=False)

    @rule()
    def load_the_closures_state(self):
        state, old = pickle.loads(pickle.dumps(self.closure.state_dict())), self.closure
        self.closure = self.make_closure(old.chunks)
        self.closure.penalty, self.closure.chunk_max_norm = old.penalty, old.chunk_max_norm
        self.closure.chunk_norms = old.chunk_norms
        self.closure.flatten_parameters = old.flatten_parameters
        self.closure.load_state_dict(state)
        self.can_assign = self.can_roll_back = False

    @precondition(
        lambda self: (
            self.accumulation == "exact"
            and not (self.plain.modes["dropout"] and self.plain.drop)
            and self.vectorize == 1  # another order makes other groups
        )
    )
    @rule(seed=seeds)
    def find_the_same_bits_in_another_order(self, seed):
        if self.rates_differ():
            return
        _, _, one, _ = first = copy.deepcopy((self.model, self.optimizer, self.closure, None))
        second = copy.deepcopy(first)
        second[2].chunks = list(reversed(self.chunks))
        losses = [m[2]() for m in (first, second)]
        assert bits(losses[0], one.mean_sqnorm) == bits(losses[1], second[2].mean_sqnorm)
        grads = [[p.grad for p in m[0].parameters()] for m in (first, second)]
        assert bits(grads[0]) == bits(grads[1])
        assert bits(list(first[0].buffers())) == bits(list(second[0].buffers()))

    # --- the accumulator -------------------------------------------------------------------------

    def begin_sum(self) -> None:
        """Let go of gradients that live in the accumulator's memory; begin anew after a mean."""
        for n in self.own:
            self.named[n].grad = self.plain.grads[n] = None
        self.own = {}
        if self.is_mean:
            self.sums.reset()
            self.is_mean = False

    @rule(
        seed=seeds, weight=st.sampled_from([1, 2.5, 0, torch.tensor(3.0)]), every=st.integers(1, 4)
    )
    def add_gradients(self, seed, weight, every):
        self.begin_sum()
        generator = torch.Generator().manual_seed(seed)
        found = {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if i % every == 0
            else None
            for i, (n, p) in enumerate(self.named.items())
        }
        self.accumulator.add(list(found.values()), weight)
        self.sums.add(float(weight), found)

    @rule(
        seed=seeds,
        weight=st.sampled_from([1, 2.5, 0]),
        way=st.sampled_from(["chunk", "backward", "fails before", "fails after"]),
        clear=st.booleans(),
    )
    def add_a_chunk(self, seed, weight, way, clear):
        if clear:
            self.model.zero_grad()
            self.plain.grads, self.own = dict.fromkeys(self.names), {}
        live = [n for n in self.plain.trainable if self.plain.grads[n] is not None]
        chunk = chunks_of(seed)[0]
        if any(n not in self.own for n in live):
            with pytest.raises(ValueError, match="zero_grad"):
                self.accumulate(chunk, weight, "chunk")
            self.begin_sum()
            return
        self.begin_sum()
        if way == "fails before":
            with pytest.raises(Boom):
                self.accumulate(chunk, weight, way)
            return

        def real() -> None:
            if way == "fails after":
                with pytest.raises(Boom):
                    self.accumulate(chunk, weight, way)
            else:
                self.accumulate(chunk, weight, way)

        _, grads = self.run(seed, real, lambda: self.plain.forward(chunk))
        if way != "fails after":
            self.sums.add(weight, grads)

    def accumulate(self, chunk: tuple[Tensor, Tensor], weight: float, way: str) -> None:
        if way == "backward":
            self.accumulator.backward(self.real_loss(chunk), weight)
            return
        with self.accumulator.chunk(weight):
            if way == "fails before":
                raise Boom
            self.real_loss(chunk).backward()
            if way == "fails after":
                raise Boom

    def real_loss(self, chunk: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.model(chunk[0]), chunk[1])

    @rule(to_grad=st.booleans())
    def take_the_mean(self, to_grad):
        if not self.sums.added:
            with pytest.raises(RuntimeError, match="nothing was added"):
                self.accumulator.mean()
            return
        self.settle()
        expected = self.sums.mean()
        for n, mean in zip(self.names, self.accumulator.mean(), strict=True):
            assert close(mean, expected[n]), f"mean of {n}"
        self.is_mean = True
        if to_grad:
            self.accumulator.to_grad()
            self.plain.grads |= expected
            self.own = {n: g for n, g in expected.items() if g is not None}

    def settle(self) -> None:
        """Add all once more where the units of exact sums did not fit."""
        for _ in range(3):
            try:
                self.accumulator.mean()
                return
            except RuntimeError as error:
                assert self.accumulation == "exact" and "units" in str(error)
            for weight, grads in self.sums.added:
                self.accumulator.add(list(grads.values()), weight)
        raise AssertionError("the units never fit")

    @rule(seed=seeds)
    def add_in_passes(self, seed):
        self.model.zero_grad()
        self.plain.grads, self.own = dict.fromkeys(self.names), {}
        for _ in self.accumulator.passes():
            self.sums.reset()
            for chunk in chunks_of(seed):
                _, grads = self.run(
                    seed,
                    lambda chunk=chunk: self.accumulate(chunk, len(chunk[0]), "chunk"),
                    lambda chunk=chunk: self.plain.forward(chunk),
                )
                self.sums.add(len(chunk[0]), grads)
        self.is_mean = False
        self.take_the_mean(to_grad=True)

    @rule()
    def start_the_sum_over(self):
        self.is_mean = True
        self.begin_sum()
        self.accumulator.reset()


@pytest.fixture(autouse=True, scope="module")
def threads(one_thread):
    """Tensors of a few elements."""


TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=RUNS or 15,
    stateful_step_count=40 if RUNS else 25,
    deadline=None,
    derandomize=not RUNS,
    print_blob=True,
)
