"""Bad input is refused with an error that names the argument and the cure, and changes nothing.

Every row of ROWS is tried in the middle of training: a model with BatchNorm and dropout, momentum,
a penalty and a partly filled accumulator. Afterwards all of it is bit for bit what it was, and the
next step has the result that it has without the error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conftest import bits
from torch import Tensor, nn
from torch.nn import Parameter

from fbopt import (
    FullBatchClosure,
    FullBatchGD,
    GradientAccumulator,
    GradientPenalty,
    SharpnessAware,
    clip_grad_norm_,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf
mse = nn.functional.mse_loss


class Loss:
    """Mean squared error, except that call number `at` does something else."""

    def __init__(self) -> None:
        self.at, self.instead, self.calls = -1, None, 0

    def __call__(self, output: Tensor, target: Tensor) -> Any:
        self.calls += 1
        if self.calls == self.at:
            self.at = -1
            return self.instead(output, target)
        return mse(output, target)

    def trap(self, call: int, instead: Callable) -> None:
        self.calls, self.at, self.instead = 0, call, instead


class World:
    """A training that has taken two steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(0.3), nn.Linear(6, 2)
        )
        x, y = torch.randn(20, 4), torch.randn(20, 2)
        self.chunks = list(zip(x.split(8), y.split(8), strict=True))
        self.loss = Loss()
        groups = [{"params": self.model[i].parameters()} for i in (0, 1, 3)]
        self.optimizer = FullBatchGD(
            groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, max_norm=0.5
        )
        # Follows the step: a closure that counted a failed call would go on differently.
        self.penalty = GradientPenalty(coefficient=lambda step: 0.1 / (1 + step))
        self.closure = self.make()
        self.loose = [Parameter(torch.randn(s)) for s in ((3,), (2, 2), (5,))]
        for p in self.loose:
            p.grad = torch.randn_like(p)
        self.accumulator = GradientAccumulator(self.loose)
        self.accumulator.add([p.grad for p in self.loose], weight=2)
        for _ in range(2):
            self.good_step()

    def make(self, **changes: Any) -> FullBatchClosure:
        """A closure on this model; every argument can be another."""
        given = {
            "model": self.model,
            "loss_fn": self.loss,
            "chunks": self.chunks,
            "penalty": self.penalty,
            "optimizer": self.optimizer,
        }
        return FullBatchClosure(**given | changes)

    def good_step(self) -> Tensor:
        torch.manual_seed(7)
        clip_grad_norm_(self.loose, 100.0)
        self.accumulator.add([p.grad for p in self.loose], weight=3)
        return self.optimizer.step(self.closure)

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[-1]

    def step(self, **changes: Any) -> None:
        """A step with another closure."""
        self.optimizer.step(self.make(**changes))

    def step_on(self, *chunks: Any, **changes: Any) -> None:
        """A step that has good chunks first, then these."""
        self.step(chunks=[*self.chunks, *chunks], **changes)

    def step_trapped(self, call: int, instead: Callable, **changes: Any) -> None:
        """A step in which loss_fn does something else at a call (with a penalty two a chunk)."""
        self.loss.trap(call, instead)
        self.step(**changes)

    def step_with_grad(self, grad: Tensor) -> None:
        """A step without a closure; every parameter has a gradient, the last one this."""
        params = list(self.model.parameters())
        for p in params[:-1]:
            p.grad = torch.ones_like(p)
        params[-1].grad = grad
        self.optimizer.step()

    def values(self) -> list:
        """All that training has to lose, as bytes."""
        held = (self.model, self.optimizer, self.loose, [p.grad for p in self.loose])
        counts = (self.accumulator.total_weight, self.closure.step, torch.is_grad_enabled())
        return bits(*held, self.accumulator._sums.views, *counts)

    def addresses(self) -> list[int]:
        held = [*self.model.parameters(), *self.model.buffers(), *self.loose]
        return [t.data_ptr() for t in held]


class Row(NamedTuple):
    name: str
    provoke: Callable[[World], Any]
    error: type[BaseException] | tuple[type[BaseException], ...]
    match: str


def raising(error: BaseException) -> Callable:
    def raise_it(*args: Any) -> None:
        raise error

    return raise_it


def gd(params: Any = None, **options: Any) -> FullBatchGD:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))] if params is None else params
    return FullBatchGD(params, **{"lr": 0.1} | options)


def with_grad(grad: Tensor) -> Parameter:
    p = Parameter(torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device))
    p.grad = grad
    return p


def clip(w: World, grad: Tensor, **options: Any) -> Tensor:
    """Clip good gradients, and this one after them."""
    return clip_grad_norm_([*w.loose, with_grad(grad)], 1e-3, **options)


def views() -> list[Parameter]:
    base = torch.zeros(6)
    return [Parameter(base[:4]), Parameter(base[3:])]


def overlapping_windows() -> Parameter:
    return Parameter(torch.zeros(4).as_strided((3, 2), (1, 1)))


def sparse(*shape: int) -> Tensor:
    return torch.ones(*shape).to_sparse()


class Once:
    """Can be iterated, but hands out one and the same iterator every time."""

    def __init__(self, items: list) -> None:
        self.iterator = iter(items)

    def __iter__(self) -> Iterator:
        return self.iterator


