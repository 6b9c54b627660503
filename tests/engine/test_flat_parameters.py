"""Parameters in flat buffers: the same bits, whatever else happens to the parameters."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import bits
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt._engine import perturb

PENALTIES = {
    "none": None,
    "forward": GradientPenalty(coefficient=0.1),
    "central": GradientPenalty(coefficient=0.1, method="central"),
    "exact": GradientPenalty(coefficient=0.1, method="exact"),
}


def many(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """More small tensors than are worth packing, with BatchNorm and dropout."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(5)]
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(4, 3)).to(dtype)


def few(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Few tensors, one of them channels_last, which are not packed."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    return nn.Sequential(nn.Unflatten(1, (2, 2, 1)), nn.ZeroPad2d(1), conv, nn.Flatten()).to(dtype)


def chunks_for(dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, 4, generator=generator).to(dtype)
    y = torch.randint(3, (14,), generator=generator)
    return list(zip(x.split(6), y.split(6), strict=True))


def lie_flat(params: list) -> bool:
    """Whether each begins where the one before it ends."""
    pairs = itertools.pairwise(params)
    return all(p.data_ptr() + p.nbytes == q.data_ptr() for p, q in pairs)


def train(model: nn.Module, flat: bool, steps: int = 3, **options) -> tuple:
    optimizer = FullBatchGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
    dtype = next(model.parameters()).dtype
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks_for(dtype), flatten_parameters=flat, **options
    )
    torch.manual_seed(5)
    losses = [optimizer.step(closure) for _ in range(steps)]
    return bits(model, optimizer, losses, [p.grad for p in model.parameters()]), closure.mean_sqnorm


@pytest.mark.parametrize("accumulation", ["float32", "exact"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("make", [many, few])
def test_the_bits_of_parameters_that_lie_anywhere(make, penalty, accumulation, backend):
    options = {"penalty": PENALTIES[penalty], "accumulation": accumulation, "chunk_max_norm": 0.5}
    assert train(make(), True, **options) == train(make(), False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    options = {"penalty": PENALTIES["forward"]}
    assert train(many(dtype), True, **options) == train(many(dtype), False, **options)


def test_the_parameters_are_moved_with_values_and_strides():
    model = few()
    before = [(p, p.detach().clone(), p.stride()) for p in model.parameters()]
    FullBatchClosure(model, F.cross_entropy, chunks_for(), flatten_parameters=True)
    weight, bias = model.parameters()
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    for p, (same, value, stride) in zip(model.parameters(), before, strict=True):
        assert p is same and torch.equal(p, value) and p.stride() == stride and p.requires_grad


def test_tied_frozen_and_other_dtypes():
    """Each dtype has a buffer; frozen ones stay where they are; a tied one is moved once."""
    model = many()
    model.add_module("again", model[0][0])
    model[1][0].weight.requires_grad_(False)
    model.extra = nn.ParameterList(torch.ones(3) for _ in range(20))
    frozen = model[1][0].weight.data_ptr()

    def evaluate(model: nn.Module, chunk: tuple) -> torch.Tensor:
        x, y = chunk
        return F.cross_entropy(model.again(model[:7](x)[:, :1] + x), y) + sum(map(sum, model.extra))

    closure = FullBatchClosure(
        model, None, chunks_for(), evaluate=evaluate, penalty=PENALTIES["forward"],
        flatten_parameters=True,
    )  # fmt: skip
    closure()
    assert model.again.weight is model[0][0].weight and model[1][0].weight.data_ptr() == frozen
    assert lie_flat(list(model.extra))
    assert lie_flat([p for p in model.parameters() if p.requires_grad and p.dtype == torch.float64])


BREAKS = {
    "to": lambda model: model.to(torch.float32).to(torch.float64),
    "data": lambda model: setattr(model[0][0].weight, "data", model[0][0].weight.detach().clone()),
    "assigned": lambda model: model.load_state_dict(
        {k: v.clone() for k, v in model.state_dict().items()}, assign=True
    ),
    "frozen": lambda model: model[2][0].weight.requires_grad_(False),
    "another": lambda model: setattr(model[0][0], "bias", nn.Parameter(torch.ones(4).double())),
}


@pytest.mark.parametrize("how", BREAKS)
def test_parameters_that_something_else_moves_are_moved_back(how):
    found = []
    for flat in (True, False):
        model, chunks = many(), chunks_for()
        closure = FullBatchClosure(
            model, F.cross_entropy, chunks, penalty=PENALTIES["forward"], flatten_parameters=flat
        )
        torch.manual_seed(5)
        closure()
        BREAKS[how](model)
        found.append([closure(), [p.grad for p in model.parameters()]])
        trained = [p for p in model.parameters() if p.requires_grad]
        assert lie_flat(trained) == flat
        where = [p.data_ptr() for p in model.parameters()]
        found[-1].append(closure())
        assert [p.data_ptr() for p in model.parameters()] == where
    assert bits(*found[0]) == bits(*found[1])


def test_switched_on_and_off_between_calls():
    model = many()
    closure = FullBatchClosure(model, F.cross_entropy, chunks_for(), penalty=PENALTIES["central"])
    model.eval()
    wanted = bits(closure(), [p.grad for p in model.parameters()])
    for flat in (True, False, True):
        closure.flatten_parameters = flat
        assert bits(closure(), [p.grad for p in model.parameters()]) == wanted
        assert lie_flat(list(model.parameters()))
    closure.flatten_parameters = 1
    with pytest.raises(TypeError, match="flatten_parameters must be True or False"):
        closure()


def test_the_buffer_is_written_in_place_and_copied_back():
    """An alias of the memory sees the perturbed values, as the pass does."""
    model, seen = many(), []
    weight = model[0][0].weight
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks_for(), penalty=PENALTIES["forward"], flatten_parameters=True
    )
    alias, before = weight.detach(), weight.detach().clone()
    model[0].register_forward_hook(lambda *_: seen.append(torch.equal(alias, before)))
    closure()
    assert seen == [True, False] * 3 and torch.equal(alias, before)
    assert alias.data_ptr() == weight.data_ptr()


class Stop(BaseException):
    """As an interrupt from the keyboard."""


@pytest.mark.parametrize("flat", [True, False])
def test_an_interrupt_in_the_middle_of_a_restoration(flat):
    """At every line of the file that perturbs parameters, and at its second visit."""
    model = many()
    model.eval()
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks_for(), penalty=PENALTIES["central"], flatten_parameters=flat
    )
    wanted = bits(closure(), [p.grad for p in model.parameters()])
    before = bits(model)
    stopped = 0
    for moment in itertools.count():
        left = [moment]

        def trace(frame, event, arg, left=left):
            if frame.f_code.co_filename != perturb.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == -1:
                    raise Stop
            return trace

        sys.settrace(trace)
        try:
            closure()
        except Stop:
            stopped += 1
        finally:
            sys.settrace(None)
        assert bits(model) == before
        if left[0] >= 0:
            break
    assert stopped > 40
    assert bits(closure(), [p.grad for p in model.parameters()]) == wanted


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_raises(error):
    model = many()
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks_for(), penalty=PENALTIES["forward"], flatten_parameters=True
    )
    before, calls = bits(model), []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    model[3].register_forward_hook(fail)
    with pytest.raises(error):
        closure()
    assert bits(model) == before


