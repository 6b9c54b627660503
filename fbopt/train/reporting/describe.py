"""A run in two lines for people, printed before its first step."""

from __future__ import annotations

from fbopt.train import models
from fbopt.train.config.options import Options
from fbopt.train.config.rules import OWN, has_threshold
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
        f"{o.recipe} on {o.data} ({chunks.samples:,} samples in {kind} of "
        f"{chunks.size}{at_once}{describe_sampling(o)}): {o.model} with "
        f"{models.count_parameters(trainer.model):,} parameters, {o.passes} {unit}, "
        f"{device}{precision}{', compiled' if o.compile else ''}\nlr {o.lr:g} ({o.warmup} of "
        f"warm-up, {_schedule(o)}), {_rule(o)}weight decay {o.weight_decay:g}, "
        f"{_clipping(o)}, {_perturbation(o)}{_extras(o)}{_unknown_threshold(o)}"
        f"{_sorted_labels(trainer)}"
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


def _rule(o: Options) -> str:
    """The update rule, but for sgd, and its own options."""
    words = [] if o.optimizer == "sgd" else [o.optimizer]
    for name in OWN:
        if name != "nesterov" and (value := getattr(o, name)) is not None:
            nesterov = " (Nesterov)" if name == "momentum" and o.nesterov else ""
            words.append(f"{name} {value:g}{nesterov}")
    if o.line_search is not None:
        words.append(f"line search {o.line_search}")
    if o.history is not None:
        words.append(f"{o.history} pairs, up to {o.iterations} iterations a step")
    return "".join(f"{word}, " for word in words)


def _unknown_threshold(o: Options) -> str:
    """A note where the sharpness is tracked, but nobody knows what it should stay below."""
    if "sharpness" not in o.tracked or has_threshold(o):
        return ""
    searched = f"--line-search {o.line_search}" if o.line_search else f"--optimizer {o.optimizer}"
    whose = "--agc" if o.agc else searched
    return f"\nnote: no threshold of stability is known for {whose}, so none is logged"


def _schedule(o: Options) -> str:
    if o.schedule == "step":
        return f"times {o.gamma:g} at {o.milestones} of the run"
    if o.schedule == "exponential":
        return f"times {o.gamma:g} per pass"
    floor = f" to {o.floor:g} of it" if o.floor else ""
    return "then constant" if o.schedule == "constant" else f"cosine over {o.cosine}{floor}"


def _clipping(o: Options) -> str:
    """The bounds of the gradient: of its units, as a whole, and of every chunk's."""
    order = "" if o.norm_type == 2 else f" ({o.norm_type}-norm)"
    parts = {
        "units to {:g} of their weights": o.agc,
        "clipped to {:g}": o.max_norm,
        "clipped to the largest norm of {} steps": o.clip_history,
        "chunks to {:g}": o.chunk_max_norm,
    }
    words = [text.format(value) for text, value in parts.items() if value is not None]
    if o.max_norm is None and o.clip_history is None:
        words.insert(0, "no clipping")
    return ", ".join(words) + order


def _perturbation(o: Options) -> str:
    if o.perturbation in ("sam", "asam"):
        share = "" if o.sam_share == 1 else f", share {o.sam_share:g}"
        central = ", central differences" if o.method == "central" else ""
        return f"{o.perturbation.upper()} (rho {o.rho:g}, {o.scope}{share}{central})"
    if o.penalty is None:
        return "no penalty"
    exact = o.method == "exact"
    how = "exact" if exact else f"{o.method} differences, radius {o.radius:g}"
    full = f" and {o.full_penalty:g} of the whole gradient" if o.full_penalty else ""
    norm = "of the norm " if o.perturbation == "gnp" else ""
    return f"penalty {norm}{o.penalty:g}{full} ({how})"


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
    words += ["loss of misclassified samples alone"] * (o.loss == "misclassified")
    words += ["squared error"] * (o.loss == "squared")
    words += [f"the worst of {o.max_up} views"] * (o.max_up > 1)
    words += ["float32 sums"] * (o.accumulation == "float32" and o.precision != "fp64")
    return "".join(f", {word}" for word in words)
