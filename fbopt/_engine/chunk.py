"""The gradient of one chunk, g_c or with second points g_c + k (g+ - g_c), and its addition to the
sums. All of it is work on the device, which a CUDA graph can capture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fbopt._direction import PerturbationRule
from fbopt._engine.addition import GradientAddition, Gradients
from fbopt._engine.autograd_graph import (
    SecondBackward,
    dtypes,
    hint_at_checkpoints,
    naming_methods,
    refuse_unreached,
)
from fbopt._engine.backward import Take, run_backward
from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.chunk_addition import ApartAddition, ChunkAddition, ChunkCollection
from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.forward import BARE, ChunkLoss
from fbopt._engine.fully_sharded import FullySharded
from fbopt._engine.gradient_sums import GradientSums, Parts
from fbopt._engine.lockstep import Lockstep
from fbopt._engine.other_means import SampleMeans
from fbopt._engine.perturb import Perturbation, hessian_product
from fbopt._engine.rounding import Found
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._engine.whole_gradient import WholeGradient

Observe = Callable[[Any, Any], None] | None


@dataclass(frozen=True)
class ChunkGradient:
    """What a closure call does with each chunk.

    Args:
        forward: the chunk's loss.
        penalty: a penalty or SAM, None where its coefficient is zero.
        sums, statistics: where gradients and BatchNorm's statistics are added.
        buffers: keeps the model's buffers during passes at perturbed parameters.
        perturbation: for passes at second points.
        clip: None where chunks are not clipped.
        chunk_norms: as for the closure.
        backward: whether gradients come from ``loss.backward()``.
        sharded, lockstep: for a model sharded by FSDP2, else None.
        checks: whether autograd graphs are checked, in the first call with these parameters.
        means: checks losses where weights are numbers of samples, for want of anything better.
        whole: the gradient of all chunks, where the direction has a share of it.
    """

    forward: ChunkLoss
    penalty: PerturbationRule | None
    sums: GradientSums
    statistics: RunningStatistics
    buffers: BufferSnapshot
    perturbation: Perturbation | None
    clip: ChunkClip | None
    chunk_norms: bool
    backward: bool = False
    sharded: FullySharded | None = None
    lockstep: Lockstep | None = None
    checks: bool = False
    means: SampleMeans | None = None
    whole: WholeGradient | None = None

    @functools.cached_property
    def addition(self) -> GradientAddition:
        """What adds the chunk's gradient to the sums."""
        return GradientAddition(
            self.sums, self.clip, self.perturbation, self.chunk_norms, self.whole_parts
        )

    @property
    def whole_parts(self) -> Parts | None:
        """The gradient of all chunks as the kernels take it."""
        return None if self.whole is None else self.whole.parts

    @property
    def repetitions(self) -> int:
        """How often a chunk's random draws are repeated."""
        if self.penalty is None:
            return 0
        return {"forward": 1, "central": 2}.get(self.penalty.method, 0)

    def __call__(
        self,
        index: int,
        chunk: Any,
        weight: float | Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot | None,
        observe: Observe,
    ) -> tuple[Tensor, Tensor | None]:
        """Add one chunk's gradient; return its loss and ||g||^2 (float64; None if not needed)."""
        if self.sharded is None or self._counts(weight):
            return self._add(index, chunk, weight, coefficient, draws, observe)
        # Of weight 0, run in step with processes whose chunks count: it leaves no trace.
        buffers = BufferSnapshot(self.forward.model)
        buffers.save()
        try:
            return self._add(index, chunk, weight, coefficient, draws, None)
        finally:
            buffers.restore()

    def _add(
        self,
        index: int,
        chunk: Any,
        weight: float | Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot | None,
        observe: Observe,
    ) -> tuple[Tensor, Tensor | None]:
        checks = self.checks and isinstance(draws, GeneratorSnapshot)  # a capture reads nothing
        if self.repetitions or (self.is_exact and checks):
            draws.begin()
        self.statistics.clear()
        loss = self._checked_forward(index, chunk, weight, observe, checks)
        own, weight = weight, self.lockstep.weight if self.sharded is not None else weight
        if self._is_streamed:
            self._stream(loss, weight)
            self._record(own)
            return loss.detach(), None
        grads, products = self._gradients(index, chunk, loss, draws, checks)
        self._record(own)
        loss = loss.detach()  # frees the activations, whose memory the next pass needs
        if self.penalty is None:
            square = self.addition.plain(grads, weight)
        elif self.is_exact:
            square = self.addition.exact(
                grads, products, weight, coefficient, self.penalty.direction
            )
        else:
            with self.in_passing(draws) as rewind:
                shifted = functools.partial(self._shifted, index, chunk, rewind)
                square = self.addition.differences(
                    grads, weight, coefficient, self.penalty, shifted
                )
        return loss, square

    def probe(
        self, index: int, chunk: Any, weight: float, draws: GeneratorSnapshot, observe: Observe
    ) -> Found:
        """Return one chunk's loss and gradient, with all checks; call it :meth:`in_passing`."""
        loss = self._checked_forward(index, chunk, weight, observe, self.checks)
        found = frozenset(dtypes(loss))
        grads, products = self._gradients(index, chunk, loss, draws, checks=True)
        return Found(loss.detach(), grads, products, found)

    def probe_loss(self, index: int, chunk: Any, weight: float) -> None:
        """Check the loss of one chunk alone."""
        self._checked_forward(index, chunk, weight, None, self.checks)

    @property
    def is_exact(self) -> bool:
        """Whether there is a second backward pass."""
        return self.penalty is not None and self.penalty.method == "exact"

    def _checked_forward(
        self, index: int, chunk: Any, weight: float | Tensor, observe: Observe, checks: bool
    ) -> Tensor:
        loss = self._forward(index, chunk, observe)
        if checks and self.means is not None:
            self.means.check(index, loss, float(weight))
        return loss

    def _gradients(
        self, index: int, chunk: Any, loss: Tensor, draws: GeneratorSnapshot | None, checks: bool
    ) -> tuple[Gradients, Gradients]:
        """g, and with method="exact" H g."""
        second = SecondBackward(loss) if self.is_exact and checks else None
        grads = self._gradient(loss, create_graph=self.is_exact)
        if checks and not self.backward:
            refuse_unreached(loss, grads)
        if not self.is_exact:
            return grads, []
        params, direction = self.sums.params, self.penalty.direction
        products = hessian_product(grads, params, direction, self.whole_grads)
        if second is not None:  # after the products, whose graph a pass could invalidate
            again = functools.partial(self._shifted_loss, index, chunk, grads, draws)
            second.check(self.sums.params, again)
        return grads, products

    @property
    def whole_grads(self) -> Sequence[Tensor | None]:
        """The gradient of all chunks by the parameters; None where the direction has none of it."""
        return [None] * len(self.sums.params) if self.whole is None else self.whole.grads

    def _counts(self, weight: float | Tensor) -> bool:
        return self.sharded is None or bool(weight)  # others come with weights above 0 alone

    def _record(self, weight: float | Tensor) -> None:
        if self.sharded is None or self._counts(weight):
            self.statistics.record(lambda device: self.sums.scalar(weight, device))

    @property
    def _is_streamed(self) -> bool:
        """Whether gradients are added one by one: exact sums count one addition for each chunk."""
        if not self.backward:
            return False
        whole = self.penalty or self.clip or self.chunk_norms or self.sums.accumulation == "exact"
        return not whole or self._is_apart

    @property
    def _is_apart(self) -> bool:
        """Whether the gradients of processes are added one by one, for exact sums with FSDP2."""
        return self.sharded is not None and self.sharded.contributions is not None

    def _stream(self, loss: Tensor, weight: float | Tensor) -> None:
        addition: ChunkAddition | ApartAddition = ChunkAddition(self.sums, weight)
        if self._is_apart:
            contributions = self.sharded.contributions
            addition = ApartAddition(self.sums, self.lockstep.weights, contributions.of)
        self._backward(loss, addition.take)
        addition.finish()

    def _backward(self, loss: Tensor, take: Take) -> None:
        scale = self.lockstep.scale if self.sharded is not None and not self._is_apart else 1.0
        sharded = FullySharded(()) if self.sharded is None else self.sharded
        run_backward(loss, self.sums.params, self.forward.model, take, sharded=sharded, scale=scale)

    def in_passing(
        self, draws: GeneratorSnapshot
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Leave buffers, generators and autocast's cache as they are after passes in this context.

        It gives what rewinds the generators to where the chunk's draws began.
        """
        return _InPassing(self.buffers, draws.repeated())

    @contextlib.contextmanager
    def _shifted_loss(
        self, index: int, chunk: Any, grads: Sequence[Tensor | None], draws: GeneratorSnapshot
    ) -> Iterator[Tensor]:
        """The chunk's loss at theta + radius g / ||g||, whatever the direction."""
        perturbation = Perturbation(self.sums.buckets)
        perturbation.begin()
        parts = self.sums.gather([None if g is None else g.detach() for g in grads])
        perturbation.fill(parts, self.penalty.radius)
        with self.in_passing(draws) as rewind, perturbation.applied():
            rewind()
            yield self._forward(index, chunk, observe=None)

    def _shifted(
        self, index: int, chunk: Any, rewind: Callable[[], None], again: bool
    ) -> Gradients:
        """The gradient at the perturbed parameters."""
        if again:
            self.buffers.restore()
        rewind()
        with self.perturbation.applied():
            return self._gradient(self._forward(index, chunk, observe=None))

    def _forward(self, index: int, chunk: Any, observe: Observe) -> Tensor:
        loss, *shown = self.forward.differentiable(index, chunk)
        if observe is not None:
            if shown[0] is BARE:
                raise TypeError(
                    "evaluate returned the loss alone, but observe=... is to see more: return "
                    "(loss, aux), then observe(aux, chunk) is called"
                )
            observe(*tree_map_only(Tensor, Tensor.detach, shown))
        return loss

    def _gradient(self, loss: Tensor, create_graph: bool = False) -> Sequence[Tensor | None]:
        params = self.sums.params
        if self.backward:
            collection = ChunkCollection(len(params))
            self._backward(loss, collection.take)
            return collection.grads
        try:
            grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        except RuntimeError:
            with (
                hint_at_checkpoints(),
                naming_methods() if create_graph else contextlib.nullcontext(),
            ):
                raise
        for i, g in enumerate(grads):
            if g is not None and g.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of parameter {i} ({self._name(i)}) is sparse: fbopt needs dense "
                    "gradients, for an embedding pass sparse=False"
                )
        return grads

    def _name(self, index: int) -> str:
        wanted = self.sums.params[index]
        return next((n for n, p in self.forward.model.named_parameters() if p is wanted), "unnamed")


class _InPassing:
    """See :meth:`ChunkGradient.in_passing`; a class, as every chunk enters it."""

    def __init__(
        self, buffers: BufferSnapshot, repeated: contextlib.AbstractContextManager[Any]
    ) -> None:
        self._buffers, self._repeated = buffers, repeated

    def __enter__(self) -> Callable[[], None]:
        self._buffers.save()
        return self._repeated.__enter__()

    def __exit__(self, *raised: Any) -> None:
        try:
            torch.clear_autocast_cache()
            self._buffers.restore()
        finally:
            self._repeated.__exit__(*raised)
