"""Gradient noise, curvature, flatness and loss landscapes of any model, loss and chunks: what kind
of minimum was reached. `fbopt analyze` does the same for a run of `fbopt train`.
"""

from fbopt.analysis.cost import Cost
from fbopt.analysis.directions import difference, random_direction
from fbopt.analysis.eigen import eigenpairs
from fbopt.analysis.gradient_noise import GradientStatistics, gradient_statistics
from fbopt.analysis.hessian import Hessian, Trace, hessian_trace
from fbopt.analysis.landscape import Flatness, Landscape, loss_landscape, measure_flatness
from fbopt.analysis.objective import Objective
from fbopt.analysis.preconditioned import PreconditionedHessian
from fbopt.analysis.spectrum import Eigenpairs
from fbopt.analysis.stability import Threshold, adam_threshold, stability_threshold
from fbopt.analysis.tracker import EigenTracker
from fbopt.analysis.tracker_pairs import TrackedEigenpairs

__all__ = [
    "Cost",
    "EigenTracker",
    "Eigenpairs",
    "Flatness",
    "GradientStatistics",
    "Hessian",
    "Landscape",
    "Objective",
    "PreconditionedHessian",
    "Threshold",
    "Trace",
    "TrackedEigenpairs",
    "adam_threshold",
    "difference",
    "eigenpairs",
    "gradient_statistics",
    "hessian_trace",
    "loss_landscape",
    "measure_flatness",
    "random_direction",
    "stability_threshold",
]
