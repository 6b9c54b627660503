"""What a call of a closure needs before its first chunk, kept for the next call where nothing has
changed: sums, copies of buffers, perturbed parameters, the chunk clip, CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.cuda_graphs import ChunkGraphs
from fbopt._engine.cuda_refusals import graph_device, refuse_nested
from fbopt._engine.flat_parameters import FlatParameters
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.inputs import refuse_sharded_graph
from fbopt._engine.perturb import Perturbation
from fbopt._engine.reduce import Reduction
from fbopt._engine.snapshot import BufferSnapshot


class Preparation:
    """What calls of a closure reuse.

    Args:
        model: the module that is trained.
        sums, statistics, reduction: the closure's.

    Attributes:
        before: the buffers before the call.
        between: the buffers between the passes over a chunk.
        perturbation: for a penalty by finite differences.
        clip: None where chunks are not clipped.
        flat: moves parameters into flat buffers.
        graphs: None where chunks are not captured.
    """

    def __init__(
        self,
        model: nn.Module,
        sums: GradientSums,
        statistics: RunningStatistics,
        reduction: Reduction,
    ) -> None:
        self._sums, self._statistics, self._reduction = sums, statistics, reduction
        self.before, self.between = BufferSnapshot(model), BufferSnapshot(model)
        self.perturbation: Perturbation | None = None
        self.clip: ChunkClip | None = None
        self.flat = FlatParameters()
        self.graphs: ChunkGraphs | None = None
        self._is_perturbed = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but what every call can make anew; CUDA graphs are captured again."""
        return vars(self) | {"perturbation": None, "clip": None, "graphs": None}

    def follow_cuda_graph(
        self, is_on: bool, model: nn.Module, candidates: Sequence[Tensor]
    ) -> None:
        """Make or free the CUDA graphs, on the model's device as it is now."""
        if not is_on:
            self.graphs = None
            return
        device = graph_device(model, candidates)
        if self.graphs is None or self.graphs.device != device:
            refuse_nested(model)
            refuse_sharded_graph(self._sums.params)
            self.graphs = ChunkGraphs(device)

    def follow_params(
        self,
        model: nn.Module,
        trainable: Sequence[Tensor],
        candidates: Sequence[Tensor],
        frozen: Sequence[Tensor],
    ) -> None:
        """Start new sums, and forget the gradients of all parameters.

        Args:
            model: the module that is trained.
            trainable: what the closure differentiates by.
            candidates: these, and those that are frozen now.
            frozen: frozen parameters of the optimizer.
        """
        before = self._sums.params
        self._sums.reset(trainable)
        self._reduction.follow_params(model)
        self._reduction.sharded.check()
        if before is not self._sums.params:
            candidates = *before, *candidates
        for p in (*candidates, *frozen):  # a frozen one could keep an old gradient
            p.grad = None

    def begin(
        self,
        modules: Sequence[nn.Module],
        is_perturbed: bool,
        max_norm: float | None,
        in_place: bool,
    ) -> None:
        """Make ready what works on the chunks, and save the buffers.

        Args:
            modules: the model's.
            is_perturbed: whether there are passes at perturbed parameters.
            max_norm: of the chunk clip; None for none.
            in_place: whether parameters in a flat buffer may be written and copied back.
        """
        self._is_perturbed = is_perturbed
        if is_perturbed:
            known = self.perturbation
            if known is None or known.in_place != in_place or not known.fits(self._sums.buckets):
                reshard = self._reduction.sharded.reshard
                self.perturbation = Perturbation(self._sums.buckets, reshard, in_place=in_place)
            self.perturbation.begin()
        if max_norm is None:
            self.clip = None
        else:
            if self.clip is None or not self.clip.fits(self._sums):
                self.clip = ChunkClip(self._sums)
            self.clip.max_norm = max_norm
        for follower in (self._statistics, self.before, self.between):
            follower.follow(modules)
        self.before.save()

    def restore_parameters(self) -> None:
        """Restore perturbed parameters where an interrupt came while they were being restored."""
        if self._is_perturbed and self._sums.buckets.sharding is None:
            self.perturbation.restore()
