"""The work on one chunk: g_c, with a penalty g_c + lambda H_c g_c, added to the accumulator. All of
it is work on the device, which a graph can capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.forward import ChunkLoss
from fbopt._engine.perturb import Perturbation, hessian_gradient_product
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._ops import dispatch
from fbopt._ops.reference import clip_coefficient
from fbopt.accumulate import GradientAccumulator
from fbopt.penalty import GradientPenalty

Observe = Callable[[Any, Any], None] | None


@dataclass(frozen=True)
class ChunkGradient:
    """What a call of the closure does with each of its chunks.

    Args:
        model, loss_fn, evaluate, autocast: as for the closure.
        penalty: the penalty, or None where its coefficient is zero.
        accumulator: where the gradients are added.
        statistics: where BatchNorm's statistics are added.
        buffers: keeps the model's buffers during the shifted passes.
        perturbation: the second buffer of the parameters, for a penalty that needs it.
        chunk_max_norm, chunk_norms: as for the closure.
        scratch: sums of one chunk's penalised gradient, where that is clipped.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None
    evaluate: Callable[[nn.Module, Any], Tensor] | None
    autocast: torch.dtype | None
    penalty: GradientPenalty | None
    accumulator: GradientAccumulator
    statistics: RunningStatistics
    buffers: BufferSnapshot
    perturbation: Perturbation | None
    chunk_max_norm: float | None = None
    chunk_norms: bool = False
    scratch: GradientAccumulator | None = None

    @property
    def repetitions(self) -> int:
        """How often the random draws of a chunk are repeated."""
        return {"forward": 1, "central": 2}.get(self.penalty and self.penalty.method, 0)

    def __call__(
        self,
        index: int,
        chunk: Any,
        weight: float | Tensor,
        coefficient: Tensor | None,
        draws: GeneratorSnapshot | None,
        observe: Observe,
    ) -> tuple[Tensor, Tensor | None]:
        """Add one chunk's gradient; return its loss and ||g||^2 (float64; None if not wanted)."""
        exact = self.penalty is not None and self.penalty.method == "exact"
        if self.repetitions:
            draws.begin()
        self.statistics.clear()
        loss = self._forward(index, chunk, observe)
        grads = self._gradient(loss, create_graph=exact)
        self.statistics.record(lambda device: self.accumulator.scalar(weight, device))
        loss = loss.detach()  # its graph holds the activations that the next pass needs room for
        if self.penalty is None:
            return loss, self._add_plain(grads, weight)
        if exact:
            return loss, self._add_exact(grads, weight, coefficient)
        return loss, self._add_shifted(index, chunk, grads, weight, coefficient, draws)

    def _add_plain(self, grads: Sequence[Tensor | None], weight: float | Tensor) -> Tensor | None:
        parts, square = self.accumulator.gather(grads), None
        if self.chunk_norms or self.chunk_max_norm is not None:
            square = _squared_norm(parts)
        if self.chunk_max_norm is not None:
            weight = self._clipped(weight, square)
        self.accumulator.add_parts(parts, weight)
        return square

    def _add_exact(
        self, grads: Sequence[Tensor | None], weight: float | Tensor, coefficient: Tensor
    ) -> Tensor:
        accumulator, clips = self.accumulator, self.chunk_max_norm is not None
        products = hessian_gradient_product([g for g in grads if g is not None], accumulator.params)
        parts = accumulator.gather([None if g is None else g.detach() for g in grads])
        square = _squared_norm(parts)
        products = accumulator.buckets.gather(products, "plus")
        if clips:
            self.scratch.reset()
            self.scratch.add_products(parts, products, 1.0, coefficient)
            self._add_scratch(weight)
        else:
            accumulator.add_products(parts, products, weight, coefficient)
        return square

    def _add_scratch(self, weight: float | Tensor) -> None:
        """Clip the penalised gradient in ``scratch`` and add it."""
        whole = self.scratch._operands
        self.accumulator.add_parts(whole, self._clipped(weight, _squared_norm(whole)))

    def _clipped(self, weight: float | Tensor, square: Tensor) -> Tensor:
        """The weight times min(1, chunk_max_norm / (||g|| + 1e-6))."""
        scale = self.accumulator.scalar(weight, square.device)
        return scale * clip_coefficient(self.chunk_max_norm, square.sqrt())

    def _add_shifted(
        self,
        index: int,
        chunk: Any,
        grads: Sequence[Tensor | None],
        weight: float | Tensor,
        coefficient: Tensor,
        draws: GeneratorSnapshot,
    ) -> Tensor:
        radius, gather = self.penalty.radius, self.accumulator.gather
        parts = gather(grads)
        square = self.perturbation.fill(parts, radius)
        with draws.repeated() as rewind:
            self.buffers.save()
            try:
                rewind()
                plus = gather(self._shifted_gradient(index, chunk), "plus")
                minus = []
                if self.penalty.method == "central":
                    self.buffers.restore()
                    self.perturbation.fill(parts, -radius, square)
                    rewind()
                    minus = gather(self._shifted_gradient(index, chunk), "minus")
            finally:
                torch.clear_autocast_cache()
                self.buffers.restore()
        difference = parts, plus, minus
        if self.chunk_max_norm is None:
            self.accumulator.add_penalised(*difference, weight, coefficient, square, radius)
        else:
            self.scratch.reset()
            self.scratch.add_penalised(*difference, 1.0, coefficient, square, radius)
            self._add_scratch(weight)
        return square

    def _shifted_gradient(self, index: int, chunk: Any) -> Sequence[Tensor | None]:
        with self.perturbation.applied():
            return self._gradient(self._forward(index, chunk, observe=None))

    def _forward(self, index: int, chunk: Any, observe: Observe) -> Tensor:
        device = self.accumulator.params[0].device
        forward = ChunkLoss(self.model, self.loss_fn, self.evaluate, self.autocast, device)
        loss, output, target = forward.differentiable(index, chunk)
        if observe is not None:
            observe(output.detach() if isinstance(output, Tensor) else output, target)
        return loss

    def _gradient(self, loss: Tensor, create_graph: bool = False) -> Sequence[Tensor | None]:
        params = self.accumulator.params
        grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        for i, g in enumerate(grads):
            if g is not None and g.layout != torch.strided:
                raise TypeError(
                    f"the gradient of parameter {i} ({self._name(i)}) is sparse: fbopt needs dense "
                    "gradients, for an embedding pass sparse=False"
                )
        return grads

    def _name(self, index: int) -> str:
        wanted = self.accumulator.params[index]
        return next((n for n, p in self.model.named_parameters() if p is wanted), "unnamed")


def _squared_norm(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """||g||^2 of a gathered gradient: 0-dim, float64."""
    return dispatch.squared_norm([g for part in parts for g in part])
