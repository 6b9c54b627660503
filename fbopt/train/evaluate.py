"""Accuracy and loss of a model on a split, and the moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fbopt.train.data.dataset import Chunks, Split
from fbopt.train.precision import cross_entropy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    size: int = 1000,
    flip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) on a split, in evaluation mode.

    With `flip`, of the mean probabilities of each image and its mirror image. `dtype` is what the
    forward passes, of `size` samples each, are autocast to.
    """
    training = model.training
    model.eval()
    correct = loss = torch.zeros((), dtype=torch.float64, device=split.y.device)
    for input, target in Chunks(split, size):
        with torch.autocast(split.device.type, dtype, enabled=dtype is not None):
            output = model(input)
            mirrored = model(input.flip(-1)) if flip else None
        if mirrored is not None:
            both = torch.stack([output, mirrored])
            output = both.log_softmax(2, dtype=torch.float32).logsumexp(0)
        correct = correct + (output.argmax(1) == target).sum()
        loss = loss + cross_entropy(output, target, reduction="sum")
    model.train(training)
    return correct.item() / len(split), loss.item() / len(split)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average mean ← decay·mean + (1 − decay)·θ, begun at the model's θ.

    BatchNorm's running statistics are averaged too; buffers of integers are copied.
    """

    def average(mean: Tensor, now: Tensor, updates: Tensor) -> Tensor:
        return mean.lerp(now, 1 - decay) if mean.is_floating_point() else now

    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)
    averaged.n_averaged += 1  # at 0 the first update would only copy the model
    return averaged
