"""The same closure with chunks one by one and K at once: what the tests of vectorize= share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fbopt import FullBatchClosure, GradientPenalty

METHODS = (None, "forward", "central", "exact")
TOLERANCE = 1e-12


class Outcome(NamedTuple):
    """What a closure's last call gave."""

    scalars: Tensor
    grads: list[Tensor | None]
    buffers: list[Tensor]
    shown: list[Any]


def chunked(n: int = 24, size: int = 4, shape: tuple[int, ...] = (5,), classes: int = 3) -> list:
    """Pairs of inputs and classes, consecutive slices of one tensor each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp(*extra: nn.Module, width: int = 6) -> nn.Sequential:
    """A network with other layers in its middle."""
    torch.manual_seed(0)
    layers = nn.Linear(5, width), *extra, nn.Tanh(), nn.Linear(width, 3)
    return nn.Sequential(*layers).double()


def penalty_of(method: str | None) -> GradientPenalty | None:
    return method and GradientPenalty(coefficient=0.1, method=method)


def make(model: nn.Module, chunks: Any, loss_fn: Any = F.cross_entropy, **given: Any):
    """A closure; `method` in place of a penalty."""
    if "evaluate" in given:
        loss_fn = None
    given["penalty"] = penalty_of(given.pop("method", None))
    return FullBatchClosure(model, loss_fn, chunks, **given)


def outcome(model: nn.Module, chunks: Any, calls: int = 2, **given: Any) -> Outcome:
    """Call a closure for a copy of the model; what is observed is taken from the last call."""
    model, seen = copy.deepcopy(model), []
    if given.pop("observed", False):
        given["observe"] = lambda *shown: seen.append(tree_leaves(shown))
        given["on_pass_start"] = seen.clear
    closure = make(model, chunks, chunk_norms=True, **given)
    for _ in range(calls):
        loss = closure()
    scalars = torch.stack([loss.double(), closure.mean_sqnorm])
    grads = [p.grad for p in model.parameters()]
    return Outcome(scalars, grads, [b.double() for b in model.buffers()], list(seen))


def require_equal(found: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    """Gradients and buffers as vectors, and each scalar, to this relative distance."""
    assert [g is None for g in found.grads] == [g is None for g in expected.grads]
    for ours, theirs in zip(found.scalars, expected.scalars, strict=True):
        require_close(ours, theirs, tolerance)
    require_close(flat(found.grads), flat(expected.grads), tolerance)
    for ours, theirs in zip(found.buffers, expected.buffers, strict=True):
        require_close(ours, theirs, tolerance)
    close = {"rtol": 1e-10, "atol": 1e-12, "equal_nan": True}
    for ours, theirs in zip(found.shown, expected.shown, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, **close)
            else:
                assert a == b


def require_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.isfinite(), expected.isfinite())
    a, b = found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
    assert (a - b).norm() <= tolerance * b.norm()


def flat(tensors: list[Tensor | None]) -> Tensor:
    found = [t.double().reshape(-1) for t in tensors if t is not None]
    return torch.cat(found) if found else torch.zeros(0)


def require_same(
    model: nn.Module, chunks: Any, count: int = 3, tolerance: float = TOLERANCE, **given: Any
) -> Outcome:
    """One by one and K at once, and their equality."""
    again = chunks if not isinstance(chunks, Callable) else chunks()
    one_by_one = outcome(model, again, **given)
    again = chunks if not isinstance(chunks, Callable) else chunks()
    found = outcome(model, again, vectorize=count, **given)
    require_equal(found, one_by_one, tolerance)
    return found
