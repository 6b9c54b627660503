"""Steps θ_t of gradient descent or RMSProp and a flow θ(t) from the same weights, side by side.

Both are at t = 0, 1, 2 and on.
Distances are to the iterate θ_t and to the smoothed (θ_{t-1} + 2 θ_t + θ_{t+1})/4, in which an
oscillation of period two, as at the edge of stability, is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbopt.analysis import Eigenpairs, Flow, Hessian, Objective, PreconditionedHessian, eigenpairs
from fbopt.train.config.rules import is_preconditioned
from fbopt.train.curvature import training_loss
from fbopt.train.flow.options import check_run
from fbopt.train.reopen import open_run, read_run
from fbopt.train.trainer import Diverged, Trainer

TOLERANCE = 1e-3  # of the sharpness of gradient descent, relative


class Point(NamedTuple):
    """A point of a path: loss, outputs (N, classes) on the training data, parameters (P,)."""

    loss: float
    outputs: Tensor
    theta: Tensor


def begin(path: Path, device_name: str) -> Trainer:
    """The run in a folder, before its first step.

    Raises:
        OptionsError: no run, none without a checkpoint, none of plain gradient descent, or other
            data or another model than the run's.
    """
    _, state, made = read_run(path)
    check_run(path, made)
    return open_run(path, state, replace(made, cuda_graph=False), device_name)


class Beside:
    """A run from its beginning, and a flow beside it.

    Args:
        run: the run, before its first step.
        after: the number of steps that are taken before the flow begins.
        kind, substeps, margin: of the flow, see :class:`fbopt.analysis.Flow`.
    """

    def __init__(
        self, run: Trainer, kind: str, substeps: int, margin: float, after: int = 0
    ) -> None:
        self.run, self.kind, self.after = run, kind, after
        for _ in range(after):
            run.take_step()
            run.scheduler.step()
        self.descent = training_loss(run)
        other, rule = copy.deepcopy((run.model, run.optimizer))  # the copied rule has its copies
        moving = Objective(
            other,
            self.descent.loss_fn,
            self.descent.chunks,
            autocast=self.descent.autocast,
            process_group="local",
        )
        self.is_preconditioned = is_preconditioned(run.options)
        lr = rule if self.is_preconditioned else float(rule.param_groups[0]["lr"])
        self.flow = Flow(moving, lr, kind, substeps=substeps, margin=margin, seed=run.options.seed)
        self._pairs: Eigenpairs | None = None

    def follow(self, steps: int, every: int) -> Iterator[dict[str, Any]]:
        """Yield a record where the flow begins, and after every so many steps and the last.

        Raises:
            Diverged: gradient descent has a loss that is infinite or undefined.
            ValueError, RuntimeError: the flow cannot go on, see :meth:`Flow.advance`.
        """
        last, now, ahead = None, point(self.descent), self._ahead(0)
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                yield self._record(self.after + step, last, now, ahead)
            if step < steps:
                self.flow.advance()
                last, now, ahead = now, ahead, self._ahead(step + 1)

    def _ahead(self, step: int) -> Point:
        """The iterate after one step more."""
        self.run.take_step()
        self.run.scheduler.step()
        found = point(self.descent)
        if not torch.isfinite(torch.tensor(found.loss)):
            raise Diverged(
                f"the run has a loss of {found.loss} after step {self.after + step + 1}: take one "
                "with a smaller --lr, or fewer --steps"
            )
        return found

    def _record(self, step: int, last: Point | None, now: Point, ahead: Point) -> dict[str, Any]:
        flow, beside = self.flow, point(self.flow.objective)
        found = {
            "step": step,
            "loss": now.loss,
            "flow_loss": beside.loss,
            "flow_mean_loss": beside.loss + flow.edge.excess_loss,
            "sharpness": self._sharpness(now, ahead),
            "flow_sharpness": flow.sharpness,
            "threshold": flow.limit,
            "at_the_edge": len(flow.edge.values),
            **_distances(beside, now),
        }
        if last is not None:
            triples = zip(last[1:], now[1:], ahead[1:], strict=True)
            smooth = Point(now.loss, *((a + 2 * b + c) / 4 for a, b, c in triples))
            found |= {f"{k}_smoothed": v for k, v in _distances(beside, smooth).items()}
        return found

    def _sharpness(self, now: Point, ahead: Point) -> float:
        """The largest eigenvalue at the iterate, one step before that of the model."""
        _assign(self.descent, now.theta)
        hessian = Hessian(self.descent)
        if self.is_preconditioned:  # by the P of the step that is ahead
            hessian = PreconditionedHessian(self.descent, self.run.optimizer)
        self._pairs = eigenpairs(
            hessian, 1, start=self._pairs, tolerance=TOLERANCE, verify=False, seed=self.flow.seed
        )
        _assign(self.descent, ahead.theta)
        if not self._pairs.converged.all():
            raise RuntimeError(
                "the sharpness of the run did not converge: train the run with --precision fp64"
            )
        return float(self._pairs.values[0])


@torch.no_grad()
def point(objective: Objective) -> Point:
    """The loss, outputs and parameters of an objective's model where it is."""
    outputs = []
    with objective.evaluating("losses"):
        for index, chunk, weight in objective.visit():
            loss, output, _ = objective.chunk_forward(index, chunk)
            objective.shares.add(weight, loss, None)
            outputs.append(output.detach().clone())
    objective.count("losses")
    return Point(objective.shares.loss(), torch.cat(outputs), objective.theta().clone())


@torch.no_grad()
def _assign(objective: Objective, theta: Tensor) -> None:
    for p, part in zip(objective.params, objective.unflatten(theta), strict=True):
        p.copy_(part)


def _distances(one: Point, other: Point) -> dict[str, float]:
    """The root mean square difference of the outputs, and the distance of the parameters."""
    outputs = (one.outputs.double() - other.outputs.double()).square().mean().sqrt()
    parameters = (one.theta.double() - other.theta.double()).norm()
    return {"function_distance": float(outputs), "parameter_distance": float(parameters)}
