"""The full-batch loss as a function of the parameters, L(theta) = sum_c (n_c/N) L_c(theta), and its
gradient: streamed over the chunks, leaving model, buffers and random generators as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._engine.forward import ChunkLoss
from fbopt._engine.inputs import weigh
from fbopt._engine.perturb import Shift
from fbopt._engine.snapshot import Buffers
from fbopt._random import seed_generators
from fbopt.analysis.modes import BATCHNORM, DROPOUT, modes
from fbopt.closure import FullBatchClosure


class ParameterSpace:
    """The space of a list of parameters.

    A vector is a 1-D tensor, the parameters one after the other in row-major order, float32
    (float64 if any parameter is), on the device of the first parameter.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)

    @property
    def size(self) -> int:
        """The number of parameters, the length of a vector."""
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """The type of a vector."""
        wide = any(p.dtype == torch.float64 for p in self.params)
        return torch.float64 if wide else torch.float32

    @property
    def epsilon(self) -> float:
        """The unit roundoff of the model's arithmetic, that of its coarsest parameters."""
        return max(torch.finfo(p.dtype).eps for p in self.params)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The vector of one tensor for each parameter, None counting as zeros."""
        device, dtype = self.params[0].device, self.dtype
        parts = [
            torch.zeros(p.numel(), dtype=dtype, device=device)
            if t is None
            else t.detach().to(device, dtype).reshape(-1)
            for t, p in zip(tensors, self.params, strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor for each parameter, with its shape, strides, dtype and device."""
        parts = vector.split([p.numel() for p in self.params])
        return [
            torch.empty_like(p).copy_(part.view(p.shape)).detach()
            for part, p in zip(parts, self.params, strict=True)
        ]

    def theta(self) -> Tensor:
        """The parameters as a vector."""
        return self.flatten(self.params)

    @property
    def cuda_indices(self) -> list[int]:
        """The CUDA devices that parameters are on."""
        devices = {p.device for p in self.params if p.device.type == "cuda"}
        return sorted(torch.cuda.current_device() if d.index is None else d.index for d in devices)


@dataclass
class Cost:
    """Passes over all chunks: losses alone, losses with gradients, and second backward passes.

    An exact Hessian-vector product is one of `gradients` and one of `second_backwards`; one by
    central differences is two of `gradients`.
    """

    losses: int = 0
    gradients: int = 0
    second_backwards: int = 0

    def since(self, start: Cost) -> Cost:
        """What was added after `start`, a copy of this that was made earlier."""
        names = vars(self)
        return Cost(**{name: getattr(self, name) - getattr(start, name) for name in names})

    def copy(self) -> Cost:
        """The counts as they are now."""
        return replace(self)