def second_pass_over_one_iterator(w: World) -> None:
    used = Once(w.chunks)
    list(used)
    w.step(chunks=used)


def used_up(w: World) -> Any:
    generator = w.model.parameters()
    list(generator)
    return generator


def meta_model() -> nn.Module:
    return nn.Linear(4, 2, device="meta")


def frozen_model() -> nn.Module:
    return nn.Linear(4, 2).requires_grad_(False)


def frozen_after_making(w: World) -> None:
    model = nn.Linear(4, 2)
    closure = w.make(model=model)
    model.requires_grad_(False)
    w.optimizer.step(closure)


def different_rates(w: World, place: int) -> None:
    with mock.patch.dict(w.optimizer.param_groups[place], lr=0.2):
        w.make(penalty=GradientPenalty(strength=0.5))


def different_rates_later(w: World) -> None:
    closure = w.make(penalty=GradientPenalty(strength=0.5))
    with mock.patch.dict(w.group, lr=0.2):
        w.optimizer.step(closure)


def group_option(**change: Any) -> Callable[[World], None]:
    """A step while the last group has another option."""

    def provoke(w: World) -> None:
        with mock.patch.dict(w.group, change):
            w.optimizer.step(w.closure)

    return provoke


def wrong_buffer(buffer: Callable[[Tensor], Tensor]) -> Callable[[World], None]:
    """A step while the last parameter has another momentum buffer."""

    def provoke(w: World) -> None:
        p = w.group["params"][-1]
        with mock.patch.dict(w.optimizer.state[p], momentum_buffer=buffer(p)):
            w.optimizer.step(w.closure)

    return provoke


@contextlib.contextmanager
def error_if_nonfinite(w: World) -> Iterator[None]:
    """The option, switched on in all groups for a while."""
    groups = w.optimizer.param_groups
    for group in groups:
        group["error_if_nonfinite"] = True
    try:
        yield
    finally:
        for group in groups:
            group["error_if_nonfinite"] = False


def nonfinite_in_closure(value: float) -> Callable[[World], None]:
    def provoke(w: World) -> None:
        w.loss.trap(5, lambda output, target: mse(output, target) * value)
        with error_if_nonfinite(w):
            w.optimizer.step(w.closure)

    return provoke


def nonfinite_grad(w: World) -> None:
    with error_if_nonfinite(w):
        w.step_with_grad(torch.full_like(w.group["params"][-1], NAN))


def first_step(spoil: Callable[[Parameter], None]) -> Callable[[World], None]:
    """The first step of a new optimizer, of two parameters whose second is not what it was."""

    def provoke(w: World) -> None:
        p, q = Parameter(torch.ones(3)), Parameter(torch.ones(4))
        optimizer = FullBatchGD([p, q], lr=0.1, momentum=0.9)
        p.grad, q.grad = torch.ones(3), torch.ones(4)
        spoil(q)
        before = bits(p, q, optimizer)
        try:
            optimizer.step()
        finally:
            assert bits(p, q, optimizer) == before

    return provoke


def other_shape(p: Parameter) -> None:
    p.data = torch.ones(5)


def other_dtype(p: Parameter) -> None:
    p.grad_dtype = None  # any goes
    p.grad = p.grad.double()


def grad_scaler(w: World, *args: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    for p in w.model.parameters():
        p.grad = torch.ones_like(p)
    scaler.scale(torch.ones(()))
    scaler.step(w.optimizer, *args)


def in_inference_mode(w: World) -> None:
    with torch.inference_mode():
        w.optimizer.step(w.closure)


def compiled(w: World) -> nn.Module:
    return torch.compile(nn.Linear(4, 2), backend="eager")


def compiled_part(w: World) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].compile(backend="eager")
    return model


def embedding_step(w: World) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Embedding(5, 2, sparse=True))
    chunk = torch.tensor([1, 3])
    closure = FullBatchClosure(
        model, None, [chunk], evaluate=lambda m, c: m[1](c).sum() + m[0].weight.sum()
    )
    closure()


def add(change: Callable[[list[Tensor]], Any], **options: Any) -> Callable[[World], None]:
    def provoke(w: World) -> None:
        w.accumulator.add(change([torch.ones_like(p) for p in w.loose]), **options)

    return provoke


def last(grad: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list]:
    """The gradients with another last one."""
    return lambda grads: [*grads[:-1], grad(grads[-1])]


