"""What a model gets right on a split, and how wrong it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fbopt.train.data.dataset import Chunks, Split
from fbopt.train.precision import autocast, cross_entropy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    size: int = 1000,
    flip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) on a split, in evaluation mode.

    With `flip` of the mean probabilities of each image and its mirror image. `dtype` is what the
    forward passes are autocast to.
    """
    training = model.training
    model.eval()
    correct = loss = torch.zeros((), dtype=torch.float64, device=split.y.device)
    for input, target in Chunks(split, size):
        with autocast(split.device, dtype):
            output = model(input)
            mirrored = model(input.flip(-1)) if flip else None
        if mirrored is not None:
            both = torch.stack([output, mirrored])
            output = both.log_softmax(2, dtype=torch.float32).logsumexp(0)
        correct = correct + (output.argmax(1) == target).sum()
        loss = loss + cross_entropy(output, target, reduction="sum")
    model.train(training)
    return correct.item() / len(split), loss.item() / len(split)


class MovingAverage:
    """The average, from the model as it is now on; `keep` is m, `model` what to evaluate."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.keep = keep

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Bring in the model as it is after a pass."""
        for mean, now in zip(_tensors(self.model), _tensors(model), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - self.keep)
            else:
                mean.copy_(now)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
