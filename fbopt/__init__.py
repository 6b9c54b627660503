"""Full-batch training in PyTorch: fused kernels, a closure for any optimizer, and FullBatchGD.

After Geiping et al., "Stochastic Training is Not Necessary for Generalization" (ICLR 2022).
"""

from fbopt.accumulate import GradientAccumulator
from fbopt.clip import clip_grad_norm_
from fbopt.closure import FullBatchClosure
from fbopt.optim import FullBatchGD
from fbopt.penalty import GradientPenalty

__all__ = [
    "FullBatchClosure",
    "FullBatchGD",
    "GradientAccumulator",
    "GradientPenalty",
    "clip_grad_norm_",
]
__version__ = "0.1.0"
