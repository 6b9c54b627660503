"""The measures of `fbopt analyze`: each returns plain numbers and a line of text."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fbopt.analysis import (
    Eigenpairs,
    PreconditionedHessian,
    Threshold,
    difference,
    gradient_statistics,
    hessian_trace,
    loss_landscape,
    measure_flatness,
    random_direction,
    stability_threshold,
)
from fbopt.reference import clip_coefficient
from fbopt.train.analyze.operators import Values, eigenpairs_of, hessian_of
from fbopt.train.analyze.options import Analysis
from fbopt.train.analyze.runs import Subject
from fbopt.train.analyze.spectra import fisher, rank, spectrum
from fbopt.train.analyze.steps import batches, direction
from fbopt.train.checkpoint.resume import check_model
from fbopt.train.config.options import OptionsError
from fbopt.train.config.rules import has_threshold, is_preconditioned
from fbopt.train.curvature import update_rule


def gradient(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """Gradient norms, noise scale, signal-to-noise, and the angle to the momentum."""
    found = gradient_statistics(subject.objective, subject.momentum)
    scale, angle = found.noise_scale, found.momentum_angle
    text = (
        f"|g| {found.gradient_norm:.4g}, chunks {found.chunk_norm_mean:.4g} ± "
        f"{found.chunk_norm_deviation:.4g}; noise scale "
        + ("undefined (no signal above the noise)" if scale is None else f"{scale:.4g} samples")
        + ("" if angle is None else f"; angle to the momentum {angle:.1f}°")
    )
    return found.as_json(), text


def sharpness(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """Extreme eigenvalues of the Hessian, and the threshold of stability."""
    found = eigenpairs_of(hessian_of(subject, options), options)
    values = _values(found) | {"ends": options.ends, "method": options.products}
    worst = float((found.residuals / np.abs(found.values)).max())
    eigenvalues = ", ".join(f"{value:.4g}" for value in found.values)
    text = f"eigenvalues {eigenvalues}; residuals ≤ {worst:.1e} of them"
    if not found.converged.all():
        text += f", NOT converged after {found.products} products (raise --max-products)"
    stability, words = _stability(subject, options)
    return values | stability, f"{text}; {words}"


def _stability(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The threshold of the run's update rule, with the eigenvalue that it is on."""
    run, clip = subject.run, _clip(subject)
    if is_preconditioned(run.options):
        return _preconditioned(subject, options, clip)
    if not has_threshold(run.options):
        unknown = {"threshold": None, "threshold_formula": None}
        return unknown, "no threshold of stability is known for this run's steps"
    rule = update_rule(run) | {"clip": clip}
    threshold = stability_threshold(**rule)
    text = f"steps are stable below {threshold.value:.4g} = {threshold.formula}"
    return _threshold(threshold) | {"rule": rule}, text


def _preconditioned(subject: Subject, options: Analysis, clip: float) -> tuple[Values, str]:
    """The largest eigenvalue of the preconditioned Hessian, beside its threshold."""
    seen = PreconditionedHessian(
        subject.objective,
        subject.run.optimizer,
        clip=clip,
        method=options.products,
        radius=options.radius,
    )
    found = eigenpairs_of(seen, replace(options, eigenvalues=1, ends="largest"))
    values = _values(found) | _threshold(seen.threshold) | {"clip": clip}
    text = (
        f"preconditioned as by {subject.run.options.optimizer} {found.values[0]:.4g}"
        f"{'' if found.converged.all() else ' (NOT converged)'}; steps are stable below "
        f"{seen.threshold.value:.4g} = {seen.threshold.formula}"
    )
    # On the Hessian's own eigenvalues there is no threshold.
    return {"threshold": None, "threshold_formula": None, "preconditioned": values}, text


def _values(found: Eigenpairs) -> Values:
    return {
        "eigenvalues": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "converged": found.converged.tolist(),
        "products": found.products,
    }


def _threshold(threshold: Threshold) -> Values:
    value = threshold.value if np.isfinite(threshold.value) else None
    return {"threshold": value, "threshold_formula": threshold.formula}


