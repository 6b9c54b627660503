"""A training run's state, how it takes one step, and what it measures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.train import models
from fbopt.train.augment import augmented, sampling
from fbopt.train.data import Chunks, Data, Split
from fbopt.train.draws import seed_chunk
from fbopt.train.options import Options, OptionsError
from fbopt.train.processes import World

GRADIENTS = {None: 1, "forward": 2, "central": 3, "exact": 2}  # backward passes per chunk


class Diverged(RuntimeError):
    """The loss became infinite or undefined."""


class Visits:
    """The chunks of a full-batch step; accuracy is counted anew where they are visited again."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.run.correct.zero_()
        return iter(self.run.chunks)


class Run:
    """A training run: all that a checkpoint holds, and how to take one step.

    Of several processes each has a whole run, with the same numbers after every step.
    """

    def __init__(
        self, options: Options, data: Data, device: torch.device, world: World | None = None
    ) -> None:
        self.options, self.device = options, device
        self.data = replace(data, train=augmented(data.train, options))
        self.world = world or World()
        torch.manual_seed(options.seed)
        try:
            model = models.build(
                options.model, data.shape, data.classes, options.width, options.dropout
            )
        except ValueError as error:
            raise OptionsError(str(error)) from error
        self.model = model.to(device).train()
        if len(data.shape) == 3:
            self.model.to(memory_format=torch.channels_last)
        self.loss_fn = nn.functional.cross_entropy
        if options.label_smoothing:
            self.loss_fn = partial(self.loss_fn, label_smoothing=options.label_smoothing)
        self.chunks = Chunks(
            self.data.train,
            options.batch_size if options.stochastic else options.chunk_size,
            begin=self._seed_draws,
            sampling=options.chunks,
            seed=options.seed,
            now=lambda: self.step // self.steps_per_pass,
            rank=self.world.rank,
            processes=self.world.size,
        )
        self.steps_per_pass = len(self.chunks) if options.stochastic else 1
        self.total_steps = options.passes * self.steps_per_pass
        self.step, self.seconds = 0, 0.0
        self.first_pass = 0  # where `finite_passes` counts from, in a resumed run
        self.advance = lambda samples: None
        # Summed on the device and read only to log: no step waits for the device.
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.finite_passes = torch.zeros((), dtype=torch.int64, device=device)
        self.gradient_norm: Tensor | None = None
        self._build_optimizer()

    def _build_optimizer(self) -> None:
        options = self.options
        parameters = models.decaying(self.model, options.weight_decay, options.decay == "weights")
        common = {name: getattr(options, name) for name in ("lr", "momentum", "nesterov")}
        self.closure = None
        if options.stochastic:
            self.optimizer = torch.optim.SGD(parameters, **common)
        else:
            self.optimizer = FullBatchGD(parameters, **common, max_norm=options.max_norm)
            penalty = None
            if options.penalty is not None:
                penalty = GradientPenalty(
                    strength=options.penalty, radius=options.radius, method=options.method
                )
            self.closure = FullBatchClosure(
                self.model,
                self.loss_fn,
                Visits(self),
                penalty=penalty,
                optimizer=self.optimizer,
                accumulation=options.accumulation,
                observe=self._observe,
                process_group=self.world.group,
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: rate_factor(done, options.warmup, options.cosine)
        )

    def _seed_draws(self, chunk: int = 0) -> None:
        seed_chunk(self.device, self.options.seed, self.step, chunk)

    def _observe(self, output: Tensor, target: Tensor) -> None:
        self.correct += (output.argmax(1) == target).sum()
        self.advance(len(target) * self.world.size)

    def take_step(self) -> None:
        """One optimizer step: on the whole training set, or on the next mini-batch."""
        index = self.step % self.steps_per_pass
        if index == 0:
            self.correct.zero_()
            self.loss.zero_()
        if self.closure is None:
            self._sgd_step(index)
        else:
            self.loss += self.optimizer.step(self.closure)
            self.gradient_norm = self.optimizer.last_grad_norm
            self.world.sum_(self.correct)
        self.step += 1
        if self.step % self.steps_per_pass == 0:
            self.finite &= self.loss.isfinite()
            self.finite_passes += self.finite

    def _sgd_step(self, index: int) -> None:
        input, target = self.chunks[index]
        self.optimizer.zero_grad()
        self._seed_draws()
        output = self.model(input)
        loss = self.loss_fn(output, target)
        loss.backward()
        self.gradient_norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.options.max_norm or math.inf
        )
        self.optimizer.step()
        self.loss += loss.detach() * (len(target) / len(self.data.train))
        self._observe(output.detach(), target)

    def check_finite(self) -> None:
        """Raise Diverged, naming the first pass whose loss was infinite or undefined."""
        if not (self.finite & self.loss.isfinite()):
            unit = "epoch" if self.options.stochastic else "step"
            bad = self.first_pass + int(self.finite_passes) + 1
            raise Diverged(
                f"the loss became infinite or undefined at {unit} {bad}: try a smaller "
                f"--lr (it is {self.options.lr:g}), a longer --warmup, or clipping "
                "with --max-norm 0.25"
            )

    def record(self, on_test: bool) -> dict[str, Any]:
        """The metrics after a pass, read from the device. Raises Diverged."""
        self.check_finite()
        options, norm = self.options, float(self.gradient_norm)
        done = self.step // self.steps_per_pass
        record = {
            "pass": done,
            "step": self.step,
            "gradient_evaluations": done * GRADIENTS[options.method],
            "loss": float(self.loss),
            "train_accuracy": int(self.correct) / len(self.data.train),
            "gradient_norm": norm,
            "clip": min(1.0, (options.max_norm or math.inf) / max(norm, 1e-12)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        if self.closure is not None and self.closure.mean_sqnorm is not None:
            record["mean_squared_chunk_norm"] = float(self.closure.mean_sqnorm)
        if on_test:
            found = evaluate(self.model, self.data.test, flip=options.tta == "flip")
            record["test_accuracy"], record["test_loss"] = found
        return record

    def describe(self) -> str:
        """Two lines: what is trained on what and where, and the hyperparameters."""
        o = self.options
        where = str(self.device)
        if self.world.size > 1:
            where = f"{self.device.type}, {self.world.size} processes"
        kind, unit = ("mini-batches", "epochs") if o.stochastic else ("chunks", "full-batch steps")
        clip = "no clipping" if o.max_norm is None else f"clipped to {o.max_norm:g}"
        penalty = "no penalty"
        if o.penalty is not None:
            penalty = f"penalty {o.penalty:g} ({o.method} differences, radius {o.radius:g})"
            if o.method == "exact":
                penalty = f"penalty {o.penalty:g} (exact)"
        dropout = f", dropout {o.dropout:g}" if o.dropout else ""
        exact = ", exact sums" if o.accumulation == "exact" else ""
        if o.label_smoothing:
            dropout += f", label smoothing {o.label_smoothing:g}"
        return (
            f"{o.recipe} on {o.data} ({len(self.data.train):,} samples in {kind} of "
            f"{self.chunks.size}{sampling(o)}): {o.model} with "
            f"{models.count_parameters(self.model):,} parameters, {o.passes} {unit}, "
            f"{where}\nlr {o.lr:g} ({o.warmup} of warm-up, cosine over {o.cosine}), momentum "
            f"{o.momentum:g}{' (Nesterov)' if o.nesterov else ''}, weight decay "
            f"{o.weight_decay:g}, {clip}, {penalty}{dropout}{exact}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors and plain types."""
        state = {
            name: getattr(self, name).state_dict()
            for name in ("model", "optimizer", "scheduler", "closure")
            if getattr(self, name) is not None
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state | {
            "options": self.options.as_json() | {"resume": None},
            "parameters": self._parameter_names(),
            "step": self.step,
            "seconds": self.seconds,
            "correct": self.correct,
            "loss": self.loss,
            "rng": torch.get_rng_state(),
        }

    def _parameter_names(self) -> list[str]:
        """The parameters' names in the order in which the optimizer counts them."""
        names = {p: name for name, p in self.model.named_parameters()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        for name in ("model", "optimizer", "scheduler", "closure"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.first_pass = self.step // self.steps_per_pass
        self.correct.copy_(state["correct"])
        self.loss.copy_(state["loss"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def rate_factor(done: int, warmup: int, cosine: int) -> float:
    """The learning rate after `done` passes, as a share of its peak.

    Linear over `warmup` passes, then a cosine over `cosine` more (arXiv 2109.14119, section 4).
    """
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / cosine)))


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, size: int = 1000, flip: bool = False
) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) on a split, in evaluation mode.

    With `flip` of the mean probabilities of each image and its mirror image.
    """
    training = model.training
    model.eval()
    correct = loss = torch.zeros((), dtype=torch.float64, device=split.y.device)
    for input, target in Chunks(split, size):
        output = model(input)
        if flip:
            both = torch.stack([output, model(input.flip(-1))])
            output = both.log_softmax(2).logsumexp(0)
        correct = correct + (output.argmax(1) == target).sum()
        loss = loss + nn.functional.cross_entropy(output, target, reduction="sum")
    model.train(training)
    return correct.item() / len(split), loss.item() / len(split)
