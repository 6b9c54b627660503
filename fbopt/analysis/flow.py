"""Flows beside gradient descent and RMSProp: theta' = -lr P^-1 (grad L + 1/2 grad<H, Sigma>), with
Sigma = 0 (gradient flow; the stable flow leaves out unstable directions) or Sigma of the edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt.analysis import complementarity
from fbopt.analysis.eigen import eigenpairs
from fbopt.analysis.flow_edge import Edge, Held, hold
from fbopt.analysis.flow_rules import Scale, rule_of
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.objective import Objective
from fbopt.analysis.spectrum import Eigenpairs

KINDS = ("gradient", "stable", "central")
REACH = 1.0  # the largest lr * length * sharpness of a sub-step
OVERSHOOT = 0.01  # of the edge, by which a central flow may begin above it


class _Seen(Hessian):
    """P^-1/2 H P^-1/2, of whose eigenvectors v the u = P^-1/2 v have H u = lambda P u."""

    root: Scale = 1.0

    def __call__(self, vector: Tensor) -> Tensor:
        return super().__call__(vector * self.root) * self.root

    def follow(self, scale: Scale) -> None:
        """Move to the model's parameters and this P."""
        self.refresh()
        if isinstance(scale, Tensor):
            self.root = scale.rsqrt().to(self.objective.dtype)


