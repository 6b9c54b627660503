"""A training run's state, how it takes one step, and what it measures."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fbopt import FullBatchGD
from fbopt.train import assemble
from fbopt.train.config.options import Options
from fbopt.train.data.dataset import Chunks, Data
from fbopt.train.data.rng import seed_chunk
from fbopt.train.distributed import World
from fbopt.train.evaluate import MovingAverage, evaluate
from fbopt.train.precision import autocast, cast_to, cross_entropy

GRADIENTS = {None: 1, "forward": 2, "central": 3, "exact": 2}  # backward passes per chunk


class Diverged(RuntimeError):
    """The loss became infinite or undefined."""


class Run:
    """A training run: all that a checkpoint holds, and how to take one step.

    A pass is an epoch of SGD, of which there are `epochs` first, or one full-batch step. Of several
    processes each has a whole run, with the same numbers after every step.
    """

    def __init__(
        self, options: Options, data: Data, device: torch.device, world: World | None = None
    ) -> None:
        self.options, self.device = options, device
        self.data, self.world = data, world or World()
        self.model = assemble.model(options, data, device)
        self.loss_fn = partial(cross_entropy, label_smoothing=options.label_smoothing)
        self.autocast = cast_to(options.precision)
        self.epochs = math.inf if options.stochastic else options.switch_at
        self.batches = assemble.visits(self, stochastic=True) if self.epochs else None
        self.chunks = self.batches
        if not options.stochastic:
            self.chunks = assemble.visits(self, stochastic=False)
        self.data = replace(data, train=self.chunks.split)
        self.total_steps = self._steps(options.passes)
        self.step, self.seconds = 0, 0.0
        self.first_pass = 0  # where `finite_passes` counts from, in a resumed run
        self.fitted = 0  # passes in a row that classified everything right
        self.advance = lambda samples: None
        # Summed on the device and read only to log: no step waits for the device.
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.finite_passes = torch.zeros((), dtype=torch.int64, device=device)
        self.gradient_norm: Tensor | None = None
        self.samples = len(self.chunks.split)  # in the last pass
        # Only of full-batch gradient descent: what sums over the chunks, and what changes the sum.
        self.closure = self.change = None
        assemble.optimizer(self)
        self.average = MovingAverage(self.model, options.ema) if options.ema else None
        if options.compile:
            self.model.compile()

    @property
    def place(self) -> tuple[int, int]:
        """The number of whole passes done, and of mini-batches in the present one."""
        if self.epochs:
            number, index = divmod(self.step, len(self.batches))
            if number < self.epochs:
                return number, index
        return self.epochs + self.step - self._steps(self.epochs), 0

    @property
    def steps_per_pass(self) -> int:
        """Steps of the present pass, or the next one."""
        return len(self.batches) if self.place[0] < self.epochs else 1

    @property
    def visited(self) -> Chunks:
        """What the present pass, or the next one, visits."""
        return self.batches if self.place[0] < self.epochs else self.chunks

    def _steps(self, passes: int) -> int:
        epochs = min(passes, self.epochs)
        return passes - epochs + (epochs * len(self.batches) if epochs else 0)

    def seed_draws(self, chunk: int = 0) -> None:
        """Seed what the model draws from, before a chunk or a mini-batch."""
        seed_chunk(self.device, self.options.seed, self.step, chunk)

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Count what was classified right, after every forward pass of training."""
        self.correct += (output.argmax(1) == target).sum()
        self.advance(len(target) * self.world.size)

    def take_step(self) -> None:
        """One optimizer step: on the whole training set, or on the next mini-batch."""
        (number, index), samples = self.place, len(self.visited.split)
        if index == 0:
            for total in (self.correct, self.loss, self.squares):
                total.zero_()
        if number < self.epochs:
            self._sgd_step(index, samples)
        else:
            self._full_step()
        self.step += 1
        if self.place[1] == 0:
            self._end_pass(samples)

    def _full_step(self) -> None:
        if self.change is None:
            self.loss += self.optimizer.step(self.closure)
            self.gradient_norm = self.optimizer.last_grad_norm
        else:
            self.loss += self.closure()
            self.gradient_norm = self.change(self.step)
            self.optimizer.step()
        self.world.sum_(self.correct)
        if self.closure.mean_sqnorm is not None:
            self.squares += self.closure.mean_sqnorm

    def _sgd_step(self, index: int, samples: int) -> None:
        input, target = self.batches[index]
        self.optimizer.zero_grad()
        self.seed_draws()
        with autocast(self.device, self.autocast):
            output = self.model(input)
            loss = self.loss_fn(output, target)
        loss.backward()
        clips = isinstance(self.optimizer, FullBatchGD) and self.change is None
        if not clips:
            self.gradient_norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), self.options.max_norm or math.inf
            )
        self.optimizer.step()
        if clips:
            self.gradient_norm = self.optimizer.last_grad_norm
        share = len(target) / samples
        self.loss += loss.detach() * share
        if self.options.chunk_norms:
            self.squares += self.gradient_norm.detach().square() * share
        self.observe(output.detach(), target)

    def _end_pass(self, samples: int) -> None:
        self.finite &= self.loss.isfinite()
        self.finite_passes += self.finite
        if self.average is not None:
            self.average.update(self.model)
        if self.options.stop_fitted:
            self.fitted = self.fitted + 1 if int(self.correct) == samples else 0
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
                f"the loss became infinite or undefined at {unit} {bad}: try a smaller "
                f"--lr (it is {o.lr:g}), a longer --warmup, or clipping "
                "with --max-norm 0.25"
            )

    def record(self, on_test: bool) -> dict[str, Any]:
        """The metrics after a pass, read from the device. Raises Diverged."""
        self.check_finite()
        o, norm, done = self.options, float(self.gradient_norm), self.place[0]
        epochs = min(done, self.epochs)
        record = {
            "pass": done,
            "step": self.step,
            "gradient_evaluations": epochs + (done - epochs) * GRADIENTS[o.method],
            "loss": float(self.loss),
            "train_accuracy": int(self.correct) / self.samples,
            "gradient_norm": norm,
            "clip": min(1.0, (o.max_norm or math.inf) / max(norm, 1e-12)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        penalised = self.closure is not None and self.closure.mean_sqnorm is not None
        if penalised or o.chunk_norms:
            record["mean_squared_chunk_norm"] = float(self.squares)
        if on_test:
            record["test_accuracy"], record["test_loss"] = evaluate(
                self.model if self.average is None else self.average.model,
                self.data.test,
                flip=o.tta == "flip",
                dtype=self.autocast,
            )
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors and plain types."""
        state = {
            name: getattr(self, name).state_dict()
            for name in ("model", "optimizer", "scheduler", "closure")
            if getattr(self, name) is not None
        }
        if self.average is not None:
            state["average"] = self.average.model.state_dict()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state | {
            "options": self.options.as_json() | {"resume": None},
            "parameters": self._parameter_names(),
            "step": self.step,
            "seconds": self.seconds,
            "fitted": self.fitted,
            "correct": self.correct,
            "loss": self.loss,
            "squares": self.squares,
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
        self.first_pass, self.fitted = self.place[0], state.get("fitted", 0)
        self._stop_if_fitted()
        for name in ("correct", "loss", "squares"):
            if name in state:  # not all of them are in checkpoints of earlier versions
                getattr(self, name).copy_(state[name])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
