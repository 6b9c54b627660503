"""FullBatchClosure: mean loss and gradient over all chunks, a closure for any optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import _ops
from fbopt._chunks import check_arguments, check_loss, pair, refuse_compiled, weigh
from fbopt._passes import Buffers, RandomState, RunningStatistics
from fbopt._tensors import check_params
from fbopt.accumulate import GradientAccumulator
from fbopt.penalty import GradientPenalty, Shift, hessian_gradient_product


class FullBatchClosure:
    """Fill ``p.grad`` with the full-batch gradient and return the mean loss, at every call.

    With chunks c of n_c samples, mean losses L_c with gradients g_c, and ``N = sum_c n_c``::

        loss    L = sum_c (n_c / N) L_c
        p.grad    = sum_c (n_c / N) (g_c + lambda H_c g_c)

    A ragged last chunk counts by its samples. Follows torch's closure convention, so it serves
    ``FullBatchGD``, ``torch.optim.LBFGS``, Adam or SGD alike. Gradients replace whatever ``p.grad``
    held and live in a buffer that the next call overwrites: clone what you keep.

    BatchNorm's running statistics are afterwards the n_c-weighted mean over all chunks of what the
    passes at theta recorded; the passes at shifted points leave parameters, buffers and random
    generators as if they had not been, dropout masks are the same in both, and an exception puts
    all buffers back.

    Args:
        model: the module to train.
        loss_fn: ``loss_fn(model(input), target)`` is the chunk's mean loss, 0-dim.
        chunks: an iterable over (input, target) that can be iterated once per call: a list, a
            DataLoader. The size of a chunk is part of the model where there is a penalty or
            BatchNorm.
        penalty: a :class:`GradientPenalty`, or None.
        optimizer: whose learning rate the penalty's coefficient follows.
        accumulation: how the sum over chunks is kept, see :class:`GradientAccumulator`.
        evaluate: ``evaluate(model, chunk)`` returns the chunk's mean loss; takes the place of
            ``loss_fn`` for chunks that are no (input, target) pairs.
        weight: ``weight(chunk)`` returns n_c; by default the length of the chunk's first tensor.
        params: the tensors to differentiate by; by default the model's parameters that require
            grad.
        autocast: dtype to autocast the forward passes to, e.g. ``torch.bfloat16``.
        observe: ``observe(output, target)`` is called after every chunk's first pass, without
            gradients.

    Attributes:
        step: number of completed calls; the argument of a penalty's ``coefficient`` function.
        mean_sqnorm: with a penalty, ``sum_c (n_c/N) ||g_c||^2`` of the last call (0-dim float64),
            else None.
        accumulator: the :class:`GradientAccumulator` at work.

    Raises:
        TypeError, ValueError: an argument, a chunk or a loss that does not fit; the message names
            it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        chunks: Iterable[Any] | None = None,
        *,
        penalty: GradientPenalty | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        accumulation: str = "float32",
        evaluate: Callable[[nn.Module, Any], Tensor] | None = None,
        weight: Callable[[Any], float] | None = None,
        params: Iterable[Tensor] | None = None,
        autocast: torch.dtype | None = None,
        observe: Callable[[Any, Any], None] | None = None,
    ) -> None:
        check_arguments(
            model,
            loss_fn,
            chunks,
            evaluate=evaluate,
            observe=observe,
            weight=weight,
            autocast=autocast,
            penalty=penalty,
            optimizer=optimizer,
        )
        self.model, self.loss_fn, self.chunks = model, loss_fn, chunks
        self.penalty, self.optimizer = penalty, optimizer
        self.evaluate, self.weight, self.observe = evaluate, weight, observe
        self.autocast = autocast
        self._given = None if params is None else check_params(params)
        self.accumulator = GradientAccumulator(self._trainable(), accumulation)
        if penalty is not None:
            self._coefficient()
        self._shift: Shift | None = None
        self._before, self._between = Buffers(model), Buffers(model)
        self._statistics = RunningStatistics(model)
        self.step = self._step_before = 0
        self.mean_sqnorm: Tensor | None = None

    def __call__(self) -> Tensor:
        """Fill ``p.grad`` and return the mean loss: 0-dim, float32 (float64 for a float64 loss)."""
        loss = self.accumulate()
        self.assign()
        return loss

    def accumulate(self) -> Tensor:
        """Visit every chunk once, leave the weighted sum in ``accumulator``, return the mean loss.

        ``p.grad`` is None afterwards; :meth:`assign` fills it. An exception leaves parameters and
        buffers as they were.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "FullBatchClosure needs gradients: call it outside torch.inference_mode()"
            )
        coefficient = self._coefficient()
        self._prepare(coefficient)
        self._before.save()
        self._step_before = self.step
        try:
            with torch.no_grad(), self._statistics.averaging():
                loss = self._visit(coefficient)
        except BaseException:
            self.rollback()
            raise
        self.step += 1
        return loss

    def assign(self) -> None:
        """Set ``p.grad`` to the mean over all chunks, None for parameters that no chunk used."""
        for p, g in zip(self.accumulator.params, self.accumulator.mean(), strict=True):
            p.grad = g

    def rollback(self) -> None:
        """Put all buffers and the count of steps back to what they were before the last call."""
        self._before.restore()
        self.step = self._step_before

    def state_dict(self) -> dict[str, int]:
        """Return what has to be saved to go on later: the number of calls."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved :meth:`state_dict`."""
        self.step = int(state["step"])

    def _trainable(self) -> list[Tensor]:
        params = self.model.parameters() if self._given is None else self._given
        found = [p for p in params if p.requires_grad]
        if not found:
            raise ValueError("model has no parameters that require grad: there is nothing to train")
        return found

    def _coefficient(self) -> float | Tensor | None:
        """Lambda for this step; None where no second pass is needed."""
        if self.penalty is None:
            return None
        if self.penalty.method == "exact":
            refuse_compiled(self.model)
        value = self.penalty.coefficient_at(getattr(self, "step", 0), self.optimizer)
        return None if isinstance(value, (int, float)) and value == 0 else value

    def _prepare(self, coefficient: float | Tensor | None) -> None:
        params = self._trainable()
        if [id(p) for p in params] != [id(p) for p in self.accumulator.params]:
            self.accumulator = GradientAccumulator(params, self.accumulator.accumulation)
        else:
            self.accumulator.reset()
        for p in params:
            p.grad = None
        shifts = coefficient is not None and self.penalty.method != "exact"
        if shifts:
            groups = self.accumulator.groups
            if self._shift is None or not self._shift.fits(groups):
                self._shift = Shift(groups)
            self._shift.begin()
            self._random = RandomState({p.device for p in params})

    def _visit(self, coefficient: float | Tensor | None) -> Tensor:
        losses: list[Tensor] = []
        squares: list[Tensor] = []
        weights: list[float] = []
        if coefficient is not None:
            device = self.accumulator.params[0].device
            if isinstance(coefficient, Tensor):
                coefficient = coefficient.detach().reshape(()).to(device, torch.float64)
            else:  # filled there: a copy from the host would wait for the device
                coefficient = torch.full((), coefficient, dtype=torch.float64, device=device)
        for index, chunk in enumerate(self.chunks):
            weight = weigh(index, chunk, self.weight)
            loss, square = self._chunk(index, chunk, weight, coefficient)
            losses.append(loss)
            weights.append(weight)
            if square is not None:
                squares.append(square)
        if not losses:
            raise ValueError("chunks is empty: there is no sample to average over")
        self._statistics.commit(self.accumulator.total_weight)
        self.mean_sqnorm = _mean(squares, weights) if squares else None
        wide = losses[-1].dtype == torch.float64
        return _mean(losses, weights).to(torch.float64 if wide else torch.float32)

    def _chunk(
        self, index: int, chunk: Any, weight: float, coefficient: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add one chunk's gradient; return its loss and, with a penalty, ||g||^2 (float64)."""
        exact = coefficient is not None and self.penalty.method == "exact"
        shifts = coefficient is not None and not exact
        before = self._random.get() if shifts else None
        loss = self._forward(index, chunk, first=True)
        grads = self._gradient(loss, create_graph=exact)
        self._statistics.record(weight)
        loss = loss.detach()  # its graph holds the activations that the next pass needs room for
        if coefficient is None:
            self.accumulator.add_parts(self.accumulator.gather(grads), weight)
            return loss, None
        if exact:
            return loss, self._add_exact(grads, weight, coefficient)
        return loss, self._add_shifted(index, chunk, grads, weight, coefficient, before)

    def _add_exact(
        self, grads: Sequence[Tensor | None], weight: float, coefficient: Tensor
    ) -> Tensor:
        accumulator = self.accumulator
        products = hessian_gradient_product([g for g in grads if g is not None], accumulator.params)
        parts = accumulator.gather([None if g is None else g.detach() for g in grads])
        accumulator.add_parts(parts, weight)
        accumulator.add_parts(accumulator.groups.gather(products, "plus"), weight, coefficient)
        return _ops.squared_norm([g for part in parts for g in part])

    def _add_shifted(
        self,
        index: int,
        chunk: Any,
        grads: Sequence[Tensor | None],
        weight: float,
        coefficient: Tensor,
        before: list[Tensor],
    ) -> Tensor:
        radius, gather = self.penalty.radius, self.accumulator.gather
        parts = gather(grads)
        square = self._shift.fill(parts, radius)
        after = self._random.get()
        self._between.save()
        try:
            plus = gather(self._shifted_gradient(index, chunk, before), "plus")
            minus = []
            if self.penalty.method == "central":
                self._between.restore()
                self._shift.fill(parts, -radius, square)
                minus = gather(self._shifted_gradient(index, chunk, before), "minus")
        finally:
            torch.clear_autocast_cache()
            self._random.set(after)
            self._between.restore()
        self.accumulator.add_penalised(parts, plus, minus, weight, coefficient, square, radius)
        return square

    def _shifted_gradient(
        self, index: int, chunk: Any, draws: list[Tensor]
    ) -> Sequence[Tensor | None]:
        self._random.set(draws)
        with self._shift.applied():
            return self._gradient(self._forward(index, chunk, first=False))

    def _forward(self, index: int, chunk: Any, *, first: bool) -> Tensor:
        # Autocast keeps the weights it has cast, by parameter: those know nothing of the shift.
        torch.clear_autocast_cache()
        with torch.enable_grad(), self._autocast():
            if self.evaluate is not None:
                loss = self.evaluate(self.model, chunk)
            else:
                inputs, target = pair(index, chunk)
                output = self.model(inputs)
                loss = self.loss_fn(output, target)
        check_loss(index, loss, "evaluate" if self.evaluate else "loss_fn")
        if first and self.observe is not None:
            self.observe(output.detach() if isinstance(output, Tensor) else output, target)
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

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.accumulator.params[0].device.type, dtype=self.autocast)


def _mean(values: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of 0-dim tensors, in float64."""
    wide = torch.stack(values).double()
    return torch.stack(torch._foreach_mul(list(wide.unbind()), weights)).sum() / sum(weights)
