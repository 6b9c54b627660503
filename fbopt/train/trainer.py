"""A training run: what a checkpoint holds, how to take one step, and the metrics of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import FullBatchGD
from fbopt._random import seed_generators
from fbopt.reference import clip_coefficient
from fbopt.train import build
from fbopt.train.batchnorm import EveryPass
from fbopt.train.config.line_search import searches
from fbopt.train.config.options import Options, OptionsError
from fbopt.train.data.dataset import Chunks, Data
from fbopt.train.data.rng import DROPOUT
from fbopt.train.distributed import DistributedContext
from fbopt.train.evaluate import evaluate, moving_average
from fbopt.train.grad_transforms import running_weight
from fbopt.train.losses import build_loss
from fbopt.train.mini_batches import MiniBatchGradient
from fbopt.train.precision import autocast_dtype, parameter_dtype
from fbopt.train.schedules import build_scheduler, lr_factor
from fbopt.train.searched import FirstEvaluation

# With a state_dict, or None.
_PARTS = ("model", "optimizer", "scheduler", "closure", "average", "clip_history")
_TOTALS = ("correct", "loss", "chunk_sqnorm")


class Diverged(RuntimeError):
    """The loss became infinite or undefined."""


class Trainer:
    """The state of a training run, and how to take one step.

    A pass is an epoch of SGD, of which there are `epochs` first, or one full-batch step. Of several
    processes each has a whole trainer, with the same numbers after every step.

    Attributes:
        batches: the mini-batches of an epoch; None in a run without epochs.
        chunks: the chunks of a full-batch step; of SGD, the mini-batches.
        on_samples: called with the number of samples after every forward pass of training.
    """

    def __init__(
        self,
        options: Options,
        data: Data,
        device: torch.device,
        context: DistributedContext | None = None,
    ) -> None:
        self.options, self.data, self.device = options, data, device
        self.context = context or DistributedContext()
        self.model = build.build_model(options, data, device)
        self.loss_fn = build_loss(options, options.max_up)
        self.epochs = math.inf if options.stochastic else options.switch_at
        chunks = partial(
            build.build_chunks,
            options,
            data.train,
            current_pass=lambda: self.position[0],
            before_chunk=self.seed_chunk,
            rank=self.context.rank,
            world_size=self.context.world_size,
        )
        self.batches = chunks(stochastic=True) if self.epochs else None
        self.chunks = self.batches if options.stochastic else chunks(stochastic=False)
        self.total_steps = self._steps(options.passes)
        self.step, self.seconds = 0, 0.0
        self.first_pass = 0  # where `finite_passes` counts from, in a resumed run
        self.fitted = 0  # passes in a row that classified every sample correctly
        self.on_samples: Callable[[int], object] = lambda samples: None
        # Summed on the device and read only to log: no step waits for the device.
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=parameter_dtype(options.precision), device=device)
        self.chunk_sqnorm = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.finite_passes = torch.zeros((), dtype=torch.int64, device=device)
        self.gradient_norm: Tensor | None = None
        self.samples = self.chunks.samples  # in the last pass; each has `max_up` views
        self.optimizer = build.build_optimizer(options, self.model)
        self.scheduler = build_scheduler(options, self.optimizer)
        self.grad_transform = build.build_grad_transform(options, self.model, self.chunks)
        self.clip_history = self.grad_transform and self.grad_transform.history
        self.every_pass = None
        if options.batchnorm == "every-pass":
            if not self.context.is_single:
                raise OptionsError(
                    "--batchnorm every-pass follows the passes of one process, and torchrun has "
                    f"started {self.context.world_size}; leave one of them out"
                )
            self.every_pass = EveryPass(self.model)
        self.chunk = 0  # the last that was visited
        self.closure = None
        if not options.stochastic or build.build_perturbation(options) is not None:
            self.closure = build.build_closure(
                options,
                self.model,
                self.loss_fn,
                () if options.stochastic else self.chunks,
                self.optimizer,
                weight=self._running_weight if options.mean == "running" else None,
                observe=self.observe,
                on_pass_start=self._restart,
                process_group=self.context.group,
            )
        self.first = FirstEvaluation(self.closure) if searches(options) else None
        self.average = moving_average(self.model, options.ema) if options.ema else None
        self.mini_batch = None
        if self.batches is not None:
            shared = (self.closure, self.every_pass) if options.stochastic else ()
            self.mini_batch = MiniBatchGradient(
                options, self.model, self.loss_fn, self.observe, *shared
            )

    @property
    def position(self) -> tuple[int, int]:
        """The number of passes completed, and of mini-batches in the current epoch."""
        return self.position_after(self.step)

    def position_after(self, step: int) -> tuple[int, int]:
        """The position after so many steps."""
        if self.epochs:
            epoch, index = divmod(step, len(self.batches))
            if epoch < self.epochs:
                return epoch, index
        return self.epochs + step - self._steps(self.epochs), 0

    @property
    def current_chunks(self) -> Chunks:
        """The mini-batches or chunks of the current pass; between two passes, of the next."""
        return self.batches if self.position[0] < self.epochs else self.chunks

    @property
    def clip_coefficient(self) -> float:
        """The factor that the last step scaled its gradient by, after --agc; read from the
        device.
        """
        if self.grad_transform is not None:
            return self.grad_transform.coefficient()
        bound = None if self.options.optimizer == "lbfgs" else self.options.max_norm
        return 1.0 if bound is None else float(clip_coefficient(bound, self.gradient_norm))

    @property
    def gradient_share(self) -> float:
        """The share of the mean gradient that the last step followed: by clipping, and by
        `--mean running`; read from the device.
        """
        whole = 1.0 if self.grad_transform is None else self.grad_transform.total
        return whole * self.clip_coefficient

    def _steps(self, passes: int) -> int:
        epochs = min(passes, self.epochs)
        return passes - epochs + (epochs * len(self.batches) if epochs else 0)

    def seed_chunk(self, chunk: int = 0) -> None:
        """Seed the generators of dropout before a mini-batch or a chunk, by the group it is in.

        A group draws when its last chunk is there.
        """
        self.chunk = chunk
        group = chunk // (self.options.vectorize or 1)
        seed_generators([self.device], self.options.seed, DROPOUT, self.step, group)

    def _running_weight(self, chunk: object) -> float:
        exact = self.options.accumulation == "exact"
        return running_weight(self.chunk, len(self.chunks), exact=exact)

    def _restart(self) -> None:
        """Forget what a visit of all chunks has counted: exact sums may visit them again."""
        if self.first is not None:
            self.first.note()
        if not self.options.stochastic and self._counts:
            self.correct.zero_()
        if self.every_pass is not None:
            self.every_pass.restart()

    @property
    def _counts(self) -> bool:
        return self.first is None or self.first.is_running

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Count correctly classified samples, after every forward pass of training."""
        if self._counts:
            self.correct += (output.argmax(1) == target).sum()
        self.on_samples(len(target) // self.options.max_up * self.context.world_size)

    def take_step(self) -> None:
        """Take one optimizer step: on the whole training set, or on the next mini-batch."""
        (number, index), samples = self.position, self.current_chunks.samples
        if index == 0:
            for name in _TOTALS:
                getattr(self, name).zero_()
        if number < self.epochs:
            self._sgd_step(index, samples)
        else:
            self._full_batch_step()
        self.step += 1
        if self.position[1] == 0:
            self._end_pass(samples)

    def _full_batch_step(self) -> None:
        if self.first is not None:
            self.first.begin()
        follow = nullcontext() if self.every_pass is None else self.every_pass.following()
        with follow:
            whole = self.grad_transform is None
            loss = self.optimizer.step(self.closure) if whole else self.closure()
        if self.first is not None:
            self.first.note()
            loss = self.first.loss
        self.loss += loss
        if not whole:
            self.gradient_norm = self.grad_transform(self.step)
            self.optimizer.step()
        elif isinstance(self.optimizer, FullBatchGD):
            self.gradient_norm = self.optimizer.last_grad_norm
        else:  # of the last point that was looked at
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.gradient_norm = nn.utils.get_total_norm(grads)
        self.context.all_reduce_([self.correct])
        if self.closure.mean_sqnorm is not None:
            self.chunk_sqnorm += self.closure.mean_sqnorm

    def _sgd_step(self, index: int, samples: int) -> None:
        input, target = self.batches[index]
        self.seed_chunk()
        found = self.mini_batch(input, target)
        share = len(target) / (samples * self.options.max_up)
        self.loss += found.loss * share
        if found.square is not None:
            self.chunk_sqnorm += found.square * share
        optimizer_clips = isinstance(self.optimizer, FullBatchGD) and self.grad_transform is None
        if self.grad_transform is not None:
            self.gradient_norm = self.grad_transform.clip()
        elif not optimizer_clips:
            self.gradient_norm = nn.utils.clip_grad_norm_(
                self.model.parameters(),
                self.options.max_norm or math.inf,
                float(self.options.norm_type),
            )
        self.optimizer.step()
        if optimizer_clips:
            self.gradient_norm = self.optimizer.last_grad_norm

    def _end_pass(self, samples: int) -> None:
        self.finite &= self.loss.isfinite()
        self.finite_passes += self.finite
        if self.average is not None:
            self.average.update_parameters(self.model)
        if self.options.stop_fitted:
            fitted = int(self.correct) == samples * self.options.max_up
            self.fitted = self.fitted + 1 if fitted else 0
        self.samples = samples
        self._stop_if_fitted()

    def _stop_if_fitted(self) -> None:
        if 0 < self.options.stop_fitted <= self.fitted:
            self.total_steps = self.step

    def check_finite(self) -> None:
        """Raise Diverged, naming the first pass whose loss was infinite or undefined."""
        if not (self.finite & self.loss.isfinite()):
            o = self.options
            unit = "epoch" if o.stochastic else "pass" if o.switch_at else "step"
            bad = self.first_pass + int(self.finite_passes) + 1
            raise Diverged(
                f"the loss became infinite or undefined at {unit} {bad}: try a smaller --lr (it is "
                f"{o.lr:g}), a longer --warmup, or clipping with --max-norm 0.25"
            )

    def record(self, evaluated: Iterable[str] = ()) -> dict[str, Any]:
        """The metrics after a pass, read from the device; of the `evaluated` splits too.

        All processes call it together. Raises Diverged.
        """
        self.check_finite()
        o, norm, done = self.options, float(self.gradient_norm), self.position[0]
        record = {
            "pass": done,
            "step": self.step,
            "gradient_evaluations": (evaluations := self._evaluations(done)),
            "sample_passes": self._sample_passes(done, evaluations),
            "loss": float(self.loss),
            "train_accuracy": int(self.correct) / (self.samples * o.max_up),
            "gradient_norm": norm,
            "clip": self.clip_coefficient,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        full_batch = self.closure is not None and self.closure.mean_sqnorm is not None
        if full_batch or o.chunk_norms:
            record["mean_squared_chunk_norm"] = float(self.chunk_sqnorm)
        for name in evaluated:
            record[f"{name}_accuracy"], record[f"{name}_loss"] = evaluate(
                self.average or self.model,
                getattr(self.data, name),
                flip=o.tta == "flip",
                squared=o.loss == "squared",
                dtype=autocast_dtype(o.precision),
                processes=self.context,
            )
        return record

    def _evaluations(self, done: int) -> int:
        """Gradients of every sample in so many passes."""
        if self.first is not None:
            return self.closure.step * build.gradients_per_pass(self.options)
        plain = min(done, self.options.switch_at)
        if self.options.penalty is not None:  # a penalty of strength 0 takes no second pass
            plain += sum(lr_factor(k, self.options) == 0 for k in range(plain, done))
        return plain + (done - plain) * build.gradients_per_pass(self.options)

    def _sample_passes(self, done: int, evaluations: int) -> int:
        """Samples that a gradient was taken of, in so many passes."""
        epochs = min(done, self.options.switch_at)
        batches = epochs * self.batches.samples if epochs else 0
        return (batches + (evaluations - epochs) * self.chunks.samples) * self.options.max_up

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, as tensors and plain types."""
        parts = {name: getattr(self, name) for name in _PARTS}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        names = {p: name for name, p in self.model.named_parameters()}
        groups = self.optimizer.param_groups  # numbers the parameters in its own order
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state | {
            "options": self.options.as_json() | {"resume": None},
            "parameters": [names[p] for group in groups for p in group["params"]],
            "step": self.step,
            "seconds": self.seconds,
            "fitted": self.fitted,
            **{name: getattr(self, name) for name in _TOTALS},
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        for name in _PARTS:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.first_pass, self.fitted = self.position[0], state["fitted"]
        self._stop_if_fitted()
        for name in _TOTALS:
            getattr(self, name).copy_(state[name])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