OPTIMIZER = [
    Row("params is one tensor", lambda w: gd(w.loose[0]), TypeError, r"params.*\[params\]"),
    Row("params is empty", lambda w: gd([]), ValueError, "empty parameter list"),
    Row("params is a used-up generator", lambda w: gd(used_up(w)), ValueError, "empty parameter"),
    Row("params holds a number", lambda w: gd([1.0]), TypeError, "optimize Tensors"),
    Row("params holds a result", lambda w: gd([w.loose[0] * 2]), ValueError, "non-leaf"),
    Row(
        "params in two groups",
        lambda w: gd([{"params": w.loose}, {"params": w.loose[:1]}]),
        ValueError,
        "more than one parameter group",
    ),
    Row(
        "complex params",
        lambda w: gd([Parameter(torch.ones(2, dtype=torch.complex64))]),
        TypeError,
        r"params\[0\] is torch.complex64.*view_as_real",
    ),
    Row(
        "sparse params",
        lambda w: gd([Parameter(sparse(2, 2))]),
        TypeError,
        r"params\[0\] is sparse.*dense",
    ),
    Row(
        "params on the meta device",
        lambda w: gd(meta_model().parameters()),
        (TypeError, ValueError),
        r"params\[0\].*meta",
    ),
    Row(
        "expanded params",
        lambda w: gd([torch.ones(1).expand(3).requires_grad_()]),
        ValueError,
        r"params\[0\] overlaps itself.*contiguous",
    ),
    Row(
        "params with overlapping windows",
        lambda w: gd([overlapping_windows()]),
        ValueError,
        r"params\[0\] overlaps itself.*contiguous",
    ),
    Row("params that share memory", lambda w: gd(views()), ValueError, r"params\[0\].*\[1\] share"),
    Row("lr is negative", lambda w: gd(lr=-0.1), ValueError, "lr must be at least 0"),
    Row("lr is NaN", lambda w: gd(lr=NAN), ValueError, "lr must be finite"),
    Row("lr is text", lambda w: gd(lr="0.1"), TypeError, "lr must be a number, got str"),
    Row("lr is None", lambda w: gd(lr=None), TypeError, "lr must be a number, got NoneType"),
    Row("lr has two elements", lambda w: gd(lr=torch.ones(2)), ValueError, "lr .*one element"),
    Row("lr is a flag", lambda w: gd(lr=torch.tensor(True)), ValueError, "lr .*real.*torch.bool"),
    Row("lr tensor negative", lambda w: gd(lr=torch.tensor(-1.0)), ValueError, "lr must be at le"),
    Row(
        "momentum tensor negative",
        lambda w: gd(momentum=torch.tensor(-1.0)),
        ValueError,
        "momentum must be at least",
    ),
    Row(
        "differentiable", lambda w: gd(differentiable=True), ValueError, "differentiable.*torch.opt"
    ),
    Row("fused and foreach", lambda w: gd(fused=True, foreach=True), ValueError, "foreach and fus"),
    Row("momentum is negative", lambda w: gd(momentum=-1), ValueError, "momentum must be at least"),
    Row("momentum is NaN", lambda w: gd(momentum=NAN), ValueError, "momentum must be finite"),
    Row("weight_decay is negative", lambda w: gd(weight_decay=-1), ValueError, "weight_decay must"),
    Row("dampening is infinite", lambda w: gd(dampening=INF), ValueError, "dampening must be fin"),
    Row("nesterov without momentum", lambda w: gd(nesterov=True), ValueError, "nesterov.*momentum"),
    Row(
        "nesterov with dampening",
        lambda w: gd(nesterov=True, momentum=0.9, dampening=0.1),
        ValueError,
        "nesterov.*dampening = 0",
    ),
    Row("max_norm is zero", lambda w: gd(max_norm=0), ValueError, "max_norm must be greater"),
    Row("max_norm tensor", lambda w: gd(max_norm=torch.ones(2)), ValueError, "max_norm .*one elem"),
    Row(
        "max_norm tensor zero",
        lambda w: gd(max_norm=torch.zeros(())),
        ValueError,
        "max_norm must be greater",
    ),
    Row("max_norm is NaN", lambda w: gd(max_norm=NAN), ValueError, "max_norm must be finite"),
    Row("norm_type is zero", lambda w: gd(norm_type=0), ValueError, "norm_type must be greater"),
    Row("norm_type is text", lambda w: gd(norm_type="two"), ValueError, "norm_type .*'two'"),
    Row("norm_type is None", lambda w: gd(norm_type=None), TypeError, "norm_type must be a num"),
    Row("norm_type is True", lambda w: gd(norm_type=True), TypeError, "norm_type must be a num"),
    Row(
        "max_norm differs between groups",
        lambda w: gd([{"params": [p], "max_norm": i + 1} for i, p in enumerate(w.loose)]),
        ValueError,
        "max_norm differs between.*one max_norm for all",
    ),
    Row(
        "a new group of complex params",
        lambda w: w.optimizer.add_param_group(
            {"params": [Parameter(torch.ones(2, dtype=torch.complex64))]}
        ),
        TypeError,
        "complex64",
    ),
    Row(
        "a new group that shares memory",
        lambda w: w.optimizer.add_param_group(
            {"params": [Parameter(w.model[0].weight.detach()[0])]}
        ),
        ValueError,
        "share memory.*same Parameter",
    ),
    Row(
        "a new group with another max_norm",
        lambda w: w.optimizer.add_param_group({"params": w.loose, "max_norm": 3.0}),
        ValueError,
        "max_norm differs",
    ),
    Row(
        "a new group with a bad lr",
        lambda w: w.optimizer.add_param_group({"params": w.loose, "lr": -1}),
        ValueError,
        "lr must be",
    ),
    Row(
        "a new group of known params",
        lambda w: w.optimizer.add_param_group({"params": [w.model[0].weight]}),
        ValueError,
        "more than one parameter group",
    ),
    Row(
        "a state dict of another model",
        lambda w: w.optimizer.load_state_dict(gd().state_dict()),
        ValueError,
        "different number of parameter groups",
    ),
]

