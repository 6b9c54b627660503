"""The finishing step, ours and torch's: norm, clip, weight decay, momentum, Nesterov, update."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Finish
from fbopt import FullBatchGD


class FinishingStep:
    """A contender: one optimizer step on gradients that are in place."""

    name: str
    words: int | None = None  # per parameter, read or written

    def __init__(self, finish: Finish) -> None:
        self.finish, self.params = finish, finish.parameters()
        options = {"lr": finish.lr, "momentum": finish.momentum, "nesterov": True}
        self.optimizer = self.make(options | {"weight_decay": finish.weight_decay})

    def make(self, options: dict) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self) -> None:
        self.optimizer.step()

    def momentum(self) -> list[Tensor]:
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.params]


class Ours(FinishingStep):
    """FullBatchGD without a closure: a norm, then one pass."""

    name, words = "fbopt", 6

    def make(self, options: dict) -> torch.optim.Optimizer:
        return FullBatchGD(self.params, **options, max_norm=self.finish.max_norm)


class Torch(FinishingStep):
    """torch.nn.utils.clip_grad_norm_, then torch.optim.SGD."""

    how: dict[str, bool]

    def make(self, options: dict) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.params, **options, **self.how)

    def step(self) -> None:
        foreach = self.how.get("foreach", True)
        torch.nn.utils.clip_grad_norm_(self.params, self.finish.max_norm, foreach=foreach)
        self.optimizer.step()


class TorchForeach(Torch):
    name, how = "clip_grad_norm_ + SGD(foreach=True)", {"foreach": True}


class TorchFused(Torch):
    name, how = "clip_grad_norm_ + SGD(fused=True)", {"fused": True}


class TorchLoop(Torch):
    name, how = "clip_grad_norm_ + SGD(foreach=False)", {"foreach": False}


class Compiled(TorchForeach):
    """Both in one graph."""

    name = "torch.compile of clip_grad_norm_ + SGD"

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self.step = torch.compile(super().step)


FINISHING_STEPS = (Ours, TorchForeach, TorchFused, TorchLoop, Compiled)
