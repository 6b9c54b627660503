"""Accelerate's rows of benchmarks.trainers."""

from __future__ import annotations

from accelerate import Accelerator
from torch import optim
from torch.utils.data import DataLoader

from benchmarks import trainers
from fbopt.integrations.accelerate import accumulator

MORE = (trainers.BFLOAT16,)


def run(case: str, ours: bool) -> float:
    """Train as in Accelerate's guide on gradient accumulation, and return the error."""
    windows = trainers.windows(case)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(windows[0]))
    network = trainers.model(case)
    batches = DataLoader([batch for window in windows for batch in window], batch_size=None)
    model, optimizer, loader = accelerator.prepare(
        network, optim.SGD(network.parameters(), lr=trainers.LR), batches
    )
    sums = accumulator(accelerator, model) if ours else None
    for x, labels in loader:
        with accelerator.accumulate(model):
            loss = trainers.loss_fn(model(x), labels)
            if sums is None:
                accelerator.backward(loss)
            else:
                sums.backward(loss, weight=trainers.tokens(labels))
            if sums is not None and accelerator.sync_gradients:
                sums.to_grad()
            if accelerator.sync_gradients and case == trainers.BFLOAT16:
                return trainers.gradient_error(network, case)
            optimizer.step()
            optimizer.zero_grad()
    return trainers.error(network, case)
