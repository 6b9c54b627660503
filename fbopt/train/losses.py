"""The loss of a chunk in training: a mean over its n_c samples, correct ones and all.

L_c = 1/n_c Σ_i ℓ_i, with ℓ_i the cross-entropy, or one of
    [argmax f(x_i) ≠ y_i]·ℓ_i            misclassified
    1/2 ‖f(x_i) − e_{y_i}‖²              squared
    max_v ℓ(f(x_iv), y_i) over views v   max-up
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fbopt.train.config.options import Options
from fbopt.train.precision import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(options: Options, views: int = 1) -> Loss:
    """The loss of resolved options, for chunks with so many `views` of every sample."""
    smoothing = {
        "label_smoothing": options.label_smoothing,
        "over_others": options.smoothing == "others",
    }
    if options.loss == "cross-entropy" and views == 1:
        return partial(cross_entropy, **smoothing)
    return partial(
        sample_mean,
        **smoothing,
        kind=options.loss,
        views=views,
    )


def build_sample_losses(options: Options) -> Loss:
    """The loss of every sample, of resolved options without further views: their mean over samples
    is that of `build_loss`. Of logits (n, classes) and labels (n,), or (B, classes, n) and (B, n).
    """
    return partial(
        sample_losses,
        label_smoothing=options.label_smoothing,
        kind=options.loss,
        over_others=options.smoothing == "others",
    )


def sample_losses(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    kind: str = "cross-entropy",
    *,
    over_others: bool = False,
) -> Tensor:
    """The loss of every sample; `kind` is one of those of `--loss`."""
    if kind == "squared":
        return squared_error(output, target, label_smoothing, over_others=over_others)
    losses = cross_entropy(
        output, target, label_smoothing, reduction="none", over_others=over_others
    )
    if kind == "misclassified":
        losses = losses * (output.argmax(1) != target)  # a product: NaN stays NaN
    return losses


def squared_error(
    output: Tensor, target: Tensor, label_smoothing: float = 0.0, *, over_others: bool = False
) -> Tensor:
    """Half the squared distance of every sample's outputs from the one-hot vector of its label, in
    float32 for bfloat16 outputs.

    With label smoothing, from the vector that the cross-entropy would be of.

    Args:
        output: (n, classes), or (B, classes, n).
        target: labels (n,), or (B, n).
        label_smoothing: the share of the target that is spread over the classes.
        over_others: as for :func:`cross_entropy`.
    """
    if output.dtype == torch.bfloat16:
        output = output.float()
    count = output.shape[1]
    classes = torch.arange(count, device=output.device).view(-1, *[1] * (target.ndim - 1))
    right = target.unsqueeze(1) == classes
    spread = label_smoothing / max(1, count - 1 if over_others else count)
    most = 1 - label_smoothing + (0 if over_others else spread)
    wanted = right.to(output.dtype) * (most - spread) + spread
    return (output - wanted).square().sum(1) / 2


def sample_mean(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    kind: str = "cross-entropy",
    views: int = 1,
    *,
    over_others: bool = False,
) -> Tensor:
    """The mean over samples of the largest loss of each one's views.

    With "misclassified" the loss of what is classified correctly is 0, and the mean still over all
    samples, so that a chunk counts by its size and one without a wrong sample has a loss and a
    gradient of 0 (as in the authors' release of arXiv 2109.14119). Which ones are wrong is found
    anew at every point: the finite differences of a penalty see the jump of a sample that changes
    sides. Of n equal largest views each counts 1/n (max-up: Gong et al. 2021, arXiv 2002.09024).

    Args:
        output: logits (n·views, classes), the views of a sample one after the other.
        target: labels (n·views,).
        label_smoothing: the share of the target that is spread over the classes.
        kind: one of those of `--loss`; of "misclassified", wrong views alone count.
        views: of every sample.
        over_others: as for :func:`cross_entropy`.
    """
    losses = sample_losses(output, target, label_smoothing, kind, over_others=over_others)
    return (losses.view(-1, views).amax(1) if views > 1 else losses).mean()
