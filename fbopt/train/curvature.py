"""`fbopt train --track sharpness,noise --every K`: measures of fbopt.analysis on the way."""

from __future__ import annotations

import copy
from typing import Any

from fbopt.analysis.gradient_noise import gradient_statistics
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.lanczos import eigenpairs
from fbopt.analysis.objective import Objective
from fbopt.analysis.stability import stability_threshold
from fbopt.train.data.dataset import Chunks
from fbopt.train.trainer import Run


class Tracker:
    """Measures a run after every K-th pass, and leaves it as it was.

    The loss is the mean over the training set, without augmentation, in chunks of the run's size,
    BatchNorm by chunk, dropout off.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names = run.options.tracked
        self.objective: Objective | None = None

    def due(self, done: int) -> bool:
        """Whether there is something to measure after so many passes."""
        return bool(self.names) and (done % self.run.options.every == 0 or done == 1)

    def measure(self) -> dict[str, Any]:
        """The entries for metrics.jsonl: sharpness and its threshold, noise scale and its parts."""
        if self.objective is None:
            run = self.run
            plain = getattr(run.data.train, "split", run.data.train)
            chunks = Chunks(plain, run.chunks.size)
            # The copy shares all but torch.compile, which cannot be differentiated twice.
            self.objective = Objective(
                copy.copy(run.model), run.loss_fn, chunks, autocast=run.autocast
            )
        found: dict[str, Any] = {}
        if "noise" in self.names:
            found |= self._noise()
        if "sharpness" in self.names:
            found |= self._sharpness()
        return found

    def _sharpness(self) -> dict[str, Any]:
        pairs = eigenpairs(Hessian(self.objective), 1, seed=self.run.options.seed, verify=False)
        group = self.run.optimizer.param_groups[0]
        names = ("lr", "momentum", "nesterov", "dampening", "weight_decay")
        threshold = stability_threshold(**{name: group[name] for name in names}, clip=self._clip())
        return {"sharpness": float(pairs.values[0]), "sharpness_threshold": threshold.value}

    def _clip(self) -> float:
        """The coefficient by which the last step scaled its gradient."""
        limit = self.run.options.max_norm
        return 1.0 if limit is None else min(1.0, limit / (float(self.run.gradient_norm) + 1e-6))

    def _noise(self) -> dict[str, Any]:
        found = gradient_statistics(self.objective)
        return {
            "noise_scale": found.noise_scale,
            "noise_trace": found.noise_trace,
            "squared_signal": found.squared_signal,
            "chunk_signal_to_noise": found.chunk_signal_to_noise,
        }