STEP = [
    Row("lr became NaN", group_option(lr=NAN), ValueError, "lr must be finite"),
    Row("momentum became negative", group_option(momentum=-1), ValueError, "momentum must be"),
    Row("max_norm set in one group", group_option(max_norm=2.0), ValueError, "max_norm differs"),
    Row(
        "the loss in place of a closure",
        lambda w: w.optimizer.step(torch.ones(())),
        TypeError,
        "closure must be callable",
    ),
    Row(
        "a plain closure raises",
        lambda w: w.optimizer.step(raising(LookupError("mine"))),
        LookupError,
        "mine",
    ),
    Row(
        "a sparse gradient",
        lambda w: w.step_with_grad(sparse(2)),
        TypeError,
        "gradient is sparse.*dense",
    ),
    Row("gradient not finite", nonfinite_grad, RuntimeError, "norm is nan.*error_if_nonfinite"),
    Row(
        "gradient of a chunk is NaN",
        nonfinite_in_closure(NAN),
        RuntimeError,
        "norm is nan.*Lower lr or check the data",
    ),
    Row(
        "gradient of a chunk is infinite",
        nonfinite_in_closure(INF),
        RuntimeError,
        "norm is (nan|inf).*error_if_nonfinite",
    ),
    Row(
        "gradient of a former shape",
        first_step(other_shape),
        (RuntimeError, ValueError),
        r"grad.*shape",
    ),
    Row(
        "gradient of another dtype",
        first_step(other_dtype),
        (RuntimeError, ValueError, TypeError),
        r"grad.*(dtype|float64)",
    ),
    Row(
        "momentum buffer of another shape",
        wrong_buffer(lambda p: torch.zeros(7)),
        (RuntimeError, ValueError),
        "momentum_buffer.*(shape|sizes)",
    ),
    Row(
        "momentum buffer of another dtype",
        wrong_buffer(lambda p: torch.zeros_like(p, dtype=torch.float64)),
        (RuntimeError, ValueError, TypeError),
        "momentum_buffer.*(dtype|Double|float64)",
    ),
    Row("a GradScaler", grad_scaler, RuntimeError, r"GradScaler.*autocast=torch.bfloat16"),
    Row(
        "a GradScaler with a closure",
        lambda w: grad_scaler(w, w.closure),
        RuntimeError,
        r"GradScaler.*autocast=torch.bfloat16",
    ),
    Row("inference mode", in_inference_mode, RuntimeError, r"outside torch\.inference_mode"),
]

