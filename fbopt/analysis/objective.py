"""The full-batch loss L(theta) = sum_c (n_c/N) L_c(theta) as a function of the parameters, with its
gradient and Hessian-vector products, accumulated chunk by chunk.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbopt._distributed import Collectives
from fbopt._engine.autograd_graph import SecondBackward
from fbopt._engine.forward import ChunkLoss
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.modes import measuring
from fbopt._engine.perturb import Perturbation
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._engine.weights import TargetCounts, mean_of, weigh
from fbopt._ops.buckets import FlatBuckets
from fbopt._random import seed_generators
from fbopt._sharding import any_sharded
from fbopt.analysis.cost import Cost
from fbopt.analysis.derivatives import gradients, products
from fbopt.analysis.parameter_space import ParameterSpace
from fbopt.analysis.shares import Shares
from fbopt.closure import FullBatchClosure

BATCHNORM, DROPOUT = ("chunk", "frozen"), ("off", "seeded")


def _nothing() -> None:
    """Do nothing after a pass; unlike a lambda it can be pickled."""


class Objective(ParameterSpace):
    """The full-batch loss L of a model over chunks, without penalty and weight decay.

    ``L(theta) = sum_c (n_c/N) L_c(theta)``, with n_c the samples in chunk c and N their sum. Every
    chunk starts from the model's current buffers (BatchNorm statistics); after each pass over the
    chunks parameters, buffers, module modes and torch's random generators are restored. Memory does
    not depend on the number of chunks. Vectors in parameter space are 1-D tensors: the parameters
    one after the other in row-major order, in float32 (float64 if any parameter is).

    Args:
        model, loss_fn, chunks, evaluate, weight, params: as for :class:`fbopt.FullBatchClosure`.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for a model that is trained under
            ``torch.autocast``: losses, gradients and Hessian-vector products are then those of the
            autocast forward pass. None: the precision of the parameters.
        batchnorm: ``"chunk"``: BatchNorm, and every layer with buffers ``running_…`` or
            ``moving_…``, normalises by the chunk's own statistics, as in training. ``"frozen"``: by
            the model's running statistics.
        dropout: ``"off"``: all other modules are in eval mode, which turns off dropout in
            attention, in recurrent layers and of modules that read ``self.training`` (for a model
            that returns something else in eval mode, such as no auxiliary outputs, pass
            ``"seeded"``). ``"seeded"``: modules keep their modes, and random draws depend on `seed`
            and the chunk's index alone.
        seed: of the dropout draws.
        process_group: the processes that have different chunks, a
            ``torch.distributed.ProcessGroup``; ``"local"`` for a process that measures on its own.
            All have to call the same functions, and get the same results: those of all chunks.

    Attributes:
        params: the parameters that L is a function of, by default all that require grad.
        cost: the passes made so far, a :class:`Cost`.
        on_pass: called without arguments after every pass over the chunks.

    Raises:
        TypeError, ValueError: an invalid argument, as for FullBatchClosure.
    """

    is_penalised = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        chunks: Iterable[Any] | None = None,
        *,
        evaluate: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]] | None = None,
        weight: Callable[[Any], float | Tensor] | None = None,
        params: Iterable[Tensor] | None = None,
        autocast: torch.dtype | None = None,
        batchnorm: str = "chunk",
        dropout: str = "off",
        seed: int = 0,
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        if batchnorm not in BATCHNORM:
            raise ValueError(f"batchnorm must be one of {BATCHNORM}, got {batchnorm!r}")
        if dropout not in DROPOUT:
            raise ValueError(f"dropout must be one of {DROPOUT}, got {dropout!r}")
        if isinstance(model, nn.Module) and any_sharded(model.parameters()):
            raise ValueError(
                "model has sharded parameters (DTensors), but vectors in parameter space are held "
                "whole: measure a copy with whole parameters (their full_tensor())"
            )
        closure = FullBatchClosure(  # checks the arguments
            model,
            loss_fn,
            chunks,
            evaluate=evaluate,
            weight=weight,
            params=params,
            autocast=autocast,
            process_group=process_group,
        )
        assert chunks is not None  # refused by the closure
        self.model, self.loss_fn, self.chunks = model, loss_fn, chunks
        self.evaluate, self.weight, self.autocast = evaluate, weight, autocast
        self.batchnorm, self.dropout, self.seed = batchnorm, dropout, seed
        super().__init__(closure.sums.params, model)
        self.cost = Cost()
        self.on_pass: Callable[[], object] = _nothing
        # Both are set by checks.check.
        self.is_deterministic, self.computed_in = False, set[torch.dtype]()
        self._collectives = Collectives(process_group)
        self._collectives.refuse_unknown_processes(self.params)
        self._allocate()

    def _allocate(self) -> None:
        self.sums = GradientSums(self.params)
        self.shares = Shares(self._collectives, self.sums, self.names)
        self._buffers, self._counts = BufferSnapshot(self.model), TargetCounts()
        self._perturbation: Perturbation | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but flat memory, which a copy makes anew."""
        rebuilt = ("sums", "shares", "_buffers", "_perturbation")
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled or deep-copied state."""
        vars(self).update(state)
        self._allocate()

    def refuse_penalised(self, what: str) -> None:
        """Raise ValueError where `what` would leave out a penalty."""
        if self.is_penalised:
            raise ValueError(f"{what} of the loss alone: pass an Objective, without a penalty")

    @property
    def epsilon(self) -> float:
        """The machine epsilon of the passes: of the coarsest dtype that they compute in."""
        dtypes = {p.dtype for p in self.params} | self.computed_in
        if self.autocast is not None:
            dtypes.add(self.autocast)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    @torch.no_grad()
    def loss(self, shift: Tensor | None = None) -> float:
        """L(theta + shift), in nats for a cross-entropy; may be infinite or NaN."""
        with self.evaluating("losses", shift):
            for index, chunk, weight in self.visit():
                self.shares.add(weight, self.chunk_loss(index, chunk), None)
        self.count("losses")
        return self.shares.loss()

    def gradient(self, shift: Tensor | None = None) -> Tensor:
        """The gradient of L at theta + shift, a vector."""
        self.accumulate(lambda weight, loss, grads: None, shift)
        return self.flatten(self.sums.means())

    def accumulate(
        self,
        observe: Callable[[float, Tensor, list[Tensor | None]], None],
        shift: Tensor | None = None,
    ) -> None:
        """Leave the gradient of L in ``sums``; pass n_c, L_c and g_c of own chunks to `observe`."""
        with self.evaluating("gradients", shift), torch.enable_grad():
            for index, chunk, weight in self.visit():
                loss = self.chunk_loss(index, chunk)
                grads = gradients(loss, self.params)
                self.shares.add(weight, loss, grads)
                observe(weight, loss.detach(), grads)
                del loss, grads  # freed before the next chunk's are made
        self.count("gradients")

    def product(self, vector: Tensor, check: bool = False) -> Tensor:
        """H v, with H the Hessian of L at theta, by a second backward pass per chunk.

        Fused attention has no second derivative, so that attention is computed step by step.

        Args:
            vector: v.
            check: look for functions whose second derivative would be lost without a word.

        Raises:
            RuntimeError: an operation of the model cannot be differentiated twice.
        """
        parts = self.unflatten(vector)
        with (
            self.evaluating("products", None, vector),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            for index, chunk, weight in self.visit():
                loss = self.chunk_loss(index, chunk)
                second = SecondBackward(loss) if check else None
                found = products(loss, self.params, parts)
                if second is not None:
                    again = functools.partial(self._moved_loss, index, chunk, vector)
                    second.check(self.params, again)
                self.shares.add(weight, loss, found)
                del loss, found
        self.count("gradients", "second_backwards")
        return self.flatten(self.sums.means())

    @contextlib.contextmanager
    def _moved_loss(self, index: int, chunk: Any, vector: Tensor) -> Iterator[Tensor]:
        """The chunk's loss at parameters a little further along a vector."""
        length = self.epsilon ** (1 / 3) * max(1.0, float(self.theta().double().norm()))
        shift = vector * (length / float(vector.double().norm().clamp_min(1e-300)))
        self.restore_buffers()
        with self._shifted(shift):
            yield self.chunk_loss(index, chunk)

    def count(self, *names: str) -> None:
        """Add a pass over the chunks to these fields of ``cost``, and report it to ``on_pass``."""
        for name in names:
            vars(self.cost)[name] += 1
        self.on_pass()

    def visit(self) -> Iterator[tuple[int, Any, float]]:
        """Iterate over (index, chunk, n_c), restoring the buffers before each; only within
        :meth:`evaluating`.
        """
        known = mean_of(self.loss_fn)
        self._counts.follow(self.chunks)
        for index, chunk in enumerate(self.chunks):
            weight = weigh(index, chunk, self.weight, known, self._counts)
            if weight:
                self.restore_buffers()
                yield index, chunk, weight

    def restore_buffers(self) -> None:
        """Restore the buffers that the model had when :meth:`evaluating` began."""
        self._buffers.restore()

    def chunk_loss(self, index: int, chunk: Any) -> Tensor:
        """The mean loss of a chunk; with gradients enabled, checked to have an autograd graph."""
        return self.chunk_forward(index, chunk)[0]

    def chunk_forward(self, index: int, chunk: Any) -> tuple[Tensor, Any, Any]:
        """The mean loss of a chunk, the model's output and the target (with ``evaluate`` what it
        returned beside the loss, and the chunk).
        """
        if self.dropout == "seeded":
            seed_generators(self.devices, self.seed, self.place(index))
        forward = ChunkLoss(self.model, self.loss_fn, self.evaluate, self.autocast, self.device)
        compute = forward.differentiable if torch.is_grad_enabled() else forward
        return compute(index, chunk)

    @property
    def is_single(self) -> bool:
        """Whether one process has all chunks."""
        return self._collectives.is_single

    def place(self, index: int) -> int:
        """A chunk's index among those of all processes, where the shares are chunks[rank::world]:
        what random draws for a chunk are seeded by.
        """
        return index * self._collectives.world_size + self._collectives.rank

    @contextlib.contextmanager
    def evaluating(
        self, what: str, shift: Tensor | None = None, vector: Tensor | None = None
    ) -> Iterator[None]:
        """Make one pass: set the modules' modes, move the parameters to theta + shift, and restore
        all after. Then ``shares`` and ``sums`` are those of all processes.
        """
        with contextlib.ExitStack() as stack:
            with self.shares.preparing():
                self.check_current(self.model)
                stack.enter_context(GeneratorSnapshot(self.devices).repeated())
                stack.enter_context(measuring(self.model, self.batchnorm, self.dropout))
                self._buffers.save()
                stack.callback(self.restore_buffers)
                if shift is not None:
                    stack.enter_context(self._shifted(shift))
            summed = what.endswith(("gradients", "products"))
            self.shares.begin(what, summed, [] if vector is None else [vector])
            stack.enter_context(self.shares.visiting())
            yield

    def _shifted(self, shift: Tensor) -> contextlib.AbstractContextManager[None]:
        """Let the parameters point to a second buffer that holds theta + shift."""
        known = self._perturbation
        if known is None or not known.fits(known.buckets):
            known = self._perturbation = Perturbation(FlatBuckets(self.params))
        known.begin()
        parts = known.buckets.gather(self.unflatten(shift), "grads")
        known.fill(parts, float(shift.double().norm()))
        return known.applied()
