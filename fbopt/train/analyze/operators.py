"""The Hessian of a run and its eigenpairs, as the options of `fbopt analyze` ask for them."""

from __future__ import annotations

from typing import Any

from fbopt.analysis import Eigenpairs, Hessian, Operator, eigenpairs
from fbopt.train.analyze.options import Analysis
from fbopt.train.analyze.runs import Subject

Values = dict[str, Any]  # what a measure found, as plain numbers


def hessian_of(subject: Subject, options: Analysis) -> Hessian:
    """The Hessian by --products."""
    return Hessian(subject.objective, options.products, options.radius)


def eigenpairs_of(operator: Operator, options: Analysis) -> Eigenpairs:
    """The eigenpairs of --eigenvalues and --ends."""
    return eigenpairs(
        operator,
        options.eigenvalues,
        options.ends,
        tolerance=options.tolerance,
        max_products=options.max_products,
        seed=options.seed,
    )
