"""`fbopt train --track sharpness:3,noise,batches --every K`: fbopt.analysis during training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fbopt.analysis.batch_curvature import batch_sharpness
from fbopt.analysis.gradient_noise import gradient_statistics
from fbopt.analysis.objective import Objective
from fbopt.analysis.penalised import PenalisedObjective
from fbopt.analysis.preconditioned import PreconditionedHessian
from fbopt.analysis.stability import stability_threshold
from fbopt.analysis.tracker import EigenTracker
from fbopt.penalty import GradientPenalty
from fbopt.train.config.options import OptionsError
from fbopt.train.config.rules import has_threshold, is_preconditioned
from fbopt.train.data.dataset import Chunks
from fbopt.train.losses import build_loss
from fbopt.train.precision import autocast_dtype
from fbopt.train.trainer import Trainer

TOLERANCE = 1e-3  # of an eigenvalue
PRODUCTS = 20  # a measurement and eigenvalue in the mean, where steps lie far apart
BATCHES = 32  # mini-batches of a measurement


def training_loss(trainer: Trainer, penalised: bool = False, **options: Any) -> Objective:
    """The mean loss over a run's training set, without augmentation, in chunks of its size.

    With `penalised` and the gradient penalty of the run's next step; raises OptionsError where it
    has none. `options` are Objective's batchnorm, dropout and seed. Process 0 measures on its own.
    """
    kind = partial(PenalisedObjective, **_penalty(trainer)) if penalised else Objective
    return kind(
        trainer.model,
        build_loss(trainer.options),
        Chunks(trainer.data.train, trainer.chunks.size),
        autocast=autocast_dtype(trainer.options.precision),
        process_group="local",
        **options,
    )


def _penalty(trainer: Trainer) -> dict[str, float]:
    """Lambda of the next step, and the power."""
    rule = None if trainer.closure is None else trainer.closure.penalty
    if not isinstance(rule, GradientPenalty) or rule.full_strength:
        raise OptionsError(
            "--penalised: this run has no gradient penalty on chunks (--penalty, without "
            "--full-penalty); leave it out, to measure the loss"
        )
    value = rule.coefficient_at(trainer.closure.step, trainer.optimizer)
    return {"coefficient": float(value), "power": rule.power}


def update_rule(trainer: Trainer) -> dict[str, Any]:
    """Learning rate, momentum and weight decay of the next step, as for torch.optim.SGD."""
    group = trainer.optimizer.param_groups[0]
    names = ("lr", "momentum", "nesterov", "dampening", "weight_decay")
    return {n: group[n] if n == "nesterov" else float(group[n]) for n in names}


class CurvatureTracker:
    """Measures a run after every K-th pass, and leaves it as it was.

    The loss is the mean over the training set, without augmentation, in chunks of the run's size,
    BatchNorm by chunk, dropout off. Eigenvalues are followed from one measurement to the next;
    `known` is what a checkpoint keeps of them.
    """

    def __init__(self, trainer: Trainer, known: Mapping[str, Any] | None = None) -> None:
        self.trainer = trainer
        self.names = trainer.options.tracked
        self.objective: Objective | None = None
        self._eigen: EigenTracker | None = None
        # Another --track may be given with --resume auto.
        same = bool(known) and known["tracked"] == trainer.options.eigenvalues
        self._known = dict(known) if known and same and "sharpness" in self.names else {}

    def saved(self) -> dict[str, Any]:
        """The entry of a checkpoint that the next measurement depends on, if there is any."""
        known = self._known if self._eigen is None else self._eigen.state_dict()
        return {"curvature": known} if known else {}

    def is_due(self, passes: int) -> bool:
        """Whether there is something to measure after so many passes."""
        every = self.trainer.options.every
        return bool(self.names) and (passes % every == 0 or passes == 1)

    def measure(self) -> dict[str, Any]:
        """The entries for metrics.jsonl: sharpness and its threshold, noise scale and its parts,
        batch sharpness.
        """
        if self.objective is None:
            self.objective = training_loss(self.trainer)
        found: dict[str, Any] = {}
        if "noise" in self.names:
            statistics = gradient_statistics(self.objective)
            names = ("noise_scale", "noise_trace", "squared_signal", "chunk_signal_to_noise")
            found |= {name: getattr(statistics, name) for name in names}
        if "batches" in self.names:
            found |= self._batch_sharpness(self.objective)
        if "sharpness" in self.names:
            found |= self._sharpness()
        return found

    def _batch_sharpness(self, objective: Objective) -> dict[str, Any]:
        """The batch sharpness of mini-batches (or chunks) of the run's size, the same ones in every
        measurement, and the threshold; nothing where a batch's gradient is zero.
        """
        trainer = self.trainer
        try:
            (known,) = batch_sharpness(
                objective, [trainer.chunks.size], BATCHES, seed=trainer.options.seed
            )
        except ValueError:  # a curvature along zero
            return {}
        found = {
            "batch_sharpness": known.value,
            "batch_sharpness_error": known.error,
            "batch_sharpness_ratio": known.ratio,
        }
        if has_threshold(trainer.options) and not is_preconditioned(trainer.options):
            found["sharpness_threshold"] = self._threshold()
        return found

    def _threshold(self) -> float:
        """The curvature above which the next step diverges."""
        clip = self.trainer.gradient_share
        return stability_threshold(**update_rule(self.trainer), clip=clip).value

    def _sharpness(self) -> dict[str, Any]:
        """The largest eigenvalues that the steps see, with their residuals, and the threshold where
        one is known.
        """
        trainer = self.trainer
        clip, preconditioned = trainer.gradient_share, is_preconditioned(trainer.options)
        if self._eigen is None:
            self._eigen = self._tracker()
        seen = self._eigen.hessian
        if isinstance(seen, PreconditionedHessian):
            seen.clip = clip
        pairs = self._eigen.update()
        measured = {}
        for i, (value, rest) in enumerate(zip(pairs.values, pairs.residuals, strict=True), 1):
            name = "preconditioned_" * preconditioned + "sharpness" + f"_{i}" * (i > 1)
            measured |= {name: float(value), f"{name}_residual": float(rest)}
        if isinstance(seen, PreconditionedHessian):
            measured["sharpness_threshold"] = seen.threshold.value
        elif has_threshold(trainer.options):
            measured["sharpness_threshold"] = self._threshold()
        return measured

    def _tracker(self) -> EigenTracker:
        """The tracker of these eigenvalues, as far as it has come."""
        trainer, options = self.trainer, self.trainer.options
        assert self.objective is not None  # made by measure
        seen = None
        if is_preconditioned(options):
            clip = trainer.gradient_share
            seen = PreconditionedHessian(self.objective, trainer.optimizer, clip=clip)
        found = EigenTracker(
            self.objective,
            options.eigenvalues,
            preconditioner=seen,
            tolerance=TOLERANCE,
            products=PRODUCTS,
            seed=options.seed,
        )
        found.load_state_dict(self._known)
        return found
