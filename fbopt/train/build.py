"""The parts of a run from its resolved options: model, chunks, optimizer, closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.train import models
from fbopt.train.config.networks import LAYERS
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.augment import augmented
from fbopt.train.data.dataset import Chunks, Data, Split
from fbopt.train.grad_transforms import GradientTransform
from fbopt.train.precision import autocast_dtype, parameter_dtype


def build_model(options: Options, data: Data, device: torch.device) -> nn.Module:
    """The network, with the initial weights that the seed gives. Raises OptionsError."""
    torch.manual_seed(options.seed)
    given = {name: getattr(options, name) for name in LAYERS}
    layers = {name: value for name, value in given.items() if value is not None}
    try:
        model = models.build(
            options.model, data.shape, data.classes, options.width, options.dropout, **layers
        )
    except ValueError as error:
        raise OptionsError(str(error)) from error
    model = model.to(device, parameter_dtype(options.precision)).train()
    if len(data.shape) == 3 and options.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def build_chunks(options: Options, split: Split, *, stochastic: bool, **context: Any) -> Chunks:
    """The mini-batches of an epoch (`stochastic`), or the chunks of a full-batch step.

    `context` is what `Chunks` needs to know of the run: current_pass, before_chunk, rank,
    world_size.
    """
    return Chunks(
        augmented(split, options, one_replica_per_pass=stochastic),
        options.batch_size if stochastic else options.chunk_size,
        sampling=options.chunks if options.stochastic == stochastic else "shuffled",
        seed=options.seed,
        group=1 if stochastic else options.vectorize or 1,
        **context,
    )


def build_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """`torch.optim.SGD` for mini-batches alone, else FullBatchGD, which also clips."""
    groups = models.decay_groups(model, options.weight_decay, options.decay == "weights")
    rule = {name: getattr(options, name) for name in ("lr", "momentum", "nesterov")}
    if options.stochastic:
        return torch.optim.SGD(groups, **rule)
    max_norm = None if _transforms_gradient(options) else options.max_norm
    return FullBatchGD(groups, **rule, max_norm=max_norm)


def build_grad_transform(options: Options, model: nn.Module) -> GradientTransform | None:
    """Norm bias, clipping and noise; None where the optimizer's own clipping is all there is."""
    return GradientTransform(model.parameters(), options) if _transforms_gradient(options) else None


def _transforms_gradient(options: Options) -> bool:
    return bool(options.norm_bias or options.additive_noise or options.multiplicative_noise)


def build_closure(
    options: Options,
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    chunks: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    **context: Any,
) -> FullBatchClosure:
    """The full-batch closure with the options' penalty and chunk clipping.

    `context` is passed on: observe, on_pass_start, process_group.
    """
    penalty = None
    if options.penalty is not None:
        penalty = GradientPenalty(
            strength=options.penalty, radius=options.radius, method=options.method
        )
    return FullBatchClosure(
        model,
        loss_fn,
        chunks,
        penalty=penalty,
        optimizer=optimizer,
        accumulation=options.accumulation,
        autocast=autocast_dtype(options.precision),
        cuda_graph=options.cuda_graph and next(model.parameters()).is_cuda,
        chunk_max_norm=options.chunk_max_norm,
        chunk_norms=options.chunk_norms,
        vectorize=options.vectorize or 1,
        compile=options.compile,
        **context,
    )
