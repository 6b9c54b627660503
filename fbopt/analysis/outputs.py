"""The model's outputs z(theta) for a chunk, with products J v and J^T u of their Jacobian, and the
operators J^T A J that are made of them.

J v is the derivative of u -> J^T u along v, by two backward passes: exact for every operation that
has a derivative, and of the same forward pass, with autocast and random draws, as the loss is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbopt._engine.autograd_graph import (
    CURE,
    SecondBackward,
    hint_at_checkpoints,
    leaves,
    naming_methods,
    refuse_unreached,
)
from fbopt._engine.inputs import refuse_compiled
from fbopt.analysis.objective import Objective
from fbopt.analysis.operator import Operator


class Outputs:
    """The forward pass of one chunk; only within :meth:`Objective.evaluating`.

    Attributes:
        objective: the loss.
        loss: L_c, with its graph.
        values: z, the model's output, with its graph.
        target: what the loss function compares it with.
        place: the chunk's index among those of all processes.
    """

    def __init__(self, objective: Objective, index: int, chunk: Any) -> None:
        self.objective, self.place = objective, objective.place(index)
        self.loss, self.values, self.target = objective.chunk_forward(index, chunk)
        if not isinstance(self.values, Tensor) or not self.values.requires_grad:
            raise TypeError(
                f"the model's output for chunk {index} has to be one tensor with a gradient, got "
                f"{type(self.values).__name__}: wrap the model in one that returns the tensor "
                "which the loss reads, and let loss_fn take that"
            )

    def pull(self, vector: Tensor) -> list[Tensor | None]:
        """J^T u, for u of the outputs' shape: a tensor for each parameter, None for zeros."""
        if self.values.dtype != torch.float16:
            return list(self._pull(vector.to(self.values.dtype)))
        # As training's loss scale does: small derivatives would be lost in half precision.
        _, exponent = torch.frexp(vector.abs().amax())
        grads = self._pull(torch.ldexp(vector, -exponent).to(torch.float16))
        return [None if g is None else torch.ldexp(g, exponent) for g in grads]

    def push(self, parts: list[Tensor], check: bool = False) -> Tensor:
        """J v, for a tensor per parameter, in the outputs' shape.

        Args:
            parts: v.
            check: look for functions whose backward pass leaves no graph.
        """
        # The derivative is the same at every u; a backward pass that loses it shows where u is
        # neither zero nor constant, and has a graph.
        ramp = torch.linspace(1, 2, self.values.numel(), device=self.values.device)
        leaf = ramp.view(self.values.shape).to(self.values.dtype).requires_grad_()
        second = SecondBackward(self.values) if check else None
        grads = self._pull(leaf * 1, create_graph=True)
        if second is not None:
            again = (self.values * (leaf * 2)).sum()
            second.check(self.objective.params, lambda: contextlib.nullcontext(again))
        pairs = zip(grads, parts, strict=True)
        used = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
        if not used:
            return torch.zeros_like(self.values)
        images, along = zip(*used, strict=True)
        with naming_methods():
            (found,) = torch.autograd.grad(images, leaf, along, retain_graph=True)
        return found

    def _pull(self, vector: Tensor, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        with hint_at_checkpoints():
            grads = torch.autograd.grad(
                self.values,
                self.objective.params,
                vector,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        refuse_unreached(self.values, grads)
        return grads

    def wide(self) -> Tensor:
        """The outputs as a leaf in the dtype of the objective's vectors, to take derivatives by."""
        leaf: Tensor = self.values.detach().to(self.objective.dtype)
        return leaf.requires_grad_()

    def loss_of(self, values: Tensor, target: Tensor | None = None) -> Tensor:
        """L_c as a function of the outputs, which it has to depend on alone; of some rows, too."""
        objective = self.objective
        assert objective.loss_fn is not None  # refused by OutputOperator
        dtype, kind = objective.autocast, objective.device.type
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            loss: Tensor = objective.loss_fn(values, self.target if target is None else target)
        own = {id(p) for p in objective.params}
        if loss.requires_grad and any(id(leaf) in own for leaf in leaves(loss)):
            raise ValueError(
                "loss_fn reads the model's parameters besides its output, as for a regulariser: "
                "leave that out of the Objective, as J^T A J sees the outputs alone"
            )
        return loss


class OutputOperator(Operator):
    """``J^T A J``, the mean over the chunks with the weights n_c/N; A depends on the outputs.

    Memory: the graph of one chunk, as for an exact product with the Hessian.
    """

    def __init__(self, objective: Objective) -> None:
        check_model(objective, self.name)
        super().__init__(objective)
        self.refresh()

    def refresh(self) -> None:
        """Move the operator to the model's current parameters."""
        super().refresh()
        self._is_checked = False  # for functions that lose a derivative

    def _product(self, vector: Tensor) -> Tensor:
        objective, parts = self.objective, self.objective.unflatten(vector)
        with (
            objective.evaluating(f"{self.name} products", None, vector),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            _naming_jacobians(),
        ):
            for index, chunk, weight in objective.visit():
                outputs = Outputs(objective, index, chunk)
                image = self._multiply(index, outputs, outputs.push(parts, not self._is_checked))
                found = outputs.pull(image)
                objective.shares.add(weight, outputs.loss, found)
                del outputs, image, found  # freed before the next chunk's are made
        self._is_checked = True
        objective.count("gradients", "second_backwards", "second_backwards")
        return objective.flatten(objective.sums.means())

    def _multiply(self, index: int, outputs: Outputs, vector: Tensor) -> Tensor:
        """A u of a chunk, for u of the outputs' shape."""
        raise NotImplementedError


def check_model(objective: Objective, name: str) -> None:
    """Refuse a loss that is not a function of the model's output, and a compiled model."""
    objective.refuse_penalised(f"{name} is")
    if objective.loss_fn is None:
        raise ValueError(
            f"{name} needs the model's output and the loss apart: make the Objective with loss_fn "
            "and chunks of (input, target), not with evaluate"
        )
    with _naming_jacobians():
        refuse_compiled(objective.model)


@contextlib.contextmanager
def _naming_jacobians() -> Iterator[None]:
    """Say in errors about second derivatives what is differentiated here, and another cure."""
    try:
        yield
    except RuntimeError as error:
        text = "method='exact' differentiates twice"
        if text not in str(error):
            raise
        words = str(error).replace(text, "a product J^T A J v differentiates backward passes")
        cure = "replace it, or use Hessian with method='central'"
        raise RuntimeError(words.replace(CURE, cure)) from error
