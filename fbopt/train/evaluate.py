"""Accuracy and loss of a model on a split, and the moving average of a model's weights."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fbopt._distributed import Collectives
from fbopt.train.data.dataset import Chunks, Split
from fbopt.train.losses import squared_error
from fbopt.train.precision import cross_entropy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    size: int = 1000,
    flip: bool = False,
    squared: bool = False,
    dtype: torch.dtype | None = None,
    processes: Collectives | None = None,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) on a split, in evaluation mode.

    With `squared` the mean of `--loss squared` in place of the cross-entropy. With `flip`, of the
    mean probabilities (`squared`: the mean outputs) of each image and its mirror image. `dtype` is
    what the forward passes, of `size` samples each, are autocast to. The passes are shared out to
    `processes`, all of which call this with the same model, and summed in the same order on any
    number of them: the result has the same bits.
    """
    training = model.training
    model.eval()
    processes = processes or Collectives()
    share = Chunks(split, size, rank=processes.rank, world_size=processes.world_size)
    # For each pass, or 0 where another process makes it: correct samples, sum of their losses.
    found = torch.zeros(len(share), 2, dtype=torch.float64, device=split.y.device)
    for row, (input, target) in zip(share.dealt(), share, strict=True):
        with torch.autocast(split.device.type, dtype, enabled=dtype is not None):
            output = model(input)
            mirrored = model(input.flip(-1)) if flip else None
        if mirrored is not None:
            both = torch.stack([output, mirrored])
            wide = torch.promote_types(both.dtype, torch.float32)
            output = both.mean(0) if squared else both.log_softmax(2, dtype=wide).logsumexp(0)
        found[row, 0] = (output.argmax(1) == target).sum()
        if squared:
            found[row, 1] = squared_error(output, target).sum()
        else:
            found[row, 1] = cross_entropy(output, target, reduction="sum")
    model.train(training)
    processes.all_reduce_([found])
    # One after the other: the order in which Python's sum and torch's add depends on the version.
    correct, loss = (functools.reduce(operator.add, found[:, k].tolist()) for k in (0, 1))
    return correct / len(split), loss / len(split)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average mean ← decay·mean + (1 − decay)·θ, begun at the model's θ.

    BatchNorm's running statistics are averaged too; buffers of integers are copied.
    """

    def average(mean: Tensor, now: Tensor, updates: Tensor) -> Tensor:
        return mean.lerp(now, 1 - decay) if mean.is_floating_point() else now

    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)
    averaged.n_averaged += 1  # at 0 the first update would only copy the model
    return averaged
