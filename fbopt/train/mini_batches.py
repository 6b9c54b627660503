"""The gradient of a mini-batch: by a plain backward pass, or, with a second point, as a step of one
chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fbopt import FullBatchClosure
from fbopt.train.batchnorm import EveryPass, blending
from fbopt.train.config.options import Options
from fbopt.train.losses import Loss
from fbopt.train.precision import autocast_dtype


class Found(NamedTuple):
    """A mini-batch's loss, and ``||g||^2`` where it is logged, without clip and penalty."""

    loss: Tensor
    square: Tensor | None


class MiniBatchGradient:
    """Fills ``p.grad`` with the gradient of a mini-batch.

    Args:
        options: resolved.
        model: the network; compiled here where the options say so.
        loss_fn: of its output and the labels.
        observe: called with detached output and labels.
        closure: what finds the gradient where there is a second point; it has its own `observe`.
        every_pass: what follows BatchNorm's statistics in that closure, if anything does.
    """

    def __init__(
        self,
        options: Options,
        model: nn.Module,
        loss_fn: Loss,
        observe: Callable[[Tensor, Tensor], None],
        closure: FullBatchClosure | None = None,
        every_pass: EveryPass | None = None,
    ) -> None:
        self._options, self._model, self._loss_fn = options, model, loss_fn
        self._observe, self._closure, self._every_pass = observe, closure, every_pass
        # A closure compiles its own passes.
        self._forward = torch.compile(model) if options.compile and closure is None else model

    def __call__(self, input: Tensor, target: Tensor) -> Found:
        """Fill ``p.grad`` for these samples and labels."""
        if self._closure is None:
            return self._plain(input, target)
        self._closure.chunks = [(input, target)]
        every = self._every_pass
        with blending(self._model) if every is None else every.following():
            loss = self._closure()
        return Found(loss, self._closure.mean_sqnorm)

    def _plain(self, input: Tensor, target: Tensor) -> Found:
        self._model.zero_grad()
        dtype = autocast_dtype(self._options.precision)
        with torch.autocast(input.device.type, dtype, enabled=dtype is not None):
            output = self._forward(input)
            loss = self._loss_fn(output, target)
        loss.backward()
        self._observe(output.detach(), target)
        return Found(loss.detach(), self._square() if self._options.chunk_norms else None)

    def _square(self) -> Tensor:
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(grads).square()