CLOSURE = [
    Row("model is a function", lambda w: w.make(model=len), TypeError, "model must be.*Module"),
    Row(
        "model without trainable parameters",
        lambda w: w.make(model=frozen_model()),
        ValueError,
        "no parameters that require grad",
    ),
    Row("model frozen later", frozen_after_making, ValueError, "no parameters that require grad"),
    Row(
        "model on the meta device",
        lambda w: w.make(model=meta_model()),
        (TypeError, ValueError),
        "params.*meta",
    ),
    Row(
        "complex model",
        lambda w: w.make(model=nn.Linear(4, 2, dtype=torch.complex64)),
        TypeError,
        "complex64.*view_as_real",
    ),
    Row(
        "lazy model",
        lambda w: w.make(model=nn.LazyLinear(2)),
        (TypeError, ValueError),
        r"params\[0\].*uninitialized",
    ),
    Row("no loss", lambda w: w.make(loss_fn=None), ValueError, "either loss_fn.*or evaluate"),
    Row("two losses", lambda w: w.make(evaluate=len), ValueError, "either loss_fn.*or evaluate"),
    Row("loss_fn is a number", lambda w: w.make(loss_fn=1), TypeError, "loss_fn must be callable"),
    Row(
        "loss_fn is a sum",
        lambda w: w.make(loss_fn=nn.MSELoss(reduction="sum")),
        ValueError,
        "loss_fn has reduction='sum'.*reduction='mean'",
    ),
    Row("observe is a number", lambda w: w.make(observe=1), TypeError, "observe must be callable"),
    Row("weight is a number", lambda w: w.make(weight=8), TypeError, "weight must be callable"),
    Row(
        "chunks is missing", lambda w: w.make(chunks=None), TypeError, "chunks must be an iterable"
    ),
    Row("chunks is a number", lambda w: w.make(chunks=3), TypeError, "chunks must be an iterable"),
    Row(
        "chunks is a generator",
        lambda w: w.make(chunks=(c for c in w.chunks)),
        TypeError,
        "chunks can be iterated only once.*pass a list",
    ),
    Row(
        "chunks is zip",
        lambda w: w.make(chunks=zip(*w.chunks[:2], strict=True)),
        TypeError,
        "chunks can be iterated only once.*pass a list",
    ),
    Row(
        "chunks hands out one iterator",
        second_pass_over_one_iterator,
        (TypeError, ValueError),
        "chunks (is empty|can be iterated only once)",
    ),
    Row("penalty is a number", lambda w: w.make(penalty=0.5), TypeError, "penalty must be a Grad"),
    Row("penalty is a class", lambda w: w.make(penalty=GradientPenalty), TypeError, "penalty must"),
    Row(
        "optimizer is its class", lambda w: w.make(optimizer=FullBatchGD), TypeError, "optimizer m"
    ),
    Row("accumulation", lambda w: w.make(accumulation="half"), ValueError, "accumulation must be"),
    Row(
        "autocast to float32", lambda w: w.make(autocast=torch.float32), ValueError, "autocast must"
    ),
    Row(
        "cuda_graph is text", lambda w: w.make(cuda_graph="yes"), TypeError, "cuda_graph must be T"
    ),
    Row(
        "cuda_graph on the CPU",
        lambda w: w.make(cuda_graph=True),
        ValueError,
        r"cuda_graph=True needs.*one CUDA device.*on cpu.*model\.cuda\(\)",
    ),
    Row(
        "no chunk norm", lambda w: w.make(chunk_max_norm=0), ValueError, "chunk_max_norm must be g"
    ),
    Row(
        "chunk_max_norm is text", lambda w: w.make(chunk_max_norm="1"), TypeError, "chunk_max_norm"
    ),
    Row("chunk_norms is 1", lambda w: w.make(chunk_norms=1), TypeError, "chunk_norms must be True"),
    Row(
        "on_pass_start", lambda w: w.make(on_pass_start=3), TypeError, "on_pass_start must be call"
    ),
    Row(
        "on_pass_start raises",
        lambda w: w.step(on_pass_start=raising(LookupError("mine"))),
        LookupError,
        "mine",
    ),
    Row(
        "assign before anything is accumulated",
        lambda w: w.make().assign(),
        RuntimeError,
        r"call accumulate\(\) first",
    ),
    Row(
        "params is one tensor",
        lambda w: w.make(params=w.loose[0]),
        TypeError,
        r"params.*\[params\]",
    ),
    Row(
        "params holds a name",
        lambda w: w.make(params=["weight"]),
        TypeError,
        r"params\[0\] must be",
    ),
    Row(
        "params that share memory",
        lambda w: w.make(params=views()),
        ValueError,
        r"params\[0\] and params\[1\] share",
    ),
    Row(
        "strength without an optimizer",
        lambda w: w.make(penalty=GradientPenalty(strength=0.5), optimizer=None),
        ValueError,
        "pass optimizer=.*coefficient",
    ),
    *(
        Row(
            f"strength with another rate in group {place}",
            partial(different_rates, place=place),
            ValueError,
            "different learning.*coefficient",
        )
        for place in range(3)
    ),
    Row("two rates later", different_rates_later, ValueError, "different learning.*coefficient"),
    Row(
        "exact on a compiled model",
        lambda w: w.make(model=compiled(w), penalty=GradientPenalty(0.5, method="exact")),
        RuntimeError,
        "method='exact'.*compiled.*'forward'",
    ),
    Row(
        "exact on a model compiled in part",
        lambda w: w.make(model=compiled_part(w), penalty=GradientPenalty(0.5, method="exact")),
        RuntimeError,
        "method='exact'.*compiled.*'forward'",
    ),
]

