"""Directions in parameter space: random and filter-normalised, or between two checkpoints.

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
    """A random Gaussian direction, each of its filters scaled to the norm of the weights' filter.

    ``d_ij <- d_ij |theta_ij| / |d_ij|`` for filter j of layer i: slice j along the first dimension
    of a parameter of two or more dimensions. The draws depend on seed, index and the parameters'
    shapes alone, so two networks of one architecture share their directions, each scaled to its own
    weights.

    Args:
        objective: the loss, and the parameters theta.
        seed: of the draws.
        index: numbers the directions of one seed.
        vectors: the entries for parameters of one dimension (biases, BatchNorm's): ``"zero"`` as in
            the paper, or ``"scaled"``, each parameter as one filter.

    Returns:
        A vector, see :class:`Objective`; theta + d changes every filter by its own norm.

    Raises:
        ValueError: `vectors` is unknown, or the direction is zero: all weights are zero, or there
            are only one-dimensional parameters.
    """
    if vectors not in VECTORS:
        raise ValueError(f"vectors must be one of {VECTORS}, got {vectors!r}")
    generator = torch.Generator().manual_seed(mix(seed, index))
    direction = objective.flatten([_scaled_draw(p, generator, vectors) for p in objective.params])
    check_direction(
        direction,
        "the filters of all weights are zero, or the model has biases and BatchNorm alone (then "
        "pass vectors='scaled')",
    )
    return direction


def random_signs(objective: Objective, generator: torch.Generator) -> Tensor:
    """A Rademacher vector: each entry of the parameter space is 1 or -1 with equal chances."""
    signs = torch.randint(2, (objective.size,), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(objective.device, objective.dtype)


def _scaled_draw(param: Tensor, generator: torch.Generator, vectors: str) -> Tensor:
    """One parameter's part of the direction, in float64 on the CPU."""
    draw = torch.randn(param.shape, dtype=torch.float64, generator=generator)
    weights = param.detach().to("cpu", torch.float64)
    if draw.dim() > 1:
        factor = weights.flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1).clamp_min(1e-300)
        factor = factor.view(-1, *[1] * (draw.dim() - 1))
    elif vectors == "scaled":
        factor = weights.norm() / draw.norm().clamp_min(1e-300)
    else:
        return torch.zeros_like(draw)
    return draw.mul_(factor)


def difference(objective: Objective, state: Mapping[str, Tensor], name: str = "state") -> Tensor:
    """The vector from the model's parameters to those in a state_dict.

    Args:
        objective: the loss of the model.
        state: the other model's state_dict.
        name: what error messages call it.

    Raises:
        ValueError: a parameter is missing, has another shape, or is not finite; or all parameters
            are the model's own.
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


def check_direction(direction: Tensor, why: str = "give another") -> float:
    """Return the norm; raise ValueError where it is zero or an entry is not finite."""
    norm = float(direction.double().norm())
    if not math.isfinite(norm):
        raise ValueError("the direction has infinite or undefined entries")
    if norm == 0:
        raise ValueError(f"the direction has norm zero: {why}")
    return norm
