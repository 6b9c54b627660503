"""The measures of `fbopt analyze`, each from a checkpoint to plain numbers and a line of text."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.nn.modules.batchnorm import _BatchNorm

from fbopt.analysis.directions import difference, random_direction
from fbopt.analysis.gradient_noise import gradient_statistics
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.lanczos import eigenpairs
from fbopt.analysis.landscape import loss_landscape, measure_flatness
from fbopt.analysis.stability import stability_threshold
from fbopt.analysis.trace import hessian_trace
from fbopt.train.analyze.options import Analysis
from fbopt.train.analyze.runs import Subject
from fbopt.train.checkpoint.resume import check_model
from fbopt.train.config.options import OptionsError

Values = dict[str, Any]


def gradient(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """Norms, noise scale, signal-to-noise, and the angle to the momentum."""
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
    """Extreme eigenvalues of the Hessian beside the threshold of stability."""
    found = eigenpairs(
        _hessian(subject, options),
        options.eigenvalues,
        options.ends,
        tolerance=options.tolerance,
        max_products=options.max_products,
        seed=options.seed,
    )
    rule, clip = subject.rule, _clip(subject)
    threshold = stability_threshold(**rule, clip=clip)
    values = {
        "eigenvalues": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "converged": found.converged.tolist(),
        "ends": options.ends,
        "products": found.products,
        "method": options.products,
        "threshold": threshold.value if np.isfinite(threshold.value) else None,
        "threshold_formula": threshold.formula,
        "rule": rule | {"clip": clip},
    }
    worst = float((found.residuals / np.abs(found.values)).max())
    eigenvalues = ", ".join(f"{value:.4g}" for value in found.values)
    text = f"eigenvalues {eigenvalues}; residuals ≤ {worst:.1e} of them"
    if not found.converged.all():
        text += f", NOT converged after {found.products} products (raise --max-products)"
    return values, f"{text}; steps are stable below {threshold.value:.4g} = {threshold.formula}"


def trace(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The trace of the Hessian."""
    found = hessian_trace(_hessian(subject, options), options.samples, options.seed)
    return vars(found).copy(), f"{found.value:.4g} ± {found.error:.2g} (n = {found.samples})"


def flatness(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The distance to a rise of the loss."""
    found = measure_flatness(
        subject.objective,
        options.threshold,
        options.directions,
        seed=options.seed,
        vectors=options.vectors,
    )
    text = f"{found.mean:.4g} ± {found.error:.2g} filter norms to a loss {found.threshold:g} higher"
    if found.reached < options.directions:
        text += f"; a bound from below, {found.reached} of {options.directions} directions reach it"
    return found.as_json(), text


def line(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The loss along one random direction."""
    return _landscape(subject, options, 1)


def plane(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The loss in the plane of two random directions."""
    return _landscape(subject, options, 2)


MEASURES = {f.__name__: f for f in (gradient, sharpness, trace, flatness, line, plane)}


def between(subjects: list[Subject], options: Analysis) -> tuple[Values, str]:
    """The loss of the first run's model on the line to the second, or in the plane with a third.

    Coordinates are shares of the differences: the runs lie at 0 and 1, and at (0, 0), (1, 0),
    (0, 1).
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
    found = loss_landscape(first.objective, directions, [axis] * len(directions))
    values = found.as_json() | {"names": [s.name for s in subjects]}
    return values | _conditions(first, options), _range(found.losses)


def passes(name: str, subjects: list[Subject], options: Analysis) -> int | None:
    """How many passes over the chunks a measure takes, where that is known beforehand."""
    if name == "between":
        name = "line" if len(subjects) == 2 else "plane"
    known = {
        "gradient": 1,
        "trace": {"central": 2}.get(options.products, 1) * options.samples,
        "line": options.points,
        "plane": options.grid**2,
    }
    if name == "trace" and options.products == "forward":
        known[name] += 1  # the gradient where the differences begin
    checks = 0 if subjects[0].objective.is_deterministic else 3
    return known[name] + checks if name in known else None


def _hessian(subject: Subject, options: Analysis) -> Hessian:
    return Hessian(subject.objective, options.products, options.radius)


def _clip(subject: Subject) -> float:
    """The coefficient that the next step would scale the full-batch gradient of L by."""
    limit = subject.run.options.max_norm
    if limit is None:
        return 1.0
    norm = float(subject.objective.gradient().double().norm())
    return min(1.0, limit / (norm + 1e-6))


def _landscape(subject: Subject, options: Analysis, dimensions: int) -> tuple[Values, str]:
    directions = [
        random_direction(subject.objective, options.seed, index, vectors=options.vectors)
        for index in range(dimensions)
    ]
    count = options.points if dimensions == 1 else options.grid
    axis = np.linspace(-options.span, options.span, count)
    found = loss_landscape(subject.objective, directions, [axis] * dimensions)
    return found.as_json() | _conditions(subject, options), _range(found.losses)


def _conditions(subject: Subject, options: Analysis) -> Values:
    normalises = any(isinstance(m, _BatchNorm) for m in subject.run.model.modules())
    return {
        "batchnorm": options.batchnorm if normalises else "none",
        "vectors": options.vectors,
        "seed": options.seed,
    }


def _range(losses: np.ndarray) -> str:
    return f"loss from {np.nanmin(losses):.4g} to {np.nanmax(losses):.4g}"