CALL = [
    Row("no chunks", lambda w: w.step(chunks=[]), ValueError, "chunks is empty"),
    Row(
        "a chunk of no samples",
        lambda w: w.step_on((torch.ones(0, 4), torch.ones(0, 2))),
        ValueError,
        r"chunk 3 is empty.*leave it out",
    ),
    Row(
        "a chunk that is a tensor",
        lambda w: w.step_on(torch.ones(3, 4)),
        TypeError,
        "chunk 3 is no .input, target. pair.*evaluate=",
    ),
    Row("a chunk of three", lambda w: w.step_on((*w.chunks[0], 1)), TypeError, "chunk 3 .*pair"),
    Row("a chunk without tensors", lambda w: w.step_on(("a", "b")), ValueError, "chunk 3.*weight="),
    Row(
        "a chunk without a first dimension",
        lambda w: w.step_on((torch.ones(()), torch.ones(()))),
        ValueError,
        "chunk 3 has no tensor.*weight=",
    ),
    Row(
        "an input that the model refuses",
        lambda w: w.step_on((torch.ones(3, 5), torch.ones(3, 2))),
        RuntimeError,
        "shapes",
    ),
    Row(
        "weight is zero",
        lambda w: w.step(weight=lambda c: 0),
        ValueError,
        "every chunk has weight 0",
    ),
    Row("weight is negative", lambda w: w.step(weight=lambda c: -1), ValueError, "weight.*chunk 0"),
    Row(
        "weight turns NaN",
        lambda w: w.step(weight=lambda c: NAN if len(c[0]) < 8 else 8),
        ValueError,
        "weight.*chunk 2 must be finite",
    ),
    Row("weight is text", lambda w: w.step(weight=lambda c: "8"), TypeError, "weight.*number"),
    Row(
        "weight has two elements",
        lambda w: w.step(weight=lambda c: torch.ones(2)),
        ValueError,
        "weight.*chunk 0 must be a number.*one element",
    ),
    Row(
        "loss per sample",
        lambda w: w.step_trapped(5, lambda o, t: (o - t).square().mean(1)),
        ValueError,
        r"loss_fn returned shape \(4,\) for chunk 2.*mean",
    ),
    Row(
        "loss is a number",
        lambda w: w.step_trapped(3, lambda o, t: mse(o, t).item()),
        TypeError,
        "loss_fn returned float for chunk 1.*0-dim tensor",
    ),
    Row(
        "loss is None",
        lambda w: w.step(loss_fn=None, evaluate=lambda m, c: None),
        TypeError,
        r"evaluate returned NoneType for chunk 0.*\(loss, aux\)",
    ),
    Row(
        "loss is detached",
        lambda w: w.step_trapped(3, lambda o, t: mse(o, t).detach()),
        ValueError,
        "loss of chunk 1 does not depend on any trainable parameter.*detached",
    ),
    Row(
        "loss is detached in the shifted pass",
        lambda w: w.step_trapped(4, lambda o, t: mse(o, t).detach()),
        ValueError,
        "loss of chunk 1 does not depend",
    ),
    Row(
        "loss without gradients",
        lambda w: w.step(loss_fn=None, evaluate=torch.no_grad()(lambda m, c: mse(m(c[0]), c[1]))),
        ValueError,
        "loss of chunk 0 does not depend.*without gradients",
    ),
    Row(
        "loss of no parameter",
        lambda w: w.step(loss_fn=None, evaluate=lambda m, c: c[0].sum()),
        ValueError,
        "loss of chunk 0 does not depend on any trainable",
    ),
    Row(
        "loss_fn raises in a first pass",
        lambda w: w.step_trapped(3, raising(LookupError("mine"))),
        LookupError,
        "mine",
    ),
    Row(
        "loss_fn raises in a shifted pass",
        lambda w: w.step_trapped(4, raising(LookupError("mine"))),
        LookupError,
        "mine",
    ),
    Row(
        "loss_fn raises in a backward shift",
        lambda w: w.step_trapped(
            6,
            raising(LookupError("mine")),
            penalty=GradientPenalty(coefficient=1, method="central"),
        ),
        LookupError,
        "mine",
    ),
    Row(
        "loss_fn raises with an exact penalty",
        lambda w: w.step_trapped(
            2, raising(LookupError("mine")), penalty=GradientPenalty(coefficient=1, method="exact")
        ),
        LookupError,
        "mine",
    ),
    Row(
        "Ctrl-C in a shifted pass",
        lambda w: w.step_trapped(2, raising(KeyboardInterrupt("now"))),
        KeyboardInterrupt,
        "now",
    ),
    Row(
        "loss_fn raises in the closure that goes on",
        lambda w: (w.loss.trap(4, raising(LookupError("mine"))), w.optimizer.step(w.closure)),
        LookupError,
        "mine",
    ),
    Row(
        "observe without aux",
        lambda w: w.step(loss_fn=None, evaluate=lambda m, c: mse(m(c[0]), c[1]), observe=print),
        TypeError,
        r"evaluate returned the loss alone.*return \(loss, aux\)",
    ),
    Row(
        "observe raises",
        lambda w: w.step(observe=raising(LookupError("mine"))),
        LookupError,
        "mine",
    ),
    Row("a sparse gradient", embedding_step, TypeError, r"1\.weight.*sparse.*sparse=False"),
    Row(
        "coefficient function returns NaN",
        lambda w: w.step(penalty=GradientPenalty(coefficient=lambda step: NAN)),
        ValueError,
        "coefficient must be finite",
    ),
    Row(
        "coefficient function returns text",
        lambda w: w.make(penalty=GradientPenalty(coefficient=str)),
        TypeError,
        "coefficient must be a number",
    ),
]

PENALTY = [
    Row(
        "strength negative",
        lambda w: GradientPenalty(-1),
        ValueError,
        "strength must be at least 0",
    ),
    Row("strength NaN", lambda w: GradientPenalty(NAN), ValueError, "strength must be finite"),
    Row("strength text", lambda w: GradientPenalty("0.5"), TypeError, "strength must be a number"),
    Row("radius zero", lambda w: GradientPenalty(radius=0), ValueError, "radius must be greater"),
    Row(
        "radius infinite",
        lambda w: GradientPenalty(radius=INF),
        ValueError,
        "radius must be finite",
    ),
    Row(
        "method", lambda w: GradientPenalty(method="autograd"), ValueError, "method must be one of"
    ),
    Row(
        "coefficient negative",
        lambda w: GradientPenalty(coefficient=-1),
        ValueError,
        "coefficient must be at least 0",
    ),
    Row(
        "coefficient text",
        lambda w: GradientPenalty(coefficient="1"),
        TypeError,
        "coefficient must be a number",
    ),
]


def trapped(w: World, call: int, **rule: Any) -> None:
    """A step of SAM in which a call of loss_fn raises."""
    w.step_trapped(call, raising(LookupError("mine")), penalty=SharpnessAware(**rule))


