"""The gradient of a chunk as a function of parameters, buffers, the chunk's tensors and G, which
``torch.func.vmap`` turns into that of K chunks, and ``torch.compile`` compiles.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fbopt._direction import Direction
from fbopt._engine.autograd_graph import leaves
from fbopt._engine.chunk_groups import Stack, Template
from fbopt._engine.conv1d import Conv1dAsProduct
from fbopt._engine.forward import ChunkLoss
from fbopt._engine.perturb import potential
from fbopt._engine.shared_state import Place

Tensors = tuple[Tensor, ...]
_numbers = itertools.count()


class Passes(NamedTuple):
    """What the first passes over K chunks give, each with a leading dimension K.

    Attributes:
        grads: the gradients by the parameters, zeros where a parameter is not used.
        loss: (K,).
        shown: the tensors in what the loss function shows besides the loss.
        recorded: the buffers that the passes have written to.
        products: H v, if asked for.
    """

    grads: Tensors
    loss: Tensor
    shown: Tensors
    recorded: Tensors
    products: Tensors = ()


class _Loss(nn.Module):
    """The loss around the model, in which ``functional_call`` replaces parameters and buffers."""

    def __init__(self, forward: ChunkLoss, recorded: Sequence[Place]) -> None:
        super().__init__()
        self.model, self._loss, self._recorded = forward.model, forward, recorded

    def forward(self, chunk: Any, shows: bool) -> tuple[Tensor, Tensors, Tensors]:
        loss, shown, _ = self._loss.compute(0, chunk)
        tensors = [x for x in tree_leaves(shown) if isinstance(x, Tensor)] if shows else []
        return loss, tuple(tensors), tuple(getattr(m, name) for m, name in self._recorded)


class ChunkFunction:
    """First and further passes over K chunks at once, K >= 1.

    Args:
        forward: the loss of a chunk.
        params: what gradients are by, parameters of the model.
        recorded: the buffers that a pass over a chunk writes to, each chunk to its own copy.
        direction: v, for first passes that also give H v; None for others.
        shows: whether they also give what the loss shows.
        compiled: whether passes are compiled.

    Attributes:
        compiled: as given.
        functions: those that were made, by kind of chunk.
        ran: which compiled graph ran last: others may use other parameters.

    Raises:
        ValueError: a tensor in `params` is no parameter of the model.
    """

    def __init__(
        self,
        forward: ChunkLoss,
        params: Sequence[Tensor],
        recorded: Sequence[Place],
        *,
        direction: Direction | None,
        shows: bool,
        compiled: bool,
    ) -> None:
        self._module = _Loss(forward, recorded)
        self._direction, self._shows, self.compiled = direction, shows, compiled
        self._params, self._names = params, _names(self._module, params)
        self._buffers = _buffer_names(self._module, recorded)
        self.functions: dict[Hashable, Callable[..., Any]] = {}
        self.ran = 0
        self._guarded: set[Hashable] = set()
        self._alone = False

    def begin(self, alone: bool) -> None:
        """Begin a call of the closure, between which Python values may have changed.

        With `alone` no code of the user runs between its groups, which could change them, too.
        """
        self._guarded.clear()
        self._alone = alone

    def first(self, params: Tensors, buffers: Tensors, stack: Stack, whole: Tensors = ()) -> Passes:
        """The passes at `params`, which all chunks share; G where v has a share of it."""
        return Passes(*self._call("first", params, buffers, stack, whole))

    def gradient(self, params: Tensors, buffers: Tensors, stack: Stack) -> Passes:
        """The passes at K points: `params` have a leading dimension K."""
        return Passes(*self._call("gradient", params, buffers, stack))

    def by_copies(self, buffers: Tensors, chunk: Any) -> tuple[Tensor, list[int]]:
        """A chunk's loss by copies of the parameters, without torch.func; which it takes others of.

        The functions would see neither the gradients of such ones nor their shifted values.
        """
        copies = tuple(p.detach().requires_grad_() for p in self._params)
        given = *copies, *(b[0] for b in buffers)
        state = dict(zip((*self._names, *self._buffers), given, strict=True))
        with torch.enable_grad():
            loss, *_ = functional_call(self._module, state, (chunk, False))
        used = set(map(id, leaves(loss)))
        return loss.detach(), [i for i, p in enumerate(self._params) if id(p) in used]

    def _call(
        self, which: str, params: Tensors, buffers: Tensors, stack: Stack, whole: Tensors = ()
    ) -> Any:
        made = which
        if stack.count == 1:  # the passes at any point are one function, which is compiled once
            made, params = "first", params if which == "first" else tuple(p[0] for p in params)
        key = made, stack.count, stack.dims, stack.template
        if key not in self.functions:
            self.functions[key] = self._make(made == "first", stack)
        function, given = self.functions[key], (params, buffers, stack.tensors, whole)
        if not self.compiled:
            return function(*given)
        layout = which, key, *((t.shape, t.stride()) for t in stack.tensors)
        # Leaving guards out is a setting of the process: other threads would leave theirs out, too.
        if not self._alone or layout not in self._guarded or threading.active_count() > 1:
            result = function(*given)
            self._guarded.add(layout)
            return result
        # Guards compare all that Python code has read, and may take as long as a small model: once
        # in a call of the closure for each function and layout.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            return function(*given)

    def _make(self, is_first: bool, stack: Stack) -> Callable[..., Any]:
        function = self._one_chunk(stack.template, is_first)
        if stack.count > 1:
            dims = (None if is_first else 0, 0, stack.dims, None)
            function = vmap(function, in_dims=dims, randomness="different")
        if self.compiled:
            function = torch.compile(_apart(function), fullgraph=True, backend=self._compile_graph)
        return function if stack.count > 1 else _with_leading_dimension(function)

    def _compile_graph(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile what torch.compile has traced, and let it note that it ran."""
        from torch._inductor.compile_fx import compile_fx  # takes a second, and needs a compiler

        # Eager draws, so that those of passes at other points, other code, are the same. Graphs of
        # its own would overwrite the results of the pass before.
        options = {"fallback_random": True, "triton.cudagraphs": False}
        compiled, number = compile_fx(graph, inputs, config_patches=options), next(_numbers)

        def run(*given: Any) -> Any:
            self.ran = number
            return compiled(*given)

        return run

    def _one_chunk(self, template: Template, is_first: bool) -> Callable[..., Any]:
        module, names = self._module, (*self._names, *self._buffers)
        shows = self._shows and is_first

        def value(params: Tensors, buffers: Tensors, tensors: Tensors) -> tuple[Tensor, Any]:
            state = dict(zip(names, (*params, *buffers), strict=True))
            given = template.fill(tensors), shows
            with Conv1dAsProduct() if self.compiled else nullcontext():
                loss, shown, recorded = functional_call(module, state, given)
            return loss, (shown, recorded)

        gradient = grad_and_value(value, has_aux=True)

        def passes(*given: Tensors) -> tuple[Any, ...]:
            grads, (loss, (shown, recorded)) = gradient(*given[:3])
            return grads, loss, shown, recorded

        def curved(*given: Tensors) -> tuple[Tensor, Any]:
            found = passes(*given)
            whole = given[3] or [None] * len(found[0])
            return potential(found[0], whole, self._direction), found

        def with_products(*given: Tensors) -> tuple[Any, ...]:
            products, (_, found) = grad_and_value(curved, has_aux=True)(*given)
            return *found, products

        return passes if self._direction is None or not is_first else with_products


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own, by which torch.compile counts recompilations."""

    def run(params: Tensors, buffers: Tensors, tensors: Tensors, whole: Tensors) -> Any:
        return function(params, buffers, tensors, whole)

    code = run.__code__.replace(co_name=f"chunks_{next(_numbers)}")
    return FunctionType(code, run.__globals__, closure=run.__closure__)


def _with_leading_dimension(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one chunk with the results of one of K = 1 chunks."""

    def run(params: Tensors, buffers: Tensors, *rest_given: Tensors) -> tuple[Any, ...]:
        grads, loss, *rest = function(params, tuple(b[0] for b in buffers), *rest_given)
        add = [tuple(t.unsqueeze(0) for t in group) for group in (grads, *rest)]
        return add[0], loss.unsqueeze(0), *add[1:]

    return run


def _names(module: nn.Module, params: Sequence[Tensor]) -> list[str]:
    names = {id(p): name for name, p in module.named_parameters()}
    for i, p in enumerate(params):
        if id(p) not in names:
            raise ValueError(
                f"params[{i}] of shape {tuple(p.shape)} is no parameter of the model: vectorize= "
                "and compile= differentiate by parameters of the model alone, pass vectorize=1 and "
                "compile=False"
            )
    return [names[id(p)] for p in params]


def _buffer_names(module: nn.Module, places: Sequence[Place]) -> list[str]:
    names = {id(b): name for name, b in module.named_buffers()}
    return [names[id(getattr(m, name))] for m, name in places]
