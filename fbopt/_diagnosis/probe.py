"""Passes over a few chunks that leave nothing behind: not in parameters, gradients, buffers, modes
or random generators.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fbopt._engine.backward import run_backward
from fbopt._engine.chunk_addition import ChunkCollection
from fbopt._engine.forward import ChunkLoss
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._engine.weights import mean_of, weigh
from fbopt._sharding import any_sharded, local, working_device

if TYPE_CHECKING:
    from fbopt.closure import FullBatchClosure

FEW = 3  # chunks that are looked at


class Probe:
    """What the checks need of a closure.

    Args:
        closure: the closure, which is not called.

    Attributes:
        params: the parameters that it differentiates by, as of now.
        names: of these.
        changed: names of parameters that a pass has written to, once :meth:`no_trace` has ended.
    """

    def __init__(self, closure: FullBatchClosure) -> None:
        self.closure, self.model = closure, closure.model
        self.params = closure._trainable(closure._candidates())
        known = {id(p): name for name, p in self.model.named_parameters()}
        self.names = [known.get(id(p), f"params[{i}]") for i, p in enumerate(self.params)]
        self.devices = {working_device(p) for p in self.params}
        self.forward = ChunkLoss(
            self.model,
            closure.loss_fn,
            closure.evaluate,
            closure.autocast,
            working_device(self.params[0]),
        )
        self.draws = GeneratorSnapshot(self.devices)
        self.buffers = BufferSnapshot(self.model)
        self.changed: list[str] = []

    @property
    def is_sharded(self) -> bool:
        """Whether a parameter is a DTensor, of which this process holds a part."""
        return any_sharded(self.params)

    def few_chunks(self) -> list[Any]:
        """The first chunks of a new visit."""
        return list(itertools.islice(iter(self.closure.chunks), FEW))

    def weight(self, index: int, chunk: Any) -> float:
        """The chunk's n_c."""
        return weigh(index, chunk, self.closure.weight, mean_of(self.closure.loss_fn))

    def gradient(self, index: int, chunk: Any) -> tuple[Tensor, list[Tensor | None]]:
        """A chunk's loss and gradient, as the closure takes them; buffers are restored."""
        try:
            with torch.enable_grad():
                loss = self.forward.differentiable(index, chunk)[0]
                grads = self._backward(loss)
        finally:
            torch.clear_autocast_cache()
            self.buffers.restore()
        return loss.detach(), grads

    def _backward(self, loss: Tensor) -> list[Tensor | None]:
        if not self.closure.backward:
            return list(torch.autograd.grad(loss, self.params, allow_unused=True))
        collection = ChunkCollection(len(self.params))
        run_backward(loss, self.params, self.model, collection.take)
        return collection.grads

    @contextlib.contextmanager
    def modes(self, modules: list[nn.Module]) -> Iterator[None]:
        """Set these modules to eval mode, without the calls that train() and eval() may make."""
        before = [m.training for m in modules]
        try:
            for m in modules:
                m.training = False
            yield
        finally:
            for m, training in zip(modules, before, strict=True):
                m.training = training

    @contextlib.contextmanager
    def no_trace(self) -> Iterator[None]:
        """Restore everything after the checks; note in ``changed`` which parameters had changed."""
        every = list(self.model.parameters())
        every += [p for p in self.params if all(p is not q for q in every)]
        grads, copies = [p.grad for p in every], [local(p.detach()).clone() for p in every]
        python, numpy_state = random.getstate(), np.random.get_state()
        own = [(g, g.get_state()) for g in _generators(self.closure.chunks)]
        modules = list(self.model.modules())
        training = [m.training for m in modules]
        start = GeneratorSnapshot(self.devices)
        start.begin()
        self.buffers.save()
        for p in every:
            p.grad = None  # which evaluate may add to
        try:
            yield
        finally:
            self.buffers.restore()
            start.rewind()
            random.setstate(python)
            np.random.set_state(numpy_state)
            for generator, state in own:
                generator.set_state(state)
            for m, mode in zip(modules, training, strict=True):
                m.training = mode
            self._restore(every, copies, grads)

    @torch.no_grad()
    def _restore(
        self, every: list[Tensor], copies: list[Tensor], grads: list[Tensor | None]
    ) -> None:
        known = {id(p): name for name, p in self.model.named_parameters()}
        for p, copy, g in zip(every, copies, grads, strict=True):
            p.grad = g
            own = local(p.detach())
            if ((own != copy) & ~(own.isnan() & copy.isnan())).any():
                own.copy_(copy)
                self.changed.append(known.get(id(p), "one of params"))


def _generators(chunks: Any) -> Iterator[torch.Generator]:
    """A DataLoader's own generators, from which each visit draws."""
    sampler = getattr(chunks, "sampler", None)
    inner = getattr(getattr(chunks, "batch_sampler", None), "sampler", None)
    seen: set[int] = set()
    for owner in (chunks, sampler, inner):
        found = getattr(owner, "generator", None)
        if isinstance(found, torch.Generator) and id(found) not in seen:
            seen.add(id(found))
            yield found