def test_state_dicts_copies_and_pickles():
    model = many()
    closure = FullBatchClosure(
        model, F.cross_entropy, chunks_for(), penalty=PENALTIES["forward"], flatten_parameters=True
    )
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 12_000  # the buffer once, not once for each parameter
    other = many()
    nn.init.zeros_(other[0][0].weight)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert bits(other) == bits(model)
    where = [p.data_ptr() for p in model.parameters()]
    model.load_state_dict(many().state_dict())
    assert [p.data_ptr() for p in model.parameters()] == where
    torch.manual_seed(5)
    wanted = bits(closure(), [p.grad for p in model.parameters()])
    for twin, run in (
        copy.deepcopy((model, closure)),
        pickle.loads(pickle.dumps((model, closure))),
    ):
        twin.load_state_dict(many().state_dict())
        torch.manual_seed(5)
        assert bits(run(), [p.grad for p in twin.parameters()]) == wanted
        assert lie_flat(list(twin.parameters()))
        own = {p.data_ptr() for p in twin.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in model.parameters())


def test_a_buffer_that_shares_the_memory_of_a_parameter_is_refused():
    model = many()
    model.register_buffer("shadow", model[0][0].weight.detach())
    where = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match="buffer shadow shares the memory of one"):
        FullBatchClosure(model, F.cross_entropy, chunks_for(), flatten_parameters=True)
    assert [p.data_ptr() for p in model.parameters()] == where


def test_parameters_that_share_memory_are_refused():
    """To move them would untie them: a frozen one that follows another, or two tied by .data."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach(), requires_grad=False)
    chunks = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="share memory but are different tensors"):
        FullBatchClosure(model, F.cross_entropy, chunks, flatten_parameters=True)
    FullBatchClosure(model, F.cross_entropy, chunks)()
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    closure = FullBatchClosure(model, F.cross_entropy, chunks, flatten_parameters=True)
    model[2].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match="share memory but are different tensors"):
        closure()
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
