"""Measures of `fbopt analyze` of what a step meets: the curvature along it, the share of it in the
sharpest directions, and what mini-batches see instead of the full batch.
"""

from __future__ import annotations

from fbopt.analysis import (
    batch_sharpness,
    critical_sharpness,
    directional_sharpness,
    loss_gap,
    subspace_share,
)
from fbopt.train.analyze.operators import Values, eigenpairs_of, hessian_of
from fbopt.train.analyze.options import Analysis
from fbopt.train.analyze.runs import Subject


def direction(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The curvature along the gradient, the critical sharpness, and shares in the eigenspace."""
    objective, hessian = subject.objective, hessian_of(subject, options)
    gradient, momentum = objective.gradient(), subject.momentum
    along = directional_sharpness(objective, gradient, hessian=hessian)
    critical = critical_sharpness(objective)
    pairs = eigenpairs_of(hessian, options)
    shares = {"gradient": subspace_share(gradient, pairs)}
    if momentum is not None and any(m is not None and m.any() for m in momentum):
        shares["momentum"] = subspace_share(objective.flatten(momentum), pairs)
    values = {
        "directional_sharpness": along,
        "critical_sharpness": critical.value,
        "critical_step": critical.step,
        "critical_reached": critical.reached,
        "eigenvalues": pairs.values.tolist(),
        "converged": pairs.converged.tolist(),
        "shares": shares,
    }
    bound = "" if critical.reached else " at most"
    words = ", ".join(f"{share:.3g} of the {name}" for name, share in shares.items())
    text = (
        f"along the gradient {along:.4g}; critical sharpness{bound} {critical.value:.4g} = "
        f"2/{critical.step:.4g}; in the space of {len(pairs.values)} eigenvectors {words}"
    )
    if not pairs.converged.all():
        text += " (NOT converged, raise --max-products)"
    return values, text


def batches(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """Batch sharpness, and how far mini-batch losses and gradients are from the full batch's."""
    objective, count = subject.objective, subject.objective.chunks.samples
    sizes = [size for size in options.batch_sizes if size <= count]
    sharp = batch_sharpness(objective, sizes, options.samples, seed=options.seed)
    gaps = loss_gap(objective, sizes, options.samples, seed=options.seed)
    words = [
        f"{one.size} samples: sharpness {one.value:.4g} ± {one.error:.2g}, loss "
        f"{gap.loss_mean:.4g} ± {gap.loss_deviation:.2g}" + _distance(gap.distance_mean)
        for one, gap in zip(sharp, gaps, strict=True)
    ]
    left_out = [size for size in options.batch_sizes if size > count]
    words += [f"{size} samples: left out, the training set has {count:,}" for size in left_out]
    values = {
        "sharpness": [vars(one) for one in sharp],
        "gap": [vars(gap) for gap in gaps],
        "left_out": left_out,
    }
    return values, f"{options.samples} batches of each size; " + "; ".join(words)


def _distance(mean: float | None) -> str:
    return "" if mean is None else f", |g_B - g| {mean:.3g} |g|"