def trace(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The trace of the Hessian."""
    found = hessian_trace(hessian_of(subject, options), options.samples, options.seed)
    return vars(found).copy(), f"{found.value:.4g} ± {found.error:.2g} (n = {found.samples})"


def flatness(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The distance at which the loss has risen by the threshold."""
    found = measure_flatness(
        subject.objective,
        options.threshold,
        options.directions,
        seed=options.seed,
        vectors=options.vectors,
    )
    text = f"{found.mean:.4g} ± {found.error:.2g} filter norms to a loss {found.threshold:g} higher"
    if found.reached < options.directions:
        text += f"; a lower bound, {found.reached} of {options.directions} directions reach it"
    return found.as_json(), text


def landscape(subject: Subject, options: Analysis, dimensions: int) -> tuple[Values, str]:
    """The loss along one random direction, or in the plane of two."""
    directions = [
        random_direction(subject.objective, options.seed, index, vectors=options.vectors)
        for index in range(dimensions)
    ]
    count = options.points if dimensions == 1 else options.grid
    return _losses(subject, options, directions, np.linspace(-options.span, options.span, count))


MEASURES = {f.__name__: f for f in (gradient, sharpness, trace, flatness)} | {
    "line": partial(landscape, dimensions=1),
    "plane": partial(landscape, dimensions=2),
    **{f.__name__: f for f in (spectrum, fisher, rank, direction, batches)},
}


def between(subjects: list[Subject], options: Analysis) -> tuple[Values, str]:
    """The loss on the line through two runs, or in the plane through three, of the first's model.

    Coordinates are shares of the way to the second and to the third run: two runs are at 0 and 1,
    three at (0, 0), (1, 0) and (0, 1).
    """
    first, *others = subjects
    directions = []
    for other in others:
        check_model(str(other.folder), other.state["model"], first.run.model.state_dict())
        if other.run.options.data != first.run.options.data:
            raise OptionsError(f"--between: {other.folder} and {first.folder} have different data")
        state = {k: v.to(first.run.device) for k, v in other.state["model"].items()}
        directions.append(difference(first.objective, state, str(other.folder)))
    count = options.points if len(directions) == 1 else options.grid
    axis = np.union1d(np.linspace(-0.25, 1.25, count), [0.0, 1.0])
    values, text = _losses(first, options, directions, axis)
    return values | {"names": [s.name for s in subjects]}, text


def count_passes(name: str, subject: Subject, options: Analysis) -> int | None:
    """The number of passes over the chunks that a measure takes, None if unknown beforehand."""
    line, plane, samples = options.points, options.grid**2, options.samples
    trace = {"exact": samples, "central": 2 * samples, "forward": samples + 1}[options.products]
    known = {"gradient": 1, "trace": trace, "line": line, "plane": plane, "fisher": 2, "rank": 2}
    known["between"] = line if len(options.runs) == 2 else plane
    checks = 0 if subject.objective.is_deterministic else 3
    return known[name] + checks if name in known else None


def _clip(subject: Subject) -> float:
    """The share of the full-batch gradient of L that the next step would follow: what clipping
    leaves, and --mean running.
    """
    run = subject.run
    bound: float | Tensor | None = run.options.max_norm
    total = 1.0
    if run.grad_transform is not None:
        bound, total = run.grad_transform.bound(), run.grad_transform.total
    if bound is None or bound == math.inf:
        return total
    gradient = subject.objective.gradient().double() * total
    order = float(run.options.norm_type)
    return total * float(clip_coefficient(bound, torch.linalg.vector_norm(gradient, order)))


def _losses(
    subject: Subject, options: Analysis, directions: list[Tensor], axis: np.ndarray
) -> tuple[Values, str]:
    found = loss_landscape(subject.objective, directions, [axis] * len(directions))
    has_batchnorm = any(isinstance(m, _BatchNorm) for m in subject.run.model.modules())
    conditions = {
        "batchnorm": options.batchnorm if has_batchnorm else "none",
        "vectors": options.vectors,
        "seed": options.seed,
    }
    text = f"loss from {np.nanmin(found.losses):.4g} to {np.nanmax(found.losses):.4g}"
    return found.as_json() | conditions, text
