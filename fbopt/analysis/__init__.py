"""Gradient noise, curvature, flatness and loss landscapes of any model, loss and chunks: what kind
of minimum was reached. `fbopt analyze` does the same for a run of `fbopt train`.
"""

from fbopt.analysis.batch_curvature import BatchSharpness, batch_sharpness
from fbopt.analysis.batch_gap import LossGap, loss_gap
from fbopt.analysis.cost import Cost
from fbopt.analysis.density import SpectralDensity, spectral_density
from fbopt.analysis.directions import difference, random_direction
from fbopt.analysis.eigen import eigenpairs
from fbopt.analysis.fisher import Fisher
from fbopt.analysis.fisher_norms import fisher_trace
from fbopt.analysis.flow import Flow
from fbopt.analysis.flow_edge import Edge
from fbopt.analysis.gauss_newton import GaussNewton
from fbopt.analysis.gradient_noise import GradientStatistics, gradient_statistics
from fbopt.analysis.hessian import Hessian, Trace, hessian_trace
from fbopt.analysis.hutchpp import hutchpp_trace
from fbopt.analysis.landscape import Flatness, Landscape, loss_landscape, measure_flatness
from fbopt.analysis.objective import Objective
from fbopt.analysis.operator import Operator
from fbopt.analysis.penalised import PenalisedObjective
from fbopt.analysis.preconditioned import PreconditionedHessian
from fbopt.analysis.ranks import EffectiveRank, gradient_rank, spectral_rank, subspace_share
from fbopt.analysis.sharpness import CriticalSharpness, critical_sharpness, directional_sharpness
from fbopt.analysis.spectrum import Eigenpairs
from fbopt.analysis.stability import Threshold, adam_threshold, stability_threshold
from fbopt.analysis.third_derivatives import third_derivative
from fbopt.analysis.tracker import EigenTracker
from fbopt.analysis.tracker_pairs import TrackedEigenpairs

__all__ = [
    "BatchSharpness",
    "Cost",
    "CriticalSharpness",
    "Edge",
    "EffectiveRank",
    "EigenTracker",
    "Eigenpairs",
    "Fisher",
    "Flatness",
    "Flow",
    "GaussNewton",
    "GradientStatistics",
    "Hessian",
    "Landscape",
    "LossGap",
    "Objective",
    "Operator",
    "PenalisedObjective",
    "PreconditionedHessian",
    "SpectralDensity",
    "Threshold",
    "Trace",
    "TrackedEigenpairs",
    "adam_threshold",
    "batch_sharpness",
    "critical_sharpness",
    "difference",
    "directional_sharpness",
    "eigenpairs",
    "fisher_trace",
    "gradient_rank",
    "gradient_statistics",
    "hessian_trace",
    "hutchpp_trace",
    "loss_gap",
    "loss_landscape",
    "measure_flatness",
    "random_direction",
    "spectral_density",
    "spectral_rank",
    "stability_threshold",
    "subspace_share",
    "third_derivative",
]
