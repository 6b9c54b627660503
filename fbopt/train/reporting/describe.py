"""A run in two lines for people, printed before its first step."""

from __future__ import annotations

from fbopt.train import models
from fbopt.train.config.options import Options
from fbopt.train.data.augment import describe_sampling
from fbopt.train.trainer import Trainer


def describe(trainer: Trainer) -> str:
    """What is trained, on what data and device, with which hyperparameters."""
    o, device, chunks = trainer.options, str(trainer.device), trainer.chunks
    if not trainer.context.is_single:
        device = f"{trainer.device.type}, {trainer.context.world_size} processes"
    kind, unit = ("mini-batches", "epochs") if o.stochastic else ("chunks", "full-batch steps")
    if o.switch_at:
        unit += f", the first {o.switch_at} of them epochs in mini-batches of {o.batch_size}"
    at_once = f", {o.vectorize} at once" if o.vectorize else ""
    precision = "" if o.precision == "fp32" else f", {o.precision}"
    return (
        f"{o.recipe} on {o.data} ({len(chunks.split):,} samples in {kind} of "
        f"{chunks.size}{at_once}{describe_sampling(o)}): {o.model} with "
        f"{models.count_parameters(trainer.model):,} parameters, {o.passes} {unit}, "
        f"{device}{precision}{', compiled' if o.compile else ''}\nlr {o.lr:g} ({o.warmup} of "
        f"warm-up, {_schedule(o)}), momentum {o.momentum:g}"
        f"{' (Nesterov)' if o.nesterov else ''}, weight decay {o.weight_decay:g}, "
        f"{_clipping(o)}, {_penalty(o)}{_extras(o)}{_sorted_labels(trainer)}"
    )


def _sorted_labels(trainer: Trainer) -> str:
    """A warning where chunks hold few classes, which affects BatchNorm and the penalty."""
    chunks = trainer.chunks
    y = trainer.data.train.y
    if chunks.sampling != "fixed" or len(chunks) == 1 or y[0] == y[-1] or (y.diff() < 0).any():
        return ""
    return (
        "\nwarning: the training samples come in the order of their labels, so that a chunk holds "
        "few classes; shuffle them once in the file, or give --chunks shuffled"
    )


def _schedule(o: Options) -> str:
    if o.schedule == "step":
        return f"times {o.gamma:g} at {o.milestones} of the run"
    if o.schedule == "exponential":
        return f"times {o.gamma:g} per pass"
    floor = f" to {o.floor:g} of it" if o.floor else ""
    return "then constant" if o.schedule == "constant" else f"cosine over {o.cosine}{floor}"


def _clipping(o: Options) -> str:
    chunks = "" if o.chunk_max_norm is None else f", chunks to {o.chunk_max_norm:g}"
    return ("no clipping" if o.max_norm is None else f"clipped to {o.max_norm:g}") + chunks


def _penalty(o: Options) -> str:
    if o.penalty is None:
        return "no penalty"
    if o.method == "exact":
        return f"penalty {o.penalty:g} (exact)"
    return f"penalty {o.penalty:g} ({o.method} differences, radius {o.radius:g})"


def _extras(o: Options) -> str:
    """The options that are off by default."""
    parts = {
        "dropout {}": o.dropout,
        "label smoothing {}": o.label_smoothing,
        "additive noise {}": o.additive_noise,
        "multiplicative noise {}": o.multiplicative_noise,
        "norm bias {}": o.norm_bias,
        "average of the weights {}": o.ema,
        "until fitted for {} passes": o.stop_fitted,
    }
    words = [text.format(f"{value:g}") for text, value in parts.items() if value]
    words += [f"loss of {o.loss} samples alone"] * (o.loss != "cross-entropy")
    words += [f"the worst of {o.max_up} views"] * (o.max_up > 1)
    words += ["float32 sums"] * (o.accumulation == "float32" and o.precision != "fp64")
    return "".join(f", {word}" for word in words)
