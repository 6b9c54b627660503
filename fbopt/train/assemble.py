"""A run's parts as its options say: the model, the optimizer, its closure, its learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.train import models
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.augment import augmented
from fbopt.train.data.dataset import Chunks, Data
from fbopt.train.grad_transforms import GradientChange

if TYPE_CHECKING:
    from fbopt.train.trainer import Run


def model(options: Options, data: Data, device: torch.device) -> nn.Module:
    """The network, with the initial weights that the seed gives. Raises OptionsError."""
    o = options
    torch.manual_seed(o.seed)
    try:
        built = models.build(o.model, data.shape, data.classes, o.width, o.dropout)
    except ValueError as error:
        raise OptionsError(str(error)) from error
    built = built.to(device).train()
    if len(data.shape) == 3 and o.channels_last:
        built.to(memory_format=torch.channels_last)
    return built


def visits(run: Run, stochastic: bool) -> Chunks:
    """The mini-batches of an epoch, or the chunks of a full-batch step."""
    o = run.options
    return Chunks(
        augmented(run.data.train, o, in_turn=stochastic),
        o.batch_size if stochastic else o.chunk_size,
        begin=run.seed_draws,
        sampling=o.chunks if o.stochastic == stochastic else "shuffled",
        seed=o.seed,
        now=lambda: run.place[0],
        rank=run.world.rank,
        processes=run.world.size,
    )


def optimizer(run: Run) -> None:
    """Give the run its optimizer and scheduler and, for full batch, what computes its gradient."""
    o = run.options
    parameters = models.decaying(run.model, o.weight_decay, o.decay == "weights")
    common = {name: getattr(o, name) for name in ("lr", "momentum", "nesterov")}
    if o.stochastic:
        run.optimizer = torch.optim.SGD(parameters, **common)
    else:
        if GradientChange.wanted(o):
            run.change = GradientChange(list(run.model.parameters()), o)
        max_norm = None if run.change else o.max_norm
        run.optimizer = FullBatchGD(parameters, **common, max_norm=max_norm)
        run.closure = closure(run)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda done: rate_factor(done, o.warmup, o.cosine)
    )


def closure(run: Run) -> FullBatchClosure:
    """What fills in the full gradient, in chunks."""
    o, penalty = run.options, None
    if o.penalty is not None:
        penalty = GradientPenalty(strength=o.penalty, radius=o.radius, method=o.method)
    return FullBatchClosure(
        run.model,
        run.loss_fn,
        run.chunks,
        penalty=penalty,
        optimizer=run.optimizer,
        accumulation=o.accumulation,
        chunk_max_norm=o.chunk_max_norm,
        chunk_norms=o.chunk_norms,
        observe=run.observe,
        on_pass_start=run.correct.zero_,  # exact sums may visit the chunks again
        autocast=run.autocast,
        cuda_graph=o.cuda_graph and run.device.type == "cuda",
        process_group=run.world.group,
    )


def rate_factor(done: int, warmup: int, cosine: int) -> float:
    """The learning rate after `done` passes, as a share of its peak.

    Linear over `warmup` passes, then a cosine over `cosine` more (arXiv 2109.14119, section 4).
    """
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / cosine)))
