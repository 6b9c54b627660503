"""What all curvature operators share: v -> A v in parameter space, with A symmetric, at the point
where the operator was made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbopt.analysis.checks import check
from fbopt.analysis.conditions import Conditions
from fbopt.analysis.objective import Objective


class Operator:
    """A symmetric linear operator on parameter vectors: ``operator(v)`` is A v.

    :func:`eigenpairs`, :func:`hessian_trace`, :func:`hutchpp_trace` and :func:`spectral_density`
    take any of them: :class:`Hessian`, :class:`PreconditionedHessian`, :class:`GaussNewton` and
    :class:`Fisher`.

    Args:
        objective: the loss.

    Attributes:
        objective: the loss.
        method: ``"exact"``, or the name of the finite differences that products are made by.
        products: the number of products so far.
    """

    name, variable = "operator", "operator"  # in messages
    method = "exact"

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.products = 0

    def refresh(self) -> None:
        """Move the operator to the model's current parameters."""
        check(self.objective)
        self._conditions = Conditions(self.objective)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return A v for a vector of the parameter space (see :class:`Objective`)."""
        with self.objective.shares.preparing():
            if vector.shape != (self.objective.size,):
                raise ValueError(
                    f"vector has shape {tuple(vector.shape)}, but vectors of this objective have "
                    f"({self.objective.size},): objective.flatten(tensors) makes one"
                )
            self._refuse_stale()
        self.products += 1
        return self._product(vector)

    def _product(self, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def _refuse_stale(self) -> None:
        changed = self._conditions.changed(self.objective)
        if changed is not None:
            raise RuntimeError(
                f"{changed} has changed since this {self.name} was made: call "
                f"{self.variable}.refresh() for the one at the current parameters, or make a new "
                "one"
            )

    def finite(self, vector: Tensor) -> Tensor:
        """Return A v, or raise ValueError where it is not finite."""
        image = self(vector)
        if not torch.isfinite(image).all():
            raise ValueError(
                f"product {self.products} with the operator is infinite or undefined: with finite "
                "differences try a smaller radius"
            )
        return image

    def as_scipy(self) -> Any:
        """The operator as a ``scipy.sparse.linalg.LinearOperator``, for SciPy's solvers.

        Its vectors are NumPy arrays in the dtype of the objective's vectors, on the host: each
        product copies one there and back. It counts its products here, and refuses a model that
        has changed as this operator does.

        Raises:
            ImportError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("as_scipy() needs scipy: pip install scipy") from error
        objective = self.objective
        dtype = torch.empty(0, dtype=objective.dtype).numpy().dtype

        def product(array: Any) -> Any:
            # A copy, as SciPy goes on to write to its own array.
            vector = torch.tensor(array.reshape(-1), dtype=objective.dtype, device=objective.device)
            return self.finite(vector).cpu().numpy()

        shape = (objective.size, objective.size)
        return LinearOperator(shape, matvec=product, rmatvec=product, dtype=dtype)
