"""The parts of a run from its resolved options: model, chunks, optimizer, closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty, SharpnessAware
from fbopt.train import models
from fbopt.train.config.networks import LAYERS
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.augment import augmented
from fbopt.train.data.dataset import Chunks, Data, Split
from fbopt.train.grad_transforms import GradientTransform
from fbopt.train.memory import check_fits
from fbopt.train.optimizers import rules
from fbopt.train.precision import autocast_dtype, parameter_dtype


def build_model(options: Options, data: Data, device: torch.device) -> nn.Module:
    """The network, with the initial weights that the seed gives. Raises OptionsError."""
    _check_memory(options, data, device)
    torch.manual_seed(options.seed)
    model = _network(options, data)
    if options.residual_init == "one":
        models.start_branches_at_one(model)
    model = model.to(device, parameter_dtype(options.precision)).train()
    if len(data.shape) == 3 and options.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def _network(options: Options, data: Data) -> nn.Module:
    given = {name: getattr(options, name) for name in LAYERS}
    layers = {name: value for name, value in given.items() if value is not None}
    try:
        return models.build(
            options.model, data.shape, data.classes, options.width, options.dropout, **layers
        )
    except ValueError as error:
        raise OptionsError(str(error)) from error


def _check_memory(options: Options, data: Data, device: torch.device) -> None:
    """Refuse a model or chunks that cannot fit. Raises OptionsError."""
    try:
        with torch.device("meta"):
            model = _network(options, data)
    except RuntimeError as error:  # more numbers than can be counted
        raise OptionsError(
            f"--model {options.model}, --width {options.width}: has too many parameters; give a "
            "smaller --width"
        ) from error
    together = 1 if options.stochastic else options.vectorize or 1
    size = options.batch_size if options.stochastic else options.chunk_size
    samples = min(size * together, len(data.train) * (options.replicas or 1)) * options.max_up
    check_fits(options, model, data.shape, samples, device)


def build_chunks(options: Options, split: Split, *, stochastic: bool, **context: Any) -> Chunks:
    """The mini-batches of an epoch (`stochastic`), or the chunks of a full-batch step.

    `context` is what `Chunks` needs to know of the run: current_pass, before_chunk, rank,
    world_size.
    """
    chunks = Chunks(
        augmented(split, options, one_replica_per_pass=stochastic),
        options.batch_size if stochastic else options.chunk_size,
        sampling=options.chunks if options.stochastic == stochastic else "shuffled",
        seed=options.seed,
        group=1 if stochastic else options.vectorize or 1,
        drop_last=options.last_chunk == "drop",
        **context,
    )
    if not chunks:
        raise OptionsError(
            f"--last-chunk drop leaves nothing of {len(chunks.split)} samples in chunks of "
            f"{chunks.size}; give a smaller --{'batch' if stochastic else 'chunk'}-size"
        )
    return chunks


def build_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """`torch.optim.SGD` for mini-batches alone, else FullBatchGD, which also clips; or the rule of
    --optimizer.
    """
    groups = models.decay_groups(model, options.weight_decay, options.decay == "weights")
    if options.optimizer != "sgd":
        return rules.build(options, model, groups)
    rule = {name: getattr(options, name) for name in ("lr", "momentum", "nesterov")}
    if options.stochastic:
        return torch.optim.SGD(groups, **rule)
    clip = {"max_norm": None if _transforms_gradient(options) else options.max_norm}
    search = {"norm_type": options.norm_type, "line_search": options.line_search}
    return FullBatchGD(groups, **rule, **clip, **search)


def build_grad_transform(
    options: Options, model: nn.Module, chunks: Chunks
) -> GradientTransform | None:
    """Norm bias, clipping and noise; None where the optimizer's own clipping is all there is."""
    if not _transforms_gradient(options):
        return None
    last = rules.last_linear(model)
    spared = set() if last is None else set(last.parameters())
    return GradientTransform(model.parameters(), options, spared, len(chunks))


def _transforms_gradient(options: Options) -> bool:
    noise = options.additive_noise or options.multiplicative_noise
    clips = options.agc or options.clip_history or options.optimizer not in ("sgd", "lbfgs")
    return bool(options.norm_bias or noise or clips or options.mean == "running")


def build_perturbation(options: Options) -> GradientPenalty | SharpnessAware | None:
    """The penalty or the sharpness-aware rule; None for gradients at the parameters alone."""
    kind = options.perturbation
    if kind in ("sam", "asam"):
        return SharpnessAware(
            options.rho,
            adaptive=kind == "asam",
            scope=options.scope,
            alpha=options.sam_share,
            method=options.method,
        )
    if options.penalty is None:
        return None
    half = options.central_radius == "half"
    return GradientPenalty(
        options.penalty,
        options.radius / 2 if half else options.radius,
        options.method,
        power=1 if kind == "gnp" else 2,
        full_strength=options.full_penalty or 0.0,
    )


def gradients_per_pass(options: Options) -> int:
    """How many gradients of every sample a step with the options' perturbation takes."""
    of_chunk = {None: 1, "forward": 2, "central": 3, "exact": 2}[options.method]
    return of_chunk + (options.scope == "full" or bool(options.full_penalty))


def build_closure(
    options: Options,
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    chunks: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    **context: Any,
) -> FullBatchClosure:
    """The full-batch closure with the options' perturbation and chunk clipping.

    `context` is passed on: weight, observe, on_pass_start, process_group.
    """
    return FullBatchClosure(
        model,
        loss_fn,
        chunks,
        penalty=build_perturbation(options),
        optimizer=optimizer,
        accumulation=options.accumulation or "float32",
        autocast=autocast_dtype(options.precision),
        cuda_graph=bool(options.cuda_graph) and next(model.parameters()).is_cuda,
        chunk_max_norm=options.chunk_max_norm,
        chunk_norms=options.chunk_norms,
        vectorize=options.vectorize or 1,
        compile=options.compile,
        returns="objective" if options.line_search else "loss",
        **context,
    )