RULES = [
    Row("power three", lambda w: GradientPenalty(power=3), ValueError, "power must be 1.*got 3"),
    Row("power text", lambda w: GradientPenalty(power="2"), ValueError, "power must be 1.*got '2'"),
    Row("power True", lambda w: GradientPenalty(power=True), ValueError, "power must be 1"),
    Row(
        "full_strength negative",
        lambda w: GradientPenalty(full_strength=-1),
        ValueError,
        "full_strength must be at least 0",
    ),
    Row(
        "full_strength NaN",
        lambda w: GradientPenalty(full_strength=NAN),
        ValueError,
        "full_strength must be finite",
    ),
    Row(
        "full_strength text",
        lambda w: GradientPenalty(full_strength="1"),
        TypeError,
        "full_strength must be a number",
    ),
    Row(
        "full_strength of the norm",
        lambda w: GradientPenalty(power=1, full_strength=1),
        ValueError,
        "full_strength is for the squared norm: pass power=2",
    ),
    Row("rho zero", lambda w: SharpnessAware(0), ValueError, "rho must be greater than 0"),
    Row("rho infinite", lambda w: SharpnessAware(INF), ValueError, "rho must be finite"),
    Row("rho text", lambda w: SharpnessAware("0.1"), TypeError, "rho must be a number"),
    Row(
        "adaptive is a number",
        lambda w: SharpnessAware(adaptive=1),
        TypeError,
        "adaptive must be True or False, got int",
    ),
    Row(
        "adaptive is a scope",
        lambda w: SharpnessAware(0.05, "full"),
        TypeError,
        "adaptive must be True or False, got str",
    ),
    Row("scope", lambda w: SharpnessAware(scope="all"), ValueError, "scope must be one of.*'full'"),
    Row("alpha negative", lambda w: SharpnessAware(alpha=-1), ValueError, "alpha must be at least"),
    Row("alpha NaN", lambda w: SharpnessAware(alpha=NAN), ValueError, "alpha must be finite"),
    Row(
        "SAM by double backward",
        lambda w: SharpnessAware(method="exact"),
        ValueError,
        "method must be one of",
    ),
    Row(
        "eta negative",
        lambda w: SharpnessAware(adaptive=True, eta=-0.1),
        ValueError,
        "eta must be at least 0",
    ),
    Row(
        "eta infinite",
        lambda w: SharpnessAware(adaptive=True, eta=INF),
        ValueError,
        "eta must be finite",
    ),
    Row(
        "eta text",
        lambda w: SharpnessAware(adaptive=True, eta="small"),
        TypeError,
        "eta must be a number",
    ),
    Row(
        "eta without adaptive",
        lambda w: SharpnessAware(eta=0.1),
        ValueError,
        "eta is of the adaptive perturbation: pass adaptive=True",
    ),
    Row(
        "penalty is SharpnessAware itself",
        lambda w: w.make(penalty=SharpnessAware),
        TypeError,
        "penalty must be a GradientPenalty, a SharpnessAware or None, got type",
    ),
    Row(
        "returns",
        lambda w: w.make(returns="both"),
        ValueError,
        "returns must be one of.*'objective'",
    ),
    Row(
        "the objective of SAM",
        lambda w: w.make(penalty=SharpnessAware(), returns="objective"),
        ValueError,
        "pass a GradientPenalty",
    ),
    Row(
        "the objective of clipped chunks",
        lambda w: w.make(chunk_max_norm=1.0, returns="objective"),
        ValueError,
        "leave chunk_max_norm out",
    ),
    Row(
        "double backward in hooks, by all chunks",
        lambda w: w.step(
            penalty=GradientPenalty(coefficient=1, full_strength=1, method="exact"), backward=True
        ),
        ValueError,
        "method='exact' differentiates twice",
    ),
    # Three chunks: with the full scope the calls 1 to 3 are of the visit for G.
    *(
        Row(f"loss_fn raises in call {call} of {rule}", partial(trapped, call=call, **rule), *mine)
        for mine in [(LookupError, "mine")]
        for rule, calls in (
            ({"adaptive": True}, (1, 2)),
            ({"adaptive": True, "method": "central"}, (3, 9)),
            ({"scope": "full"}, (3, 4, 5)),
            ({"scope": "full", "adaptive": True, "method": "central"}, (2, 6, 12)),
        )
        for call in calls
    ),
]

