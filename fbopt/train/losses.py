"""The loss of a chunk in training: a mean over its n_c samples, correct ones and all.

L_c = 1/n_c Σ_i ℓ_i, with ℓ_i the cross-entropy, or one of
    [argmax f(x_i) ≠ y_i]·ℓ_i            misclassified
    max_v ℓ(f(x_iv), y_i) over views v   max-up
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        only_wrong=options.loss == "misclassified",
        views=views,
    )


def build_sample_losses(options: Options) -> Loss:
    """The loss of every sample, of resolved options without further views: their mean over samples
    is that of `build_loss`. Of logits (n, classes) and labels (n,), or (B, classes, n) and (B, n).
    """
    return partial(
        sample_losses,
        label_smoothing=options.label_smoothing,
        only_wrong=options.loss == "misclassified",
        over_others=options.smoothing == "others",
    )


def sample_losses(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    only_wrong: bool = False,
    *,
    over_others: bool = False,
) -> Tensor:
    """The loss of every sample; with `only_wrong`, 0 for those that are classified correctly."""
    losses = cross_entropy(
        output, target, label_smoothing, reduction="none", over_others=over_others
    )
    if only_wrong:
        losses = losses * (output.argmax(1) != target)  # a product: NaN stays NaN
    return losses


def sample_mean(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    only_wrong: bool = False,
    views: int = 1,
    *,
    over_others: bool = False,
) -> Tensor:
    """The mean over samples of the largest loss of each one's views.

    With `only_wrong` the loss of what is classified correctly is 0, and the mean still over all
    samples, so that a chunk counts by its size and one without a wrong sample has a loss and a
    gradient of 0 (as in the authors' release of arXiv 2109.14119). Which ones are wrong is found
    anew at every point: the finite differences of a penalty see the jump of a sample that changes
    sides. Of n equal largest views each counts 1/n (max-up: Gong et al. 2021, arXiv 2002.09024).

    Args:
        output: logits (n·views, classes), the views of a sample one after the other.
        target: labels (n·views,).
        label_smoothing: the share of the target that is spread over the classes.
        only_wrong: whether to count wrongly classified views alone.
        views: of every sample.
        over_others: as for :func:`cross_entropy`.
    """
    losses = sample_losses(output, target, label_smoothing, only_wrong, over_others=over_others)
    return (losses.view(-1, views).amax(1) if views > 1 else losses).mean()
