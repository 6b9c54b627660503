"""How sharp the loss may be before gradient descent is unstable: 2/lr, and with momentum more.

Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at the
Edge of Stability" (ICLR 2021, arXiv 2103.00065), section 2 and appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

from fbopt._checks import check_number


@dataclass(frozen=True)
class Threshold:
    """The largest eigenvalue of the loss's Hessian at which steps on its quadratic do not diverge.

    Attributes:
        value: the threshold; an infinite one for a learning rate of zero.
        formula: how it was had, such as ``(2 + 2 momentum) / lr``.
    """

    value: float
    formula: str


def stability_threshold(
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    *,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> Threshold:
    """The threshold on the sharpness of L for torch.optim.SGD's steps on the full batch.

    An eigendirection of curvature a is a recursion whose largest root leaves the unit circle at -1,
    where the learning rate times a is

        2                                 plain
        (2 + 2 m) / (1 - dampening)       heavy-ball momentum m
        (2 + 2 m) / (1 + 2 m)             Nesterov momentum, without dampening

    The steps see ``a = clip lambda + weight_decay``, with the gradient scaled by `clip` before the
    decay is added, so the threshold on lambda is ``(that/lr - weight_decay)/clip``. The clip
    coefficient is one step's: while the gradient's norm stays above max_norm, it changes from step
    to step, and the threshold with it. A gradient penalty adds curvature that is not counted here.

    Args:
        lr: the learning rate.
        momentum: as in torch.optim.SGD, like the next three.
        nesterov: Nesterov's momentum.
        dampening: of the momentum.
        weight_decay: the L2 coefficient.
        clip: the coefficient that the gradient is scaled by, above 0 and at most 1.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_number("lr", lr, least=0)
    check_number("momentum", momentum, least=0)
    check_number("weight_decay", weight_decay, least=0)
    check_number("clip", clip, above=0)
    if nesterov and (dampening != 0 or momentum == 0):
        raise ValueError("nesterov needs momentum and no dampening, as in torch.optim.SGD")
    if clip > 1:
        raise ValueError(f"clip must be at most 1, got {clip}")
    reach, words = 2.0, "2"
    if momentum:
        reach, words = 2 + 2 * momentum, "(2 + 2 momentum)"
    if nesterov:
        reach, words = reach / (1 + 2 * momentum), words + "/(1 + 2 momentum)"
    if momentum and dampening:
        reach, words = reach / (1 - dampening), words + "/(1 - dampening)"
    value, formula = float("inf") if lr == 0 else reach / lr, f"{words}/lr"
    if weight_decay:
        value, formula = value - weight_decay, f"{formula} - weight_decay"
    if clip < 1:
        value, formula = value / clip, f"({formula})/clip" if weight_decay else f"{formula}/clip"
    return Threshold(value, formula)
