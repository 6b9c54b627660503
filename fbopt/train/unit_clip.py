"""Adaptive gradient clipping: each unit's gradient at most a share of the norm of its weights.

g_i ← g_i·min(1, c·max(‖w_i‖, 10⁻³)/‖g_i‖)

Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization",
ICML 2021, arXiv 2102.06171, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LEAST = 1e-3  # so that weights that begin at zero can leave it


@torch.no_grad()
def clip_units_(params: Iterable[Tensor], share: float) -> None:
    """Clip the gradient of every unit in place; nothing is read on the host.

    Units are the output channels, the rows of a weight (out, …). A bias, a scalar or a scale, of
    whatever shape with a single side longer than 1, is one unit as a whole, as in the authors'
    code. In the paper the last linear layer is left out: do so here too. Parameters without a
    gradient are skipped.

    Args:
        params: the parameters, with ``.grad``.
        share: the paper's λ, c above.
    """
    for p in params:
        if p.grad is not None:
            bound = share * unit_norms(p).clamp(min=LEAST)
            p.grad.mul_((bound / unit_norms(p.grad)).clamp(max=1))


def unit_norms(tensor: Tensor) -> Tensor:
    """The Euclidean norm of each unit, in a shape that broadcasts over the tensor."""
    is_vector = sum(side > 1 for side in tensor.shape) < 2
    dims = None if is_vector else tuple(range(1, tensor.dim()))
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
