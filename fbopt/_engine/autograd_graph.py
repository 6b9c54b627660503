"""The autograd graph of a loss, and what it loses without a word: a first backward pass that leaves
no graph for the second, H v = d(g.v)/d(theta), and layers that ``autograd.grad`` does not reach.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

Recompute = Callable[[], AbstractContextManager[Tensor]]
CURE = "use method='forward' or 'central'"
CHECKPOINT_CURE = (
    "pass use_reentrant=False to torch.utils.checkpoint (in transformers "
    "gradient_checkpointing_enable({'use_reentrant': False})), or backward=True to FullBatchClosure"
)


def nodes(loss: Tensor) -> Iterator[Any]:
    """Iterate over the nodes of a loss's graph, in an order that follows from the graph alone."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def dtypes(loss: Tensor) -> set[torch.dtype]:
    """The dtypes of what was computed from the parameters: under autocast, wherever it began."""
    found = {meta.dtype for node in nodes(loss) for meta in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point}


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that ``loss.backward()`` gives a gradient, but those inside checkpoints."""
    found = [getattr(node, "variable", None) for node in nodes(loss)]
    return [variable for variable in found if variable is not None]


def refuse_unreached(loss: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Refuse reentrant checkpoints where parameters got no gradient: theirs may lie inside.

    One that no parameter feeds does not run, and so does not refuse ``autograd.grad`` itself.
    """
    missing = type(None) in map(type, grads)
    if missing and any(n.name() == "CheckpointFunctionBackward" for n in nodes(loss)):
        raise RuntimeError(
            "the model uses reentrant checkpointing, and torch.autograd.grad does not reach the "
            f"parameters inside: {CHECKPOINT_CURE}"
        )


@contextlib.contextmanager
def hint_at_checkpoints() -> Iterator[None]:
    """Say what to do where reentrant checkpointing refuses ``torch.autograd.grad``."""
    try:
        yield
    except RuntimeError as error:
        if "heckpoint" not in str(error) or ".grad()" not in str(error):
            raise
        raise RuntimeError(
            "the model uses reentrant checkpointing, which works with loss.backward() alone: "
            f"{CHECKPOINT_CURE}"
        ) from error


class SecondBackward:
    """Finds custom functions of a loss whose backward pass leaves no graph to differentiate again.

    Make it before the gradients are taken with ``create_graph=True``, and :meth:`check` after. A
    vector-Jacobian product is linear in the vector: if the vector has a graph, and the product is
    not zero and has none, a derivative is lost for certain. If the vector has none either, as for
    a loss function, the product is right without a graph only if it does not depend on theta.

    Raises:
        RuntimeError: a function that is marked ``once_differentiable``, or of torch's own whose
            second derivative is known to be wrong.
    """

    def __init__(self, loss: Tensor) -> None:
        self._lost: dict[int, _Lost] = {}
        for index, node in enumerate(nodes(loss)):
            _refuse_known(node)
            if isinstance(node, BackwardCFunction) or node.name().startswith(
                "torch::autograd::Cpp"
            ):
                node.register_hook(functools.partial(self._note, index, function_name(node)))

    def _note(self, index: int, name: str, results: Sequence[Any], vectors: Sequence[Any]) -> None:
        lost = [t.detach() for t in results if isinstance(t, Tensor) and t.grad_fn is None]
        if lost and torch.is_grad_enabled():
            certain = any(isinstance(v, Tensor) and v.grad_fn is not None for v in vectors)
            self._lost[index] = _Lost(name, certain, lost)

    def check(self, params: Sequence[Tensor], recompute: Recompute) -> None:
        """Raise RuntimeError if a derivative was lost.

        Args:
            params: what the gradients are by.
            recompute: a context that gives the loss at other parameters, with its graph; entered
                only where the first pass leaves a doubt.
        """
        suspects = {i: x for i, x in self._lost.items() if any(map(torch.count_nonzero, x.results))}
        self._lost = {}
        for lost in suspects.values():
            if lost.certain:
                raise RuntimeError(_message(lost.name))
        if not suspects:
            return
        with recompute() as loss:
            other = SecondBackward(loss)
            torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        for i, lost in suspects.items():
            now = other._lost.get(i)
            if now is not None and now.name == lost.name and not _equal(now.results, lost.results):
                raise RuntimeError(_message(lost.name))


class _Lost(NamedTuple):
    """Results of a function's backward pass that have no graph."""

    name: str
    certain: bool
    results: list[Tensor]


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def function_name(node: Any) -> str:
    """The name of the function that a node of the graph is the backward pass of."""
    function = getattr(node, "_forward_cls", None)
    return node.name() if function is None else function.__qualname__


def _message(name: str) -> str:
    return (
        f"method='exact' differentiates twice, but the backward pass of {name} leaves no graph (it "
        "computes with detached tensors, in torch.no_grad() or outside of torch), so that second "
        f"derivatives would be lost: {CURE}"
    )


def _refuse_known(node: Any) -> None:
    if node.name().startswith("WeightNormInterfaceBackward") and _is_weight_norm_wrong():
        raise RuntimeError(
            f"method='exact' differentiates twice, which torch does wrongly for weight_norm: {CURE}"
        )
    function = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while function is not None:
        if getattr(function, "__code__", None) is _ONCE:
            raise RuntimeError(
                f"method='exact' differentiates twice, but {function_name(node)} is marked "
                f"once_differentiable: {CURE}"
            )
        function = getattr(function, "__wrapped__", None)


_ONCE = once_differentiable(lambda ctx: None).__code__


@functools.cache
def _is_weight_norm_wrong() -> bool:
    """Whether torch's second derivative of v / |v| differs from that by elementary operations."""
    v = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    g = torch.ones(1, 1, dtype=torch.float64)
    found = []
    with torch.enable_grad():
        for w in (torch._weight_norm(v, g, 0), v / v.square().sum().sqrt()):
            (first,) = torch.autograd.grad(w[0, 0], v, create_graph=True)
            found += torch.autograd.grad(first.square().sum(), v)
    return not torch.allclose(*found)


@contextlib.contextmanager
def naming_methods() -> Iterator[None]:
    """Let errors of a second backward pass name the methods that would work."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        lines = str(error).splitlines() or [""]
        raise RuntimeError(
            f"method='exact' differentiates twice, which failed ({lines[0]}): {CURE}"
        ) from error