class Objective(ParameterSpace):
    """The full-batch loss L of a model over chunks, without penalty and weight decay.

    ``L(theta) = sum_c (n_c/N) L_c(theta)``, with n_c the samples in chunk c and N their sum. Every
    chunk begins with the buffers (BatchNorm statistics) and parameters that the model has; after
    each pass over the chunks these, the modules' modes and torch's random generators are what they
    were. Memory does not depend on the number of chunks. Vectors in parameter space are 1-D
    tensors: the parameters one after the other in row-major order, in
    float32 (float64 if any parameter is).

    Args:
        model, loss_fn, chunks, evaluate, weight, params, autocast: as for
            :class:`fbopt.FullBatchClosure`.
        batchnorm: ``"chunk"``: BatchNorm layers normalise by the chunk's own statistics, as in
            training. ``"frozen"``: by the running statistics that the model has.
        dropout: ``"off"``, or ``"seeded"``: with the modules' modes as they are and draws that
            depend on `seed` and the chunk's index alone.
        seed: of the dropout draws.

    Attributes:
        params: the parameters, those that require grad.
        cost: the passes made so far, a :class:`Cost`.
        on_pass: called without arguments after every pass over the chunks.

    Raises:
        TypeError, ValueError: an argument that does not fit, as for FullBatchClosure.
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
        for name, value, known in (
            ("batchnorm", batchnorm, BATCHNORM),
            ("dropout", dropout, DROPOUT),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        closure = FullBatchClosure(
            model,
            loss_fn,
            chunks,
            evaluate=evaluate,
            weight=weight,
            params=params,
            autocast=autocast,
        )
        self.model, self.loss_fn, self.chunks = model, loss_fn, chunks
        self.evaluate, self.weight, self.autocast = evaluate, weight, autocast
        self.batchnorm, self.dropout, self.seed = batchnorm, dropout, seed
        self.accumulator = closure.accumulator  # whose arguments are checked there
        super().__init__(self.accumulator.params)
        self.cost = Cost()
        self.on_pass: Callable[[], None] = lambda: None
        self._buffers = Buffers(model)
        self._shift: Shift | None = None
        self.is_deterministic: bool | None = None

    @torch.no_grad()
    def loss(self, shift: Tensor | None = None) -> float:
        """L(theta + shift), in nats for a cross-entropy; may be infinite or NaN."""
        total = torch.zeros((), dtype=torch.float64, device=self.params[0].device)
        samples = 0.0
        with self.evaluating(shift):
            for index, chunk, weight in self.visit():
                total += weight * self.chunk_loss(index, chunk).to(total)
                samples += weight
        self.cost.losses += 1
        self.on_pass()
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
        """Leave the gradient of L in ``accumulator``; hand n_c, L_c and g_c to `observe`."""
        self.accumulator.reset()
        with self.evaluating(shift), torch.enable_grad():
            for index, chunk, weight in self.visit():
                loss = self.differentiable_loss(index, chunk)
                grads = list(torch.autograd.grad(loss, self.params, allow_unused=True))
                self.accumulator.add(grads, weight)
                observe(weight, loss.detach(), grads)
                del loss, grads  # before the next chunk's are made
        self.cost.gradients += 1
        self.on_pass()

    def product(self, vector: Tensor) -> Tensor:
        """H v, with H the Hessian of L at theta, by a second backward pass per chunk.

        Raises:
            RuntimeError: an operation of the model cannot be differentiated twice.
        """
        parts = self.unflatten(vector)
        self.accumulator.reset()
        with self.evaluating(), torch.enable_grad():
            for index, chunk, weight in self.visit():
                loss = self.differentiable_loss(index, chunk)
                self.accumulator.add(self._second_backward(loss, parts), weight)
                del loss
        self.cost.gradients += 1
        self.cost.second_backwards += 1
        self.on_pass()
        return self.flatten(self.accumulator.mean())

    def _second_backward(self, loss: Tensor, vector: list[Tensor]) -> list[Tensor | None]:
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        pairs = [
            (g, v)
            for g, v in zip(grads, vector, strict=True)
            if g is not None and g.requires_grad  # else the loss is linear in this parameter
        ]
        if not pairs:
            return [None for _ in self.params]
        outputs, along = (list(side) for side in zip(*pairs, strict=True))
        return list(torch.autograd.grad(outputs, self.params, along, allow_unused=True))

    def visit(self) -> Iterator[tuple[int, Any, float]]:
        """Iterate over (index, chunk, n_c), each with the model's own buffers. Within
        :meth:`evaluating`.
        """
        seen = False
        for index, chunk in enumerate(self.chunks):
            seen = True
            self.put_back()
            yield index, chunk, weigh(index, chunk, self.weight)
        if not seen:
            raise ValueError("chunks is empty: there is no sample to average over")

    def put_back(self) -> None:
        """Give the model the buffers that it had when :meth:`evaluating` began."""
        self._buffers.restore()

    def chunk_loss(self, index: int, chunk: Any) -> Tensor:
        """A chunk's mean loss."""
        self._seed(index)
        return self._forward()(index, chunk)[0]

    def differentiable_loss(self, index: int, chunk: Any) -> Tensor:
        """A chunk's mean loss, a 0-dim tensor with a graph behind it."""
        self._seed(index)
        return self._forward().differentiable(index, chunk)[0]

    def _forward(self) -> ChunkLoss:
        device = self.params[0].device
        return ChunkLoss(self.model, self.loss_fn, self.evaluate, self.autocast, device)

    def _seed(self, index: int) -> None:
        if self.dropout == "seeded":
            seed_generators({p.device for p in self.params}, self.seed, index)

    @contextlib.contextmanager
    def evaluating(self, shift: Tensor | None = None) -> Iterator[None]:
        """Modes as the arguments say and the parameters at theta + shift; all put back after."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.cuda_indices))
            stack.enter_context(modes(self.model, self.batchnorm, self.dropout))
            self._buffers.save()
            stack.callback(self.put_back)
            if shift is not None:
                stack.enter_context(self._moved(shift))
            yield

    def _moved(self, shift: Tensor) -> contextlib.AbstractContextManager[None]:
        """Let the parameters point to a second buffer with theta + shift."""
        groups = self.accumulator.groups
        if self._shift is None or not self._shift.fits(groups):
            self._shift = Shift(groups)
        self._shift.begin()
        parts = groups.gather(self.unflatten(shift), "grads")
        self._shift.fill(parts, float(shift.double().norm()))
        return self._shift.applied()
