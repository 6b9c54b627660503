"""The largest curvature at which gradient descent is stable: 2/lr, and more with momentum.

Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at the
Edge of Stability" (ICLR 2021, arXiv 2103.00065), section 2 and appendix B. For Adam: Cohen et al.,
"Adaptive Gradient Methods at the Edge of Stability" (2022, arXiv 2207.14484), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fbopt._checks import check_number


@dataclass(frozen=True)
class Threshold:
    """The largest Hessian eigenvalue at which steps on the quadratic model do not diverge.

    Attributes:
        value: the threshold; infinite for a learning rate of zero.
        formula: its formula in words, such as ``(2 + 2 momentum)/lr``.
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
    """The stability threshold on the sharpness of L for full-batch steps of torch.optim.SGD.

    Along an eigenvector of curvature a the steps are a linear recursion. Its largest root leaves
    the unit circle at -1, where lr times a is

        2                                 plain
        (2 + 2 m) / (1 - dampening)       heavy-ball momentum m
        (2 + 2 m) / (1 + 2 m)             Nesterov momentum, without dampening

    For an eigenvalue lambda of L's Hessian the steps see ``a = clip lambda + weight_decay``: the
    gradient is scaled by `clip` before the decay is added. The threshold on lambda is therefore
    ``(that/lr - weight_decay)/clip``. The clip coefficient is that of one step: while the gradient
    norm exceeds max_norm, it changes from step to step, and the threshold with it. The curvature
    of a gradient penalty is not included.

    Args:
        lr: the learning rate.
        momentum: as in torch.optim.SGD, like the next three.
        nesterov: Nesterov momentum.
        dampening: of the momentum.
        weight_decay: the L2 coefficient.
        clip: the clip coefficient that scales the gradient, above 0 and at most 1.

    Raises:
        TypeError, ValueError: an invalid argument.
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


def adam_threshold(lr: float, beta1: float = 0.9, *, clip: float = 1.0) -> Threshold:
    """The stability threshold for full-batch steps of torch.optim.Adam and AdamW.

    It is on the largest eigenvalue of the preconditioned Hessian (:class:`PreconditionedHessian`),
    not of the Hessian: with a preconditioner that stays as it is, Adam's steps are those of
    heavy-ball momentum beta1 and dampening beta1, which diverge above

        (2 + 2 beta1) / ((1 - beta1) lr)

    and that divided by `clip`. Weight decay is not in it; the operator can add what it does.

    Args:
        lr: the learning rate.
        beta1: the decay of the mean of gradients, below 1.
        clip: the clip coefficient that scales the gradient, above 0 and at most 1.

    Raises:
        TypeError, ValueError: an invalid argument.
    """
    check_number("beta1", beta1, least=0)
    if beta1 >= 1:
        raise ValueError(f"beta1 must be below 1, got {beta1}")
    value = stability_threshold(lr, beta1, dampening=beta1, clip=clip).value
    return Threshold(value, "(2 + 2 beta1)/((1 - beta1) lr)" + ("/clip" if clip < 1 else ""))
