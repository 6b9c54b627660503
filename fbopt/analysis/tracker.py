"""The largest Hessian eigenvalues along a training run, for two to three products each and step.

Rayleigh-Ritz in the space of the predicted eigenvectors, a vector of a search, and as many
residuals as the tolerance takes (LOBPCG's space: Knyazev, SIAM J. Sci. Comput. 23, 2001).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt._random import mix
from fbopt.analysis.basis import Array
from fbopt.analysis.hessian import Hessian
from fbopt.analysis.objective import Objective
from fbopt.analysis.preconditioned import PreconditionedHessian
from fbopt.analysis.ritz import RitzSpace
from fbopt.analysis.spectrum import Wanted
from fbopt.analysis.tracker_pairs import TrackedEigenpairs, estimate
from fbopt.analysis.tracker_prediction import Prediction
from fbopt.analysis.tracker_search import Search
from fbopt.analysis.tracker_state import Memory, fault_of_tracker

FIRST = 200  # products of the first update at most
GROWTH = 12  # products for an eigenvalue that joins, beside the mean
SAVED = 10  # updates whose products are kept for later ones
NEAR = 0.3  # the next eigenvalue inwards has a product in every update if it is so near
CLOSE = 0.02  # what the search shows gets a product if it is so near to the tracked eigenvalues


class EigenTracker:
    """Follows the largest eigenvalues of the full-batch Hessian from step to step of a run.

    :meth:`update` after a step (or after some) makes one product for each predicted eigenvector,
    one with the next eigenvector inwards where that is near, one for the search in every update or
    every other one, and one for each residual that the tolerance takes. The search makes Lanczos
    iterations from a random vector, one an update: an eigenvalue that rises from deep inside, whose
    eigenvector no tracked vector shows, is found after some updates. Until then it is missed.

    Everything depends on the seed and the operators alone, on the objective's device. Of several
    processes (``Objective(process_group=...)``) all have to call the same methods. Memory: two
    vectors for each product of an update, and 2 count + 11 in between.

    Args:
        objective: the loss.
        count: the number of eigenvalues.
        above: follow all eigenvalues from this bound on and the next one below, at least `count`
            and at most `max_count`: for instance ``1.5/lr``, beside the threshold 2/lr. The
            attribute may be set between two updates.
        method, radius: of the products, as for :class:`Hessian`.
        preconditioner: track this operator in place of the Hessian; it has its own method.
        tolerance: of the relative error of an eigenvalue, as it is estimated.
        products: for each eigenvalue and update in the mean, at most, from 3 on. The first update,
            and those in which an eigenvalue joins, take more. Where that is too little, pairs have
            not converged, and say so. (For ``count=1`` at the edge of stability take 6.)
        max_count: the largest number of eigenvalues with `above`.
        seed: of the random vectors.

    Attributes:
        updates: the number of updates so far.
        spent: the number of products in all of them.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: as for :class:`Hessian`.
    """

    def __init__(
        self,
        objective: Objective,
        count: int = 1,
        *,
        above: float | None = None,
        method: str = "exact",
        radius: float | None = None,
        preconditioner: PreconditionedHessian | None = None,
        tolerance: float = 3e-3,
        products: float = 3.0,
        max_count: int = 20,
        seed: int = 0,
    ) -> None:
        check_number("count", count, least=1)
        check_number("max_count", max_count, least=count)
        check_number("tolerance", tolerance, above=0)
        check_number("products", products, least=3)
        check_number("seed", seed, least=0)
        if above is not None:
            check_number("above", above)
        if count > objective.size:
            raise ValueError(f"count asks for {count} eigenvalues, but there are {objective.size}")
        _check_operator(objective, method, radius, preconditioner)
        self.hessian = preconditioner or Hessian(objective, method, radius)
        self.count, self.above, self.seed = int(count), above, seed
        self.max_count = min(int(max_count), objective.size)
        self.tolerance, self.allowance = float(tolerance), float(products)
        self._like = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
        self._forget()

    def _forget(self) -> None:
        self.updates, self.spent, self._limit, self._inner = 0, 0, 0.0, -math.inf
        self._has_guard = self._has_joined = False
        self._memory = Memory(self.count, Search(self._like, mix(self.seed, 0, 1)))

    def update(self) -> TrackedEigenpairs:
        """Return the eigenpairs at the model's current parameters (and optimizer's state).

        Raises:
            ValueError: weights, a loss or products that are not finite.
            RuntimeError: as for :class:`Hessian`.
        """
        self.hessian.refresh()
        wanted = Wanted(self._memory.tracked, "largest", self.tolerance)
        space = RitzSpace(self.hessian, wanted, self._like, mix(self.seed, self.updates))
        self._begin(space)
        found = self._converge(space)
        self._memory.spare = float(self._limit - space.size) if self.updates else 0.0
        self.updates += 1
        self.spent += space.size
        return found

    def _begin(self, space: RitzSpace) -> None:
        """Fill the space with what is known, and say how many products there may be."""
        k, size = self._memory.tracked, len(self._like)
        self._has_guard = self._has_joined = self._memory.prediction is None
        if self._memory.prediction is None:
            self._limit = FIRST
            space.extend(space.basis.random())
            return
        share = self.allowance * k
        self._limit = min(self._memory.spare + share, SAVED * share)
        rows = self._memory.prediction.next()
        near = self._memory.last - self._memory.guard < NEAR * abs(self._memory.last)
        self._has_guard = near and len(rows) > k
        for row in rows if self._has_guard else rows[:k]:
            space.extend(row)
        if space.size < min(size, self._limit) and not (self._has_guard and self.updates % 2):
            image = space.extend(self._memory.search.ahead)
            self._memory.search.follow(space.basis.combine(np.eye(space.size)[:, -1:])[0], image)

    def _converge(self, space: RitzSpace) -> TrackedEigenpairs:
        """Extend the space until the tracked pairs have converged or the products are spent."""
        while True:
            found, worst = self._solve(space)
            if self._joins(found.values[-1], space.size):
                space.extend(self._memory.search.best())
                self._has_joined = True
            elif worst is not None and space.size < min(self._limit, len(self._like)):
                space.extend(worst)
            elif self._needed(found.values) > self._memory.tracked and space.size < len(self._like):
                self._memory.tracked += 1
                self._limit += GROWTH  # is not saved: the mean is that of the others
            else:
                break
        self._keep(found)
        return found

    def _solve(self, space: RitzSpace) -> tuple[TrackedEigenpairs, Tensor | None]:
        """The pairs as far as they are known, and the residual of the worst; None if all are.

        In the first update the next pair inwards has to converge too: one of two eigenvalues close
        to each other could be hidden else.
        """
        k, first = self._memory.tracked, self._memory.prediction is None
        values, coefficients = (np.flip(part, -1).copy() for part in space.solve())
        size = min(k + first, len(values))
        residuals = space.residuals(values[:size], coefficients[:, :size])
        norms = residuals.double().norm(dim=1).cpu().numpy()
        self._inner = float(values[k]) if len(values) > k else -math.inf
        following = self._inner if first else self._following()
        beyond = following if size == k else float(values[size : size + 1].max(initial=-math.inf))
        errors = estimate(values[:size], norms, beyond)
        norm = float(np.abs(values).max())
        relative = errors / np.maximum(np.abs(values[:size]), max(1e-3 * norm, 1e-300))
        converged = relative <= self.tolerance
        vectors = space.basis.combine(coefficients[:, : k + 1])
        found = TrackedEigenpairs(
            values=values[:k],
            vectors=vectors[:k],
            residuals=norms[:k],
            converged=converged[:k],
            products=space.size,
            guards=vectors[k:],
            norm=norm,
            errors=errors[:k],
            following=following,
        )
        is_short = len(values) < min(k + first, len(self._like))
        done = converged.all() and not is_short
        return found, None if done else residuals[int(np.argmax(relative))]

    def _following(self) -> float:
        """The next eigenvalue inwards, by this update and the search, or before its product."""
        earlier = -math.inf if self._has_guard else self._memory.guard
        return max(self._inner, self._memory.search.value, earlier)

    def _joins(self, last: float, size: int) -> bool:
        """Whether what the search has found gets a product of its own."""
        if self._has_joined or size >= len(self._like):
            return False
        return self._memory.search.is_over or self._memory.search.value > last - CLOSE * abs(last)

    def _needed(self, values: Array) -> int:
        """How many eigenvalues to track, of which these are the largest."""
        if self.above is None:
            return self.count
        return min(max(self.count, int((values >= self.above).sum()) + 1), self.max_count)

    def _keep(self, found: TrackedEigenpairs) -> None:
        """Remember for the next update: the pairs and the next one inwards, by its best vector."""
        known, rows = self._memory.prediction, torch.cat([found.vectors, found.guards])
        if known is None or self._has_guard or self._has_joined or self._inner > self._memory.guard:
            self._memory.guard = self._inner
        elif len(known.rows) > (k := len(found.values)):
            rows = torch.cat([found.vectors, known.rows[k:]])
        if known is not None and (self._has_joined or self._memory.search.is_over):
            self._memory.search = Search(self._like, mix(self.seed, self.updates, 1))
        self._memory.tracked = k = self._needed(found.values)
        if k < len(found.values):
            rows, self._memory.guard = rows[: k + 1], float(found.values[k])
        self._memory.last = float(found.values[k - 1])
        self._memory.prediction = Prediction(rows) if known is None else known.after(rows, k)

    def state_dict(self) -> dict[str, Any]:
        """What the next updates depend on, as tensors and plain numbers; {} before the first."""
        return self._memory.state_dict(self.updates, self.spent)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, to the same bits.

        Raises:
            ValueError: it is no state of such a tracker; nothing has changed.
        """
        wrong = fault_of_tracker(state, self.max_count if self.above is not None else self.count)
        if wrong is None and state and (of := _kind(state["ahead"])) != (own := _kind(self._like)):
            wrong = f"it is of {of}, not of {own}"
        if wrong is None and state and state["tracked"] < self.count:
            wrong = f"it tracks {state['tracked']} eigenvalues, not {self.count}"
        if wrong is not None:
            raise ValueError(f"this state does not fit the EigenTracker: {wrong}")
        self._forget()
        if not state:
            return
        self.updates, self.spent = state["updates"], state["products"]
        self._memory.load(state)


def _kind(vector: Tensor) -> str:
    return f"{len(vector)} parameters in {vector.dtype}"


def _check_operator(
    objective: Objective, method: str, radius: float | None, operator: object
) -> None:
    """Refuse a preconditioner that is none, of another objective, or beside its own options."""
    if operator is None:
        return
    if not isinstance(operator, PreconditionedHessian):
        name = type(operator).__name__
        raise TypeError(f"preconditioner must be a PreconditionedHessian, got {name}")
    if operator.objective is not objective:
        raise ValueError("preconditioner has another objective: pass preconditioner.objective")
    if method != "exact" or radius is not None:
        raise ValueError("a preconditioner has its own method and radius: give them to it")
