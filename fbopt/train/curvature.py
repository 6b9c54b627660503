"""`fbopt train --track sharpness,noise --every K`: fbopt.analysis during training."""

from __future__ import annotations

from typing import Any

from fbopt.analysis.eigen import eigenpairs
from fbopt.analysis.gradient_noise import gradient_statistics
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.objective import Objective
from fbopt.analysis.preconditioned import PreconditionedHessian
from fbopt.analysis.stability import stability_threshold
from fbopt.train.config.rules import has_threshold, is_preconditioned
from fbopt.train.data.dataset import Chunks
from fbopt.train.losses import build_loss
from fbopt.train.precision import autocast_dtype
from fbopt.train.trainer import Trainer


def training_loss(trainer: Trainer, **options: Any) -> Objective:
    """The mean loss over a run's training set, without augmentation, in chunks of its size.

    `options` are Objective's batchnorm, dropout and seed. Process 0 measures on its own.
    """
    chunks = Chunks(trainer.data.train, trainer.chunks.size)
    return Objective(
        trainer.model,
        build_loss(trainer.options),
        chunks,
        autocast=autocast_dtype(trainer.options.precision),
        process_group="local",
        **options,
    )


def update_rule(trainer: Trainer) -> dict[str, Any]:
    """Learning rate, momentum and weight decay of the next step, as for torch.optim.SGD."""
    group = trainer.optimizer.param_groups[0]
    names = ("lr", "momentum", "nesterov", "dampening", "weight_decay")
    return {n: group[n] if n == "nesterov" else float(group[n]) for n in names}


class CurvatureTracker:
    """Measures a run after every K-th pass, and leaves it as it was.

    The loss is the mean over the training set, without augmentation, in chunks of the run's size,
    BatchNorm by chunk, dropout off.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.names = trainer.options.tracked
        self.objective: Objective | None = None

    def is_due(self, passes: int) -> bool:
        """Whether there is something to measure after so many passes."""
        every = self.trainer.options.every
        return bool(self.names) and (passes % every == 0 or passes == 1)

    def measure(self) -> dict[str, Any]:
        """The entries for metrics.jsonl: sharpness and its threshold, noise scale and its parts."""
        if self.objective is None:
            self.objective = training_loss(self.trainer)
        found: dict[str, Any] = {}
        if "noise" in self.names:
            statistics = gradient_statistics(self.objective)
            names = ("noise_scale", "noise_trace", "squared_signal", "chunk_signal_to_noise")
            found |= {name: getattr(statistics, name) for name in names}
        if "sharpness" in self.names:
            found |= self._sharpness()
        return found

    def _sharpness(self) -> dict[str, Any]:
        """The largest eigenvalue that the steps see, and the threshold where one is known."""
        trainer, objective = self.trainer, self.objective
        seed, clip = trainer.options.seed, trainer.gradient_share
        if is_preconditioned(trainer.options):
            seen = PreconditionedHessian(objective, trainer.optimizer, clip=clip)
            found = float(eigenpairs(seen, 1, seed=seed, verify=False).values[0])
            return {
                "preconditioned_sharpness": found,
                "sharpness_threshold": seen.threshold.value,
            }
        pairs = eigenpairs(Hessian(objective), 1, seed=seed, verify=False)
        measured = {"sharpness": float(pairs.values[0])}
        if has_threshold(trainer.options):
            threshold = stability_threshold(**update_rule(trainer), clip=clip)
            measured["sharpness_threshold"] = threshold.value
        return measured