ACCUMULATOR = [
    Row(
        "params is one tensor",
        lambda w: GradientAccumulator(w.loose[0]),
        TypeError,
        r"params must be an iterable.*\[params\]",
    ),
    Row("params is empty", lambda w: GradientAccumulator([]), ValueError, "params is empty"),
    Row(
        "params is a used-up generator",
        lambda w: GradientAccumulator(used_up(w)),
        ValueError,
        "params is empty",
    ),
    Row(
        "params holds a number",
        lambda w: GradientAccumulator([w.loose[0], 1]),
        TypeError,
        r"params\[1\] must be a tensor, got int",
    ),
    Row(
        "params that share memory",
        lambda w: GradientAccumulator(views()),
        ValueError,
        r"params\[0\] and params\[1\] share memory.*same Parameter",
    ),
    Row(
        "params on the meta device",
        lambda w: GradientAccumulator(meta_model().parameters()),
        (TypeError, ValueError),
        r"params\[0\].*meta",
    ),
    Row(
        "accumulation",
        lambda w: GradientAccumulator(w.loose, "float16"),
        ValueError,
        "accumulation must be one of",
    ),
    Row("too few", add(lambda g: g[:-1]), ValueError, "grads has 2 entries for 3.*one each"),
    Row("too many", add(lambda g: [*g, g[0]]), ValueError, "grads has 4 entries for 3"),
    Row("a used-up generator", add(lambda g: iter(())), ValueError, "grads has 0 entries"),
    Row("one tensor", add(lambda g: g[0].sum()), TypeError, "grads must be"),
    Row("another shape", add(last(lambda g: torch.ones(4))), ValueError, r"grads\[2\] has shape"),
    Row("a shape that broadcasts", add(last(lambda g: g[:1])), ValueError, r"grads\[2\] has shape"),
    Row("another dtype", add(last(lambda g: g.double())), ValueError, r"grads\[2\] has dtype"),
    Row("complex", add(last(lambda g: g.cfloat())), ValueError, r"grads\[2\] has dtype.*complex64"),
    Row("the meta device", add(last(lambda g: g.to("meta"))), ValueError, r"\[2\] has device meta"),
    Row("sparse", add(last(lambda g: g.to_sparse())), TypeError, r"grads\[2\] is sparse.*dense"),
    Row("a number", add(last(lambda g: 1.0)), TypeError, r"grads\[2\] must be a tensor or None"),
    Row("weight negative", add(list, weight=-1.0), ValueError, "weight must be at least 0"),
    Row("weight NaN", add(list, weight=NAN), ValueError, "weight must be finite"),
    Row("weight infinite", add(list, weight=INF), ValueError, "weight must be finite"),
    Row("weight a bool", add(list, weight=True), TypeError, "weight must be a number, got bool"),
    Row(
        "weight that exact sums would round",
        lambda w: GradientAccumulator(w.loose, "exact").add([p.grad for p in w.loose], 0.1),
        ValueError,
        "weight is 0.1: .*pass the number of samples",
    ),
    Row(
        "mean of nothing",
        lambda w: GradientAccumulator(w.loose).mean(),
        RuntimeError,
        r"nothing was added.*add\(grads, weight\)",
    ),
]

CLIP = [
    Row(
        "max_norm negative", lambda w: clip_grad_norm_(w.loose, -1), ValueError, "max_norm must be"
    ),
    Row("max_norm NaN", lambda w: clip_grad_norm_(w.loose, NAN), ValueError, "max_norm must be"),
    Row(
        "max_norm text", lambda w: clip_grad_norm_(w.loose, "1"), TypeError, "max_norm must be a n"
    ),
    Row(
        "max_norm tensor negative",
        lambda w: clip_grad_norm_(w.loose, torch.tensor(-1.0)),
        ValueError,
        "max_norm must be at least 0",
    ),
    Row(
        "max_norm tensor of two",
        lambda w: clip_grad_norm_(w.loose, torch.ones(2)),
        ValueError,
        "max_norm .*one element",
    ),
    Row(
        "norm_type zero", lambda w: clip_grad_norm_(w.loose, 1, 0), ValueError, "norm_type must be"
    ),
    Row("norm_type NaN", lambda w: clip_grad_norm_(w.loose, 1, NAN), ValueError, "norm_type must"),
    Row("norm_type True", lambda w: clip_grad_norm_(w.loose, 1, True), TypeError, "norm_type must"),
    Row(
        "norm_type -inf", lambda w: clip_grad_norm_(w.loose, 1, -INF), ValueError, "norm_type must"
    ),
    Row(
        "parameters hold a number",
        lambda w: clip_grad_norm_([*w.loose, 3], 1e-3),
        TypeError,
        r"parameters\[3\] must be a tensor, got int",
    ),
    Row("a sparse gradient", lambda w: clip(w, sparse(3)), TypeError, "gradient 3 is sparse"),
    Row(
        "a complex gradient",
        lambda w: clip(w, torch.ones(3, dtype=torch.complex64)),
        TypeError,
        "gradient 3 is torch.complex64",
    ),
    Row(
        "a gradient on the meta device",
        lambda w: clip(w, torch.ones(3, device="meta")),
        (TypeError, ValueError),
        "gradient 3.*meta",
    ),
    Row(
        "a gradient that overlaps itself",
        lambda w: clip(w, torch.ones(1).expand(3)),
        ValueError,
        "gradient 3 overlaps itself",
    ),
    Row(
        "a gradient that is not finite",
        lambda w: clip(w, torch.full((2,), NAN), error_if_nonfinite=True),
        RuntimeError,
        "norm is nan.*error_if_nonfinite=False lets it pass",
    ),
]


TABLES = {
    "FullBatchGD": OPTIMIZER,
    "step": STEP,
    "FullBatchClosure": CLOSURE,
    "call": CALL,
    "GradientPenalty": PENALTY,
    "SharpnessAware": RULES,
    "GradientAccumulator": ACCUMULATOR,
    "clip_grad_norm_": CLIP,
}
ROWS = [pytest.param(r, id=f"{table}: {r.name}") for table, rows in TABLES.items() for r in rows]


@pytest.fixture(scope="module")
def after_a_good_step(one_thread: None) -> list:
    """What the next step gives where nothing went wrong."""
    world = World()
    return [world.good_step().item(), *world.values()]


def test_the_table_is_long_enough():
    assert len(ROWS) >= 60 and len({p.id for p in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_and_changes_nothing(row: Row, after_a_good_step):
    world = World()
    before, where = world.values(), world.addresses()
    with pytest.raises(row.error, match=f"(?s){row.match}"):
        row.provoke(world)
    for value, now in zip(before, world.values(), strict=True):
        assert now == value
    assert world.addresses() == where
    assert [world.good_step().item(), *world.values()] == after_a_good_step
