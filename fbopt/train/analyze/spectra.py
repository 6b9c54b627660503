"""Measures of `fbopt analyze` of the whole spectrum: the density of the Hessian's eigenvalues, the
traces of Fisher matrices, and effective ranks.
"""

from __future__ import annotations

from fbopt.analysis import fisher_trace, gradient_rank, spectral_density, spectral_rank
from fbopt.train.analyze.operators import Values, hessian_of
from fbopt.train.analyze.options import Analysis
from fbopt.train.analyze.runs import Subject


def spectrum(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The density of all eigenvalues of the Hessian, and its effective rank."""
    hessian = hessian_of(subject, options)
    found = spectral_density(hessian, options.probes, options.steps, seed=options.seed)
    trace, rank = found.trace, spectral_rank(found)
    values = {
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "size": found.size,
        "products": found.products,
        "probes": options.probes,
        "steps": options.steps,
        "trace": vars(trace).copy(),
        "squared_trace": vars(found.squared_trace).copy(),
        "stable_rank": rank.stable,
        "participation_ratio": rank.participation,
    }
    text = (
        f"{found.size:,} eigenvalues from {found.nodes[0]:.4g} to {found.nodes[-1]:.4g}, trace "
        f"{trace.value:.4g} ± {trace.error:.2g}; stable rank {rank.stable:.3g}, participation "
        f"ratio {rank.participation:.3g}"
    )
    return values, text


def fisher(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The trace of the Fisher matrix with the data's labels, and with the model's own."""
    common = {"samples": options.samples, "seed": options.seed}
    found = {"data": fisher_trace(subject.objective, **common)}
    if subject.has_labels:
        found["model"] = fisher_trace(subject.objective, "model", **common)
    words = [f"{name} {trace.value:.4g} ± {trace.error:.2g}" for name, trace in found.items()]
    text = f"with the labels of the {'; of the '.join(words)} (n = {options.samples})"
    if not subject.has_labels:
        text += "; the run's loss is not the cross-entropy, so the model has no labels"
    return {name: vars(trace).copy() for name, trace in found.items()}, text


def rank(subject: Subject, options: Analysis) -> tuple[Values, str]:
    """The effective rank of the chunks' gradients, and of their differences from the mean."""
    found = {"gradients": gradient_rank(subject.objective)}
    if len(subject.objective.chunks) > 1:
        found["noise"] = gradient_rank(subject.objective, centered=True)
    words = [
        f"{name}: stable {one.stable:.3g}, participation {one.participation:.3g}"
        for name, one in found.items()
    ]
    return {name: vars(one).copy() for name, one in found.items()}, "; ".join(words)
