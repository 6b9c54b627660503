"""A group's chunks one by one, in the first call, before they are worked on at once: their checks,
and whether both ways give the same.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from fbopt._engine.chunk import ChunkGradient
from fbopt._engine.chunk_groups import Group, Stack
from fbopt._engine.functional import Passes
from fbopt._engine.snapshot import GeneratorSnapshot

# How far losses, and a gradient, may be from those one by one, as a share: rounding, which grows
# where terms cancel. More than this is another computation.
LOSS_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 0.1}
HALF = 0.1


@dataclass(frozen=True)
class Kind:
    """What all groups of a kind of chunks have in common.

    Attributes:
        seen: the indices of the parameters that get a gradient.
        shown: the structure of what the loss function shows besides the loss; None if nobody looks.
        places: where in it the tensors are.
    """

    seen: frozenset[int]
    shown: TreeSpec | None = None
    places: tuple[int, ...] = ()

    def shown_by(self, stack: Stack, passes: Passes, evaluates: bool) -> Iterator[tuple[Any, Any]]:
        """For each chunk what ``observe`` is called with."""
        for k in range(stack.count):
            leaves: list[Any] = [None] * self.shown.num_leaves
            for place, shown in zip(self.places, passes.shown, strict=True):
                leaves[place] = shown[k].detach()
            chunk = tree_map_only(Tensor, Tensor.detach, stack.chunk(k))
            yield tree_unflatten(leaves, self.shown), chunk if evaluates else chunk[1]


class Probe:
    """The first chunk of a group by itself, with its gradient, and the losses of the others.

    Buffers and random generators are afterwards as before.

    Raises:
        RuntimeError: the model writes to buffers that chunks would share.
        TypeError: what is observed is no tensor.
    """

    def __init__(
        self,
        work: ChunkGradient,
        group: Group,
        stack: Stack,
        draws: GeneratorSnapshot,
        observed: bool,
    ) -> None:
        self._work, self._group = work, group
        shown: list[Any] = []
        watch = (lambda *found: shown.append(found[0])) if observed else None
        draws.begin()
        with work.in_passing(draws):
            before = _buffers(work)
            pairs = list(zip(group.indices, group.weights, strict=True))
            (index, weight), *others = pairs
            self.loss, self.grads = work.probe(index, stack.chunk(0), weight, draws, watch)
            _refuse_writes(before, work)
            self.draws = draws.has_moved()
            for k, (index, weight) in enumerate(others, start=1):
                work.probe_loss(index, stack.chunk(k), weight)
        seen = frozenset(i for i, g in enumerate(self.grads) if g is not None)
        self.kind = Kind(seen, *_structure(group, shown[0])) if observed else Kind(seen)

    def compare(self, passes: Passes) -> None:
        """Raise RuntimeError if the first chunk's loss or gradient is another one now."""
        params = self._work.sums.params
        names = {id(p): name for name, p in self._work.forward.model.named_parameters()}
        kept = [(i, g) for i, g in enumerate(self.grads) if g is not None]
        for i, g in kept:
            if not passes.grads[i][0].any() and g.any():
                raise self._differs(
                    f"no gradient reaches {names.get(id(params[i]), 'a parameter')}"
                )
        if self.draws:  # the masks of dropout are others
            return
        half = self._work.forward.autocast is not None or self.loss.dtype not in LOSS_TOLERANCE
        tolerance = HALF if half else LOSS_TOLERANCE[self.loss.dtype]
        if not torch.isclose(passes.loss[0], self.loss, tolerance, tolerance, equal_nan=True):
            raise self._differs(f"its loss is {passes.loss[0]:.6g} rather than {self.loss:.6g}")
        if half or not all(torch.isfinite(g).all() for _, g in kept):
            return
        off = torch.stack([(passes.grads[i][0] - g).double().square().sum() for i, g in kept])
        size = torch.stack([g.double().square().sum() for _, g in kept])
        if off.sum().sqrt() > GRADIENT_TOLERANCE[self.loss.dtype] * size.sum().sqrt():
            raise self._differs("its gradient is another one")

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"chunk {self._group.indices[0]} gives something else together with others than by "
            f"itself: {how}; the model, or a layer in it, does not compute each chunk on its own "
            "under torch.func.vmap (recurrent layers, caches, custom functions): pass vectorize=1"
        )


def compare_draws(group: Group, first: Tensor, again: Tensor) -> None:
    """Raise RuntimeError if two passes over a group at the same parameters differ."""
    tolerance = LOSS_TOLERANCE.get(first.dtype, HALF)
    if not torch.allclose(first, again, tolerance, tolerance, equal_nan=True):
        raise RuntimeError(
            f"{group.where} together draw other random numbers in the passes at perturbed "
            "parameters than in the first passes, so that their difference would be noise: pass "
            "vectorize=1"
        )


@contextlib.contextmanager
def explained(
    work: ChunkGradient, group: Group, stack: Stack, draws: GeneratorSnapshot
) -> Iterator[None]:
    """Say what to do where chunks cannot be worked on at once; check that buffers stay in place."""
    before = _buffers(work)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _put_back(before)
        if type(error) is RuntimeError and "vectorize=1" in str(error):
            raise
        draws.rewind()
        Probe(work, group, stack, draws, observed=False)  # raises if a chunk by itself fails, too
        raise RuntimeError(
            f"{group.where} cannot be worked on at once by torch.func.vmap{_inside(error, work)}: "
            f"{type(error).__name__}: {_first_line(error)}; without vmap all of PyTorch works: "
            "pass vectorize=1"
        ) from error
    _refuse_writes(before, work)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _inside(error: Exception, work: ChunkGradient) -> str:
    """The innermost module of the model in which an error was raised."""
    names = {id(m): name for name, m in work.forward.model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = f" ({type(module).__name__} {names[id(module)]})"
    return found


Held = list[tuple[nn.Module, str, Tensor, int]]


def _buffers(work: ChunkGradient) -> Held:
    """Buffers that no pass may write to, as all chunks of a group share them."""
    recorded = {(id(m), name) for m, name in work.statistics.recorded}
    return [
        (m, name, b, b._version)
        for m in work.forward.model.modules()
        for name, b in m._buffers.items()
        if b is not None and (id(m), name) not in recorded
    ]


def _refuse_writes(before: Held, work: ChunkGradient) -> None:
    for module, name, buffer, version in before:
        if module._buffers.get(name) is buffer and buffer._version == version:
            continue
        _put_back(before)
        names = {id(m): n for n, m in work.forward.model.named_modules()}
        path = f"{names[id(module)]}.{name}".lstrip(".")
        raise RuntimeError(
            f"{type(module).__name__} writes to its buffer {path} when it runs, and each chunk "
            "begins with what the one before has left there: chunks that are worked on at once "
            "cannot; pass vectorize=1"
        )


def _put_back(before: Held) -> None:
    for module, name, buffer, _ in before:
        module._buffers[name] = buffer


def _structure(group: Group, shown: Any) -> tuple[TreeSpec, tuple[int, ...]]:
    leaves, structure = tree_flatten(shown)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and leaf is not None:
            raise TypeError(
                f"what is observed of chunk {group.indices[0]} holds a {type(leaf).__name__}: with "
                "vectorize= or compile= an output, or aux of evaluate, is made of tensors alone; "
                "take it from the chunk in observe, or pass vectorize=1"
            )
    return structure, tuple(i for i, leaf in enumerate(leaves) if leaf is not None)