class Flow:
    """A flow in continuous time, beside full-batch gradient descent of learning rate lr.

    Time is counted in steps of gradient descent. The model's parameters move along

        gradient   theta' = -lr grad L
        stable     theta' = -lr (I - U U^T) grad L,   U: eigenvectors of curvature above 2/lr
        central    theta' = -lr (grad L + 1/2 grad<H, Sigma>),   Sigma = U X U^T

    At the edge of stability gradient descent oscillates along the eigenvectors U whose curvature is
    about 2/lr. A central flow is the path of its mean over time, with Sigma the covariance of the
    oscillation: the only one for which no curvature rises above 2/lr, and which is zero along what
    is below. With H_ij = u_i.(H u_j), over a sub-step of length h it solves

        S = (2/lr I - U^T H U)/h + lr <grad H, grad L> + lr/2 <grad H, grad H>[X],
        X >= 0,   S >= 0,   <S, X> = 0                  (inequalities of semidefinite matrices)

    by a cone program. S says what room the eigenvalues have after the sub-step, to first order.

    **RMSProp.** With an optimizer in place of lr the flow is of its steps: of RMSprop, or of Adam
    with betas[0] = 0, which corrects the bias of its mean of squares. With
    ``P = sqrt(nu) + eps`` all of the above holds for grad L and Sigma in the metric of P
    (``H u_i = lambda_i P u_i``, ``lambda_i <= 2/lr``), and nu moves along::

        theta' = -lr P^-1 (grad L + 1/2 grad<H, Sigma>)
        nu'    = c (grad L^2 + diag(H Sigma H) - nu)

    where c is (1 - beta)/beta, divided by ``1 - beta^t`` with the bias corrected. S has the term
    ``2/lr u_i.(P' u_j)`` more. A flow begins with the nu of the optimizer's next step. A first step
    divides by its own gradient, which is far above the edge: let central flows begin some steps
    later.

    **Sub-steps.** Each is a step of the classical Runge-Kutta method (of fourth order) with U, X
    and ``grad<H, Sigma>`` as they are at its beginning, so that stable and central flows are of
    first order in its length h. There are at least `substeps` in a unit of time, and so many that
    ``lr h sharpness`` is at most 1.01. Double them to see what the length changes.
    Eigenvectors start from those of the sub-step before.

    **What it is not for.** Gradient descent with mini-batches, augmentation, momentum, weight
    decay, clipping or a penalty follows other flows; the loss has to be deterministic, which is
    checked. A central flow describes the mean of an oscillation that stays small: not a catapult,
    where the loss rises by far within a few steps, nor the oscillation itself. Where gradients jump
    (ReLU), third derivatives leave out what the jumps contribute.

    Args:
        objective: L; its model's parameters are those that move.
        lr: the learning rate of gradient descent, above 0; or an optimizer, as after its last step,
            without momentum and weight decay: ``torch.optim.SGD``, ``RMSprop``, ``Adam``.
        kind: ``"gradient"``, ``"stable"`` or ``"central"``.
        substeps: the least number of sub-steps in a unit of time.
        margin: of a central flow: eigenvalues above ``(1 - margin) 2/lr`` are in U. More of them
            cost time, but none is missed; those that stay below the edge get no Sigma.
        tolerance: of the eigenvectors' residuals, relative to the eigenvalue; the eigenvalue's own
            error is of the order of its square. Float64 models can have less.
        seed: of the random start of the eigenvectors.

    Attributes:
        time: the units of time so far, steps of gradient descent.
        pairs: the largest eigenvalues of P^-1/2 H P^-1/2 where the flow is, :class:`Eigenpairs`.
        edge: the eigenspace of the last sub-step, an :class:`Edge`.

    Raises:
        TypeError, ValueError: an invalid argument; a central flow that begins at an eigenvalue
            more than one hundredth above 2/lr.
        ModuleNotFoundError: a central flow without clarabel and scipy (``pip install
            'fbopt[flow]'``).
        RuntimeError: a loss that is not deterministic.

    Source: Cohen, Damian, Talwalkar, Kolter, Lee, "Understanding Optimization in Deep Learning with
    Central Flows" (ICLR 2025, arXiv 2410.24206), sections 3 and 4, whose complementarity problem is
    the limit of this one for h to 0.
    """

    def __init__(
        self,
        objective: Objective,
        lr: float | torch.optim.Optimizer,
        kind: str = "gradient",
        *,
        substeps: int = 2,
        margin: float = 0.05,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective, got {type(objective).__name__}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        check_number("substeps", substeps, least=1)
        check_number("margin", margin, least=0)
        check_number("tolerance", tolerance, above=0)
        if margin >= 1:
            raise ValueError(f"margin must be below 1, got {margin}")
        if kind == "central":
            complementarity.solver()
        self._rule = rule_of(objective, lr)
        self.objective, self.lr, self.kind = objective, self._rule.lr, kind
        self.substeps, self.margin, self.seed, self.time = substeps, margin, seed, 0
        self.tolerance = tolerance
        self._count = 1
        self._hessian = _Seen(objective)
        self._hessian.follow(self._rule.scale(self._rule.nu))
        self.pairs = self._eigenpairs(None)
        self._refuse_above()
        self.pairs = self._find(self.pairs)
        self.edge = self._apart(0)

    @property
    def limit(self) -> float:
        """2/lr, the curvature above which steps of gradient descent are unstable."""
        return 2 / self.lr

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue of P^-1 H at the model's parameters."""
        return float(self.pairs.values[0])

    def advance(self, steps: int = 1) -> None:
        """Move the model's parameters on by so many units of time, steps of gradient descent.

        Raises:
            ValueError: a parameter or the loss becomes infinite or undefined; the parameters are
                those before the sub-step in which it does.
            RuntimeError: eigenvalues that did not converge, or an edge that cannot be held.
        """
        check_number("steps", steps, least=0)
        for _ in range(int(steps)):
            count = max(self.substeps, self._needed)
            for part in range(count):
                self._substep(self.time + part / count, 1 / count)
            self.time += 1

    @property
    def _needed(self) -> int:
        """The sub-steps for the curvature; one within a hundredth of the edge asks for no more."""
        return math.ceil(self.lr * self.sharpness / (REACH * (1 + OVERSHOOT)))

    def _substep(self, time: float, length: float) -> None:
        rule, start = self._rule, self.objective.theta()
        held = self._treatment(time, length)
        self.edge, scale = held.edge, rule.scale(rule.nu)
        slopes, squares = list[Tensor](), list[Tensor]()
        for share in (0.0, 0.5, 0.5, 1.0):
            shift, nu = slopes[-1] * (share * length) if slopes else None, rule.nu
            if nu is not None and squares:
                nu = (nu + squares[-1] * (share * length)).clamp_min(0)
            gradient = self.objective.gradient(shift)
            step = (gradient + held.drift) / rule.scale(nu)
            slopes.append(-self.lr * self._projected(step, scale).to(start))
            mean = gradient.double().square() + held.squares
            if (moved := rule.slope(mean, time + share * length, nu)) is not None:
                squares.append(moved)
        moved = start + _mean(slopes) * length
        if not torch.isfinite(moved).all():
            raise ValueError(
                f"the flow's parameters become infinite or undefined after time {self.time}: "
                "begin at another point"
            )
        with torch.no_grad():
            parts = self.objective.unflatten(moved)
            for p, part in zip(self.objective.params, parts, strict=True):
                p.copy_(part)
        if rule.nu is not None:
            rule.nu = (rule.nu + _mean(squares) * length).clamp_min(0)
        self._hessian.follow(rule.scale(rule.nu))
        self.pairs = self._find(self.pairs)

    def _projected(self, vector: Tensor, scale: Scale) -> Tensor:
        if self.kind != "stable":
            return vector
        basis = self.edge.vectors.to(vector)
        return vector - basis.T @ (basis @ (scale * vector))

    def _treatment(self, time: float, length: float) -> Held:
        """The eigenspace that is treated apart, and what its oscillation does."""
        size = self._critical(self.pairs)
        edge = self._apart(size)
        if self.kind != "central" or not size:
            return Held(edge, torch.zeros_like(self.pairs.vectors[0]), 0.0)
        return hold(self.objective, self._rule, edge, time, length)

    def _critical(self, pairs: Eigenpairs) -> int:
        """How many of the eigenvalues are treated apart: above the edge, or near it."""
        if self.kind == "gradient":
            return 0
        least = self.limit * (1 - self.margin) if self.kind == "central" else self.limit
        return int((pairs.values > least).sum())

    def _apart(self, size: int) -> Edge:
        vectors = self.pairs.vectors[:size] * self._hessian.root
        return Edge.without_oscillation(self.pairs.values[:size], vectors)

    def _find(self, start: Eigenpairs | None) -> Eigenpairs:
        """The eigenvalues that are treated apart, and at least the next one."""
        while True:
            found = self._eigenpairs(start)
            critical = self._critical(found)
            if not found.converged[: max(critical, 1)].all():
                raise RuntimeError(
                    f"eigenvalues of the Hessian did not converge at time {self.time} of the flow: "
                    "pass a float64 model and data, or a larger tolerance"
                )
            if critical < self._count or self._count == self.objective.size:
                self._count = min(critical + 1, self.objective.size)
                return found
            self._count, start = min(critical + 1, self.objective.size), found

    def _eigenpairs(self, start: Eigenpairs | None) -> Eigenpairs:
        return eigenpairs(
            self._hessian,
            self._count,
            start=start,
            tolerance=self.tolerance,
            max_products=1000,
            seed=self.seed,
        )

    def _refuse_above(self) -> None:
        if self.kind == "central" and self.sharpness > self.limit * (1 + OVERSHOOT):
            raise ValueError(
                f"a central flow begins where no curvature is above 2/lr = {self.limit:.4g}, but "
                f"the largest is {self.sharpness:.4g}: begin at an earlier step, or with an lr "
                f"below {2 / self.sharpness:.3g}"
            )


def _mean(slopes: list[Tensor]) -> Tensor:
    """The slope of a step of the classical Runge-Kutta method."""
    first, second, third, last = slopes
    return (first + 2 * second + 2 * third + last) / 6
