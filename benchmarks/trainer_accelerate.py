"""Accelerate's rows of benchmarks.trainers."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import tiny_language as tiny
from benchmarks.trainers import Task
from fbopt.integrations.accelerate import accumulator, closure


def prepare(task: Task) -> tuple[Accelerator, Any, Any, Any]:
    """Return an accelerator, and the prepared model, optimizer and loader."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.window)
    loader = DataLoader(task.batches, batch_size=None)
    return accelerator, *accelerator.prepare(task.model, task.optimizer, loader)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def by_itself(task: Task) -> None:
    """Train as in Accelerate's guide on gradient accumulation."""
    accelerator, model, optimizer, loader = prepare(task)
    for _ in range(task.case.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()


def weighted(task: Task) -> None:
    """Train with fbopt's accumulator."""
    accelerator, model, optimizer, loader = prepare(task)
    sums = accumulator(accelerator, model)
    for _ in range(task.case.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                with sums.chunk(weight=tiny.targets(batch)):
                    accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    sums.to_grad()
                optimizer.step()
                optimizer.zero_grad()


def full_batch(task: Task) -> None:
    """Train with fbopt's closure."""
    accelerator, model, optimizer, loader = prepare(task)
    made = closure(accelerator, model, chunks=loader, evaluate=loss_of, weight=tiny.targets)
    for _ in range(task.case.epochs):
        optimizer.step(made)


WAYS = {"Accelerate": by_itself, "accumulator": weighted, "closure": full_batch}
