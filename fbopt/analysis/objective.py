"""The full-batch loss L(theta) = sum_c (n_c/N) L_c(theta) as a function of the parameters, with its
gradient and Hessian-vector products, accumulated chunk by chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbopt._engine.forward import ChunkLoss
from fbopt._engine.inputs import weigh
from fbopt._engine.modes import measuring
from fbopt._engine.perturb import Perturbation
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._ops.buckets import FlatBuckets
from fbopt._random import seed_generators
from fbopt.accumulate import GradientAccumulator
from fbopt.analysis.cost import Cost
from fbopt.analysis.parameter_space import ParameterSpace
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

    Attributes:
        params: the parameters that L is a function of, by default all that require grad.
        cost: the passes made so far, a :class:`Cost`.
        on_pass: called without arguments after every pass over the chunks.

    Raises:
        TypeError, ValueError: an invalid argument, as for FullBatchClosure.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        chunks: Iterable[Any] | None = None,
        *,
        evaluate: Callable[[nn.Module, Any], Tensor] | None = None,
        weight: Callable[[Any], float] | None = None,
        params: Iterable[Tensor] | None = None,
        autocast: torch.dtype | None = None,
        batchnorm: str = "chunk",
        dropout: str = "off",
        seed: int = 0,
    ) -> None:
        if batchnorm not in BATCHNORM:
            raise ValueError(f"batchnorm must be one of {BATCHNORM}, got {batchnorm!r}")
        if dropout not in DROPOUT:
            raise ValueError(f"dropout must be one of {DROPOUT}, got {dropout!r}")
        closure = FullBatchClosure(  # checks the arguments
            model,
            loss_fn,
            chunks,
            evaluate=evaluate,
            weight=weight,
            params=params,
            autocast=autocast,
            process_group="local",
        )
        assert chunks is not None  # refused by the closure
        self.model, self.loss_fn, self.chunks = model, loss_fn, chunks
        self.evaluate, self.weight, self.autocast = evaluate, weight, autocast
        self.batchnorm, self.dropout, self.seed = batchnorm, dropout, seed
        self.accumulator = GradientAccumulator(closure.sums.params, process_group="local")
        super().__init__(self.accumulator.params)
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [names.get(id(p)) for p in self.params]
        self.cost = Cost()
        self.on_pass: Callable[[], object] = _nothing
        # Both are set by checks.check.
        self.is_deterministic, self.computed_in = False, set[torch.dtype]()
        self._buffers = BufferSnapshot(model)
        self._perturbation: Perturbation | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but flat memory, which a copy makes anew."""
        rebuilt = ("accumulator", "_buffers", "_perturbation")
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled or deep-copied state."""
        vars(self).update(state)
        self.accumulator = GradientAccumulator(self.params)
        self._buffers, self._perturbation = BufferSnapshot(self.model), None

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
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        samples = 0.0
        with self.evaluating(shift):
            for index, chunk, weight in self.visit():
                total += weight * self.chunk_loss(index, chunk).to(total)
                samples += weight
        self.count("losses")
        return float(total) / samples

    def gradient(self, shift: Tensor | None = None) -> Tensor:
        """The gradient of L at theta + shift, a vector."""
        self.accumulate(lambda weight, loss, grads: None, shift)
        return self.flatten(self.accumulator.mean())

    def accumulate(
        self,
        observe: Callable[[float, Tensor, list[Tensor | None]], None],
        shift: Tensor | None = None,
    ) -> None:
        """Leave the gradient of L in ``accumulator``; pass n_c, L_c and g_c to `observe`."""
        self.accumulator.reset()
        with self.evaluating(shift), torch.enable_grad():
            for index, chunk, weight in self.visit():
                loss = self.chunk_loss(index, chunk)
                grads: list[Tensor | None] = []
                grads += torch.autograd.grad(loss, self.params, allow_unused=True)
                self.accumulator.add(grads, weight)
                observe(weight, loss.detach(), grads)
                del loss, grads  # freed before the next chunk's are made
        self.count("gradients")

    def product(self, vector: Tensor) -> Tensor:
        """H v, with H the Hessian of L at theta, by a second backward pass per chunk.

        Fused attention has no second derivative, so that attention is computed step by step.

        Raises:
            RuntimeError: an operation of the model cannot be differentiated twice.
        """
        parts = self.unflatten(vector)
        self.accumulator.reset()
        with self.evaluating(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for index, chunk, weight in self.visit():
                loss = self.chunk_loss(index, chunk)
                self.accumulator.add(self._second_backward(loss, parts), weight)
                del loss
        self.count("gradients", "second_backwards")
        return self.flatten(self.accumulator.mean())

    def _second_backward(self, loss: Tensor, vector: list[Tensor]) -> list[Tensor | None]:
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        # The loss is linear in the other parameters.
        curved = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        if not curved:
            return [None for _ in self.params]
        outputs, along = [grads[i] for i in curved], [vector[i] for i in curved]
        return list(torch.autograd.grad(outputs, self.params, along, allow_unused=True))

    def count(self, *names: str) -> None:
        """Add a pass over the chunks to these fields of ``cost``, and report it to ``on_pass``."""
        for name in names:
            vars(self.cost)[name] += 1
        self.on_pass()

    def visit(self) -> Iterator[tuple[int, Any, float]]:
        """Iterate over (index, chunk, n_c), restoring the buffers before each; only within
        :meth:`evaluating`.
        """
        index = -1
        for index, chunk in enumerate(self.chunks):
            self.restore_buffers()
            yield index, chunk, weigh(index, chunk, self.weight)
        if index < 0:
            raise ValueError("chunks is empty: there is no sample to average over")

    def restore_buffers(self) -> None:
        """Restore the buffers that the model had when :meth:`evaluating` began."""
        self._buffers.restore()

    def chunk_loss(self, index: int, chunk: Any) -> Tensor:
        """The mean loss of a chunk; with gradients enabled, checked to have an autograd graph."""
        if self.dropout == "seeded":
            seed_generators(self.devices, self.seed, index)
        forward = ChunkLoss(self.model, self.loss_fn, self.evaluate, self.autocast, self.device)
        compute = forward.differentiable if torch.is_grad_enabled() else forward
        return compute(index, chunk)[0]

    @contextlib.contextmanager
    def evaluating(self, shift: Tensor | None = None) -> Iterator[None]:
        """Set the modules' modes, move the parameters to theta + shift, and restore all after."""
        self._check_params()
        with contextlib.ExitStack() as stack:
            stack.enter_context(GeneratorSnapshot(self.devices).repeated())
            stack.enter_context(measuring(self.model, self.batchnorm, self.dropout))
            self._buffers.save()
            stack.callback(self.restore_buffers)
            if shift is not None:
                stack.enter_context(self._shifted(shift))
            yield

    def _check_params(self) -> None:
        """Refuse parameters that were frozen, or replaced in the model, since they were given."""
        now = {id(p) for p in self.model.parameters()}
        for i, (p, name) in enumerate(zip(self.params, self._names, strict=True)):
            if not p.requires_grad or (name is not None and id(p) not in now):
                what = "been replaced" if p.requires_grad else "been frozen (requires_grad=False)"
                raise RuntimeError(
                    f"{name or f'params[{i}]'} has {what} since this Objective was made: make a "
                    "new one"
                )

    def _shifted(self, shift: Tensor) -> contextlib.AbstractContextManager[None]:
        """Let the parameters point to a second buffer that holds theta + shift."""
        known = self._perturbation
        if known is None or not known.fits(known.buckets):
            known = self._perturbation = Perturbation(FlatBuckets(self.params))
        known.begin()
        parts = known.buckets.gather(self.unflatten(shift), "grads")
        known.fill(parts, float(shift.double().norm()))
        return known.applied()
