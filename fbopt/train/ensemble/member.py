"""One of several networks that are trained at once: a trainer whose steps the ensemble takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fbopt._random import seed_generators
from fbopt.train.build import build_perturbation
from fbopt.train.config.options import Options
from fbopt.train.data.dataset import Data
from fbopt.train.data.rng import DROPOUT
from fbopt.train.trainer import Trainer

# What the ensemble counts for each network, and a record of metrics shows.
COUNTS = ("loss", "correct", "chunk_sqnorm", "finite", "finite_passes")


class Member(Trainer):
    """A run as if trained alone: schedule, records and checkpoints; the ensemble has its numbers.

    Its parameters, momentum and counts are views of rows of the ensemble's tensors.
    """

    def __init__(self, options: Options, data: Data, device: torch.device) -> None:
        super().__init__(options, data, device)
        self.rule = build_perturbation(options)
        self.optimizer._opt_called = True  # or the scheduler would miss the optimizer's own steps

    def use(self, parameters: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Let parameters be these views of a row, and counts these 0-dim ones."""
        for name, p in self.model.named_parameters():
            p.data = parameters[name]
        for name, count in counts.items():
            setattr(self, name, count)

    def use_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Let the optimizer's momentum be these views of a row."""
        names = {p: name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:  # whose order is that of a state dict
            for p in group["params"]:
                self.optimizer.state[p]["momentum_buffer"] = momentum[names[p]]

    @property
    def has_momentum(self) -> bool:
        """Whether the optimizer keeps a momentum, from the first step on."""
        return any("momentum_buffer" in kept for kept in self.optimizer.state.values())

    def momentum(self) -> list[Tensor]:
        """The momentum of every parameter; zeros where there is none."""
        state = self.optimizer.state
        found = [state.get(p, {}).get("momentum_buffer") for p in self.model.parameters()]
        pairs = zip(found, self.model.parameters(), strict=True)
        return [torch.zeros_like(p) if buffer is None else buffer for buffer, p in pairs]

    def advance(self, norm: Tensor, square: Tensor | None) -> None:
        """Count a step: of gradient norm `norm`, with the mean ‖g_c‖² of chunks if it is logged."""
        self.step += 1
        self.gradient_norm = norm
        self.closure.step += 1
        self.closure.mean_sqnorm = square

    def state_dict(self) -> dict[str, Any]:
        """The state of a run alone, in memory of its own: views would save the whole ensemble."""
        if self.step:  # alone, every chunk seeds the generators
            group = (len(self.chunks) - 1) // (self.options.vectorize or 1)
            seed_generators([self.device], self.options.seed, DROPOUT, self.step - 1, group)
        own: dict[str, Any] = tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, super().state_dict()
        )
        return own

    def release(self) -> None:
        """Give the parameters memory of their own."""
        for p in self.model.parameters():
            p.data = p.data.clone()
