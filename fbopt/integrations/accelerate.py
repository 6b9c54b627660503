"""Accelerate: GradientAccumulator and FullBatchClosure for what ``accelerator.prepare`` returns.
Chunks of all processes count by their weights, g = sum_c w_c g_c / sum_c w_c.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn

from fbopt._engine.backward import is_taken
from fbopt.accumulate import GradientAccumulator
from fbopt.closure import FullBatchClosure


class AcceleratedAccumulator(GradientAccumulator):
    """The :class:`fbopt.GradientAccumulator` that :func:`accumulator` makes."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, accumulation: str) -> None:
        self.accelerator, self.model = accelerator, model
        group = _process_group(accelerator)
        named = dict(_trainable(model))
        params = list(named.values())
        super().__init__(params, accumulation, process_group=group)
        self._known = set(named)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = model.require_forward_param_sync = False
            for p in params:
                p.register_post_accumulate_grad_hook(_refuse_outside)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def chunk(self, weight: float | Tensor = 1.0) -> Iterator[None]:
        """As :meth:`fbopt.GradientAccumulator.chunk`; ``accelerator.backward`` does not divide."""
        steps = self.accelerator.gradient_accumulation_steps
        self.accelerator.gradient_accumulation_steps = 1
        try:
            with super().chunk(weight):
                yield
        finally:
            self.accelerator.gradient_accumulation_steps = steps

    def backward(self, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """As :meth:`fbopt.GradientAccumulator.backward`, with the accelerator's loss scale."""
        scaler = self.accelerator.scaler
        super().backward(loss if scaler is None else scaler.scale(loss), weight)

    def to_grad(self) -> None:
        """As :meth:`fbopt.GradientAccumulator.to_grad`; and share the first process's buffers.

        DistributedDataParallel shares them before every forward pass, which waits for the others.
        """
        super().to_grad()
        if getattr(self.model, "broadcast_buffers", False):
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _begin(self, weight: float | Tensor) -> float:
        if new := [name for name, _ in _trainable(self.model) if name not in self._known]:
            raise ValueError(
                f"{new[0]} has begun to require grad since this accumulator was made: make a new "
                "one"
            )
        return super()._begin(weight)


def _refuse_outside(param: Tensor) -> None:
    if not is_taken(param):
        raise RuntimeError(
            "a backward pass outside of accumulator.chunk(): its gradients would not be averaged "
            "over the processes, which the accumulator does in to_grad() alone"
        )


def accumulator(
    accelerator: Accelerator, model: nn.Module, accumulation: str = "float32"
) -> AcceleratedAccumulator:
    """Return an accumulator of the gradients that ``accelerator.backward`` makes.

    Within ``chunk(weight)`` the loss is not divided by ``gradient_accumulation_steps``, and
    DistributedDataParallel sends nothing: ``to_grad()`` sums over the processes, once, and they may
    have different numbers of chunks. Then ``accelerator.clip_grad_norm_`` and ``optimizer.step()``
    are as always, also under fp16 with its loss scale. ``save_state`` keeps the accumulator's
    state.

    Args:
        accelerator: the accelerator that prepared the model.
        model: as ``accelerator.prepare`` returned it. From then on a backward pass outside of
            ``chunk`` is an error where the model is a DistributedDataParallel.
        accumulation: see :class:`fbopt.GradientAccumulator`.

    Raises:
        ValueError: DeepSpeed, Megatron-LM, FSDP1, XLA, or a parallelism that splits a sample.

    Example:
        >>> accumulator = fbopt.integrations.accelerate.accumulator(accelerator, model)
        >>> for batch in window:
        ...     with accumulator.chunk(weight=tokens(batch)):
        ...         accelerator.backward(model(**batch).loss)
        >>> accumulator.to_grad()
        >>> accelerator.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    made = AcceleratedAccumulator(accelerator, model, accumulation)
    accelerator.register_for_checkpointing(made)
    return made


class AcceleratedClosure(FullBatchClosure):
    """The :class:`fbopt.FullBatchClosure` that :func:`closure` makes.

    Attributes:
        loss: what the last call returned, or None: a prepared optimizer's ``step`` returns None.
    """

    loss: Tensor | None = None
    _accelerator: Accelerator

    def _accumulate(self, optimizer: torch.optim.Optimizer | None) -> Tensor:
        self._warn_of_fast_schedules()
        self.loss = super()._accumulate(optimizer)
        return self.loss

    def _warn_of_fast_schedules(self) -> None:
        processes = self._accelerator.num_processes
        fast = any(s.step_with_optimizer for s in self._accelerator._schedulers)
        if self.step == 0 and processes > 1 and fast and not self._accelerator.split_batches:
            warnings.warn(
                f"the prepared scheduler goes {processes} steps forward at every step, once for "
                "each process: with Accelerator(step_scheduler_with_optimizer=False) it goes one",
                RuntimeWarning,
                stacklevel=2,
            )


def closure(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    chunks: Iterable[Any] | None = None,
    **options: Any,
) -> AcceleratedClosure:
    """Return a closure over a prepared model and data loader, for ``optimizer.step(closure)``.

    Every process visits its share of the samples, each sample once: a prepared loader that would
    repeat some to make shards equal does not do so here. ``save_state`` keeps the closure's state.
    The mean loss is in ``closure.loss``.

    Args:
        accelerator: the accelerator that prepared them.
        model: as ``accelerator.prepare`` returned it, with its mixed precision.
        loss_fn: as for :class:`fbopt.FullBatchClosure`.
        chunks: a prepared DataLoader, or what this process alone visits, on its device.
        **options: the other arguments of :class:`fbopt.FullBatchClosure`; the process group is the
            accelerator's.

    Raises:
        ValueError: fp16; DeepSpeed, Megatron-LM, FSDP1, XLA, or a parallelism that splits a sample;
            a loader that repeats samples, ``dispatch_batches`` or an iterable dataset.
    """
    if accelerator.scaler is not None:
        raise ValueError(
            'mixed_precision="fp16" scales the losses, which a closure must not: use "bf16"'
        )
    options.setdefault("process_group", _process_group(accelerator))
    if isinstance(chunks, (DataLoaderShard, DataLoaderDispatcher)):
        chunks = _EveryOnce(chunks, accelerator.num_processes)
    made = AcceleratedClosure(accelerator.unwrap_model(model), loss_fn, chunks, **options)
    made._accelerator = accelerator
    accelerator.register_for_checkpointing(made)
    return made


class _EveryOnce:
    """A prepared loader without repeated samples: processes may get different numbers of chunks."""

    def __init__(self, loader: Any, processes: int) -> None:
        self._loader = loader
        self._sampler = getattr(loader, "batch_sampler", None)
        dispatched = isinstance(loader, DataLoaderDispatcher)
        if processes > 1 and (dispatched or not isinstance(self._sampler, BatchSamplerShard)):
            raise ValueError(
                "chunks is a DataLoader that repeats samples where processes have unequal shares: "
                "use DataLoaderConfiguration(dispatch_batches=False), and a dataset with a length"
            )

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self._sampler, BatchSamplerShard):
            yield from self._loader
            return
        even, self._sampler.even_batches = self._sampler.even_batches, False
        try:
            yield from self._loader
        finally:
            self._sampler.even_batches = even


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # By name: FSDP2 has other tensors in their places between forward and backward.
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _process_group(accelerator: Accelerator) -> Any:
    """Return the processes that have different data; refuse what reduces gradients by itself."""
    kind, plan = accelerator.distributed_type.value, accelerator.parallelism_config
    of_its_own = kind in {"DEEPSPEED", "MEGATRON_LM", "XLA"}
    of_its_own |= kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2
    if of_its_own or (plan is not None and plan.non_dp_dim_names):
        found = kind if plan is None else f"{kind} with {plan}"
        raise ValueError(
            f"{found} keeps or reduces gradients by itself, so that chunks cannot be "
            "weighed: use one process, DistributedDataParallel or FSDP2, and for tensor parallel "
            "models fbopt.GradientAccumulator itself"
        )
    return torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
