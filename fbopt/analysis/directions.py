"""Directions in parameter space: random ones scaled by filter, and those between checkpoints.

Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018,
arXiv 1712.09913), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fbopt._random import mix
from fbopt.analysis.objective import Objective

VECTORS = ("zero", "scaled")


def random_direction(
    objective: Objective, seed: int = 0, index: int = 0, *, vectors: str = "zero"
) -> Tensor:
    """A Gaussian direction with every filter scaled to the norm of the weights' filter.

    ``d_ij <- d_ij |theta_ij| / |d_ij|`` for filter j of layer i: an entry of the first dimension of
    a parameter of two or more dimensions. The draws depend on seed, index and the parameters'
    shapes alone, so that two networks alike are seen along the same directions, each at the scale
    of its own weights.

    Args:
        objective: whose parameters it is for.
        seed: of the draws.
        index: tells several directions of one seed apart.
        vectors: what becomes of parameters of one dimension, biases and BatchNorm's: ``"zero"`` as
            in the paper, or ``"scaled"``, each parameter as one filter.

    Returns:
        A vector, see :class:`Objective`; of length 1 the parameters change by their own size.

    Raises:
        ValueError: the direction is zero, since all weights are or there are only vectors.
    """
    if vectors not in VECTORS:
        raise ValueError(f"vectors must be one of {VECTORS}, got {vectors!r}")
    generator = torch.Generator().manual_seed(mix(seed, index))
    parts = []
    for p in objective.params:
        draw = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        parts.append(_scaled(draw, p.detach().to("cpu", torch.float64), vectors))
    direction = objective.flatten(parts)
    check_direction(
        direction,
        "the filters of all weights are zero, or the model has biases and BatchNorm alone (then "
        "pass vectors='scaled')",
    )
    return direction


def _scaled(draw: Tensor, weights: Tensor, vectors: str) -> Tensor:
    if draw.dim() < 2:
        if vectors == "zero":
            return torch.zeros_like(draw)
        return draw * (weights.norm() / draw.norm().clamp_min(1e-300))
    rows = draw.flatten(1).norm(dim=1).clamp_min(1e-300)
    factor = weights.flatten(1).norm(dim=1) / rows
    return draw * factor.view(-1, *[1] * (draw.dim() - 1))


def difference(objective: Objective, state: Mapping[str, Tensor], name: str = "state") -> Tensor:
    """The vector from the model's parameters to those in a state_dict.

    Raises:
        ValueError: a parameter is missing, has another shape, or is not finite; or the two are the
            same.
    """
    names = {id(p): n for n, p in objective.model.named_parameters()}
    others = []
    for p in objective.params:
        key = names[id(p)]
        if key not in state or state[key].shape != p.shape:
            held = "nothing" if key not in state else f"shape {tuple(state[key].shape)}"
            raise ValueError(
                f"{name} is of another model: for {key} it has {held}, this model "
                f"{tuple(p.shape)}; give a checkpoint of the same model"
            )
        if not torch.isfinite(state[key]).all():
            raise ValueError(f"{name}: {key} holds infinite or undefined values")
        others.append(state[key])
    direction = objective.flatten(others) - objective.theta()
    check_direction(direction, f"{name} holds the very parameters of the model; give another")
    return direction


def check_direction(direction: Tensor, why: str = "give another") -> None:
    """Refuse a direction of norm zero, or with entries that are not finite."""
    norm = float(direction.double().norm())
    if not math.isfinite(norm):
        raise ValueError("the direction has infinite or undefined entries")
    if norm == 0:
        raise ValueError(f"the direction has norm zero: {why}")
