"""What a run is going to do, in two lines for people."""

from __future__ import annotations

from fbopt.train import models
from fbopt.train.config.options import Options
from fbopt.train.data.augment import Augmented, sampling
from fbopt.train.trainer import Run


def describe(run: Run) -> str:
    """What is trained on what and where, and the hyperparameters."""
    o, where = run.options, str(run.device)
    if run.world.size > 1:
        where = f"{run.device.type}, {run.world.size} processes"
    kind, unit = ("mini-batches", "epochs") if o.stochastic else ("chunks", "full-batch steps")
    if o.switch_at:
        unit += f", the first {o.switch_at} of them epochs in mini-batches of {o.batch_size}"
    return (
        f"{o.recipe} on {o.data} ({len(run.chunks.split):,} samples in {kind} of "
        f"{run.chunks.size}{sampling(o)}): {o.model} with "
        f"{models.count_parameters(run.model):,} parameters, {o.passes} {unit}, "
        f"{where}{_speed(o)}\nlr {o.lr:g} ({o.warmup} of warm-up, cosine over {o.cosine}), "
        f"momentum {o.momentum:g}{' (Nesterov)' if o.nesterov else ''}, weight decay "
        f"{o.weight_decay:g}, {_clipping(o)}, {_penalty(o)}{_more(o)}{_sorted(run)}"
    )


def _sorted(run: Run) -> str:
    """A warning where chunks hold few classes, which BatchNorm and the penalty feel."""
    chunks, split = run.chunks, run.chunks.split
    y = (split.split if isinstance(split, Augmented) else split).y
    if chunks.sampling != "fixed" or len(chunks) == 1 or y[0] == y[-1] or (y.diff() < 0).any():
        return ""
    return (
        "\nwarning: the training samples come in the order of their labels, so that a chunk holds "
        "few classes; shuffle them once in the file, or give --chunks shuffled"
    )


def _speed(o: Options) -> str:
    parts = ["" if o.precision == "fp32" else o.precision, "compiled" if o.compile else ""]
    return "".join(f", {part}" for part in parts if part)


def _clipping(o: Options) -> str:
    chunks = "" if o.chunk_max_norm is None else f", chunks to {o.chunk_max_norm:g}"
    return ("no clipping" if o.max_norm is None else f"clipped to {o.max_norm:g}") + chunks


def _penalty(o: Options) -> str:
    if o.penalty is None:
        return "no penalty"
    if o.method == "exact":
        return f"penalty {o.penalty:g} (exact)"
    return f"penalty {o.penalty:g} ({o.method} differences, radius {o.radius:g})"


def _more(o: Options) -> str:
    """What is off by default."""
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
    words += ["exact sums"] * (o.accumulation == "exact")
    return "".join(f", {word}" for word in words)
