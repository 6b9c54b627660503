"""Fisher products F v = (1/N) sum_i E_y g_i (g_i.v), with labels y from the data or the model.

Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation for Natural Gradient
Descent" (NeurIPS 2019, arXiv 1905.12558).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fbopt._engine.weights import mean_of
from fbopt._random import mix
from fbopt.analysis.derivatives import products
from fbopt.analysis.objective import Objective
from fbopt.analysis.outputs import OutputOperator, Outputs

LABELS = ("data", "model")


class Fisher(OutputOperator):
    """The Fisher matrix of L's samples, as a linear operator: ``operator(v)`` is F v.

    With g_i the gradient of sample i's own loss, a row of the outputs along their first dimension::

        F = (1/N) sum_i g_i g_i^T                   labels="data": the empirical Fisher matrix
        F = (1/N) sum_i E_{y ~ p(.|x_i)} g_i g_i^T  labels="model", p the softmax of the outputs

    It is positive semidefinite. With ``"model"`` the loss is ``-log p(y)`` without label smoothing,
    and F equals the :class:`GaussNewton` matrix of the cross-entropy, unless labels are drawn.
    Samples weigh n_c/N over the number of rows of their chunk. With BatchNorm by chunk g_i is the
    derivative of sample i's loss as it is in its chunk.

    Args:
        objective: the loss, made with a `loss_fn` that is the mean over the rows of the outputs:
            no class weights, no ignored targets.
        labels: whose labels. ``"model"`` needs outputs (n, classes), and a loss that is their
            cross-entropy, with label smoothing or without.
        draws: with ``"model"``: draw so many labels for each sample in place of the expectation,
            the same in every product.
        seed: of the draws.

    Attributes:
        objective: the loss.
        products: the number of products so far.

    Raises:
        TypeError, ValueError: an invalid argument; an objective made with `evaluate`; a loss that
            is not the mean over rows, or no cross-entropy (at the first product).
        RuntimeError: as for :class:`GaussNewton`.
    """

    name = "Fisher"

    def __init__(
        self,
        objective: Objective,
        labels: str = "data",
        *,
        draws: int | None = None,
        seed: int = 0,
    ) -> None:
        check_labels(objective, labels, draws)
        self.labels, self.draws, self.seed = labels, draws, seed
        self._has_samples = False  # the same at all points, so that it is looked at once
        super().__init__(objective)

    def _product(self, vector: Tensor) -> Tensor:
        image = super()._product(vector)
        self._has_samples = True
        return image

    def _multiply(self, index: int, outputs: Outputs, vector: Tensor) -> Tensor:
        if not self._has_samples:
            check_samples(index, outputs, self.labels)
        root = root_of(outputs, self.labels, self.draws, mix(self.seed, outputs.place))
        return root.square(vector) / len(vector)


@dataclass(frozen=True)
class Columns:
    """B_i as columns: ``B_i B_i^T = E_y r_i r_i^T`` with r_i the loss's derivative by row i.

    Attributes:
        columns: (n, outputs of a row, m).
    """

    columns: Tensor

    @property
    def width(self) -> int:
        """m, the number of columns."""
        return self.columns.shape[2]

    def times(self, weights: Tensor) -> Tensor:
        """B_i w_i for all rows; `weights` are (n, m)."""
        return (self.columns @ weights.unsqueeze(2)).squeeze(2)

    def square(self, vector: Tensor) -> Tensor:
        """B_i B_i^T u_i for all rows, in the shape of u."""
        rows = vector.flatten(1).to(self.columns)
        return self.times((rows.unsqueeze(1) @ self.columns).squeeze(1)).view(vector.shape)


@dataclass(frozen=True)
class Softmax:
    """``B = diag(sqrt(p)) - p sqrt(p)^T``, so that ``B B^T = diag(p) - p p^T``: the expectation
    over the model's labels, without a matrix.

    Attributes:
        probabilities: (n, classes).
    """

    probabilities: Tensor

    @property
    def width(self) -> int:
        """The number of columns of B, that of classes."""
        return self.probabilities.shape[1]

    def times(self, weights: Tensor) -> Tensor:
        """B_i w_i for all rows; `weights` are (n, classes)."""
        scaled = self.probabilities.sqrt() * weights
        return scaled - self.probabilities * scaled.sum(1, keepdim=True)

    def square(self, vector: Tensor) -> Tensor:
        """B_i B_i^T u_i for all rows."""
        scaled = self.probabilities * vector.to(self.probabilities)
        return scaled - self.probabilities * scaled.sum(1, keepdim=True)


def root_of(outputs: Outputs, labels: str, draws: int | None, seed: int) -> Columns | Softmax:
    """A root of each row's matrix E_y r_i r_i^T, in the dtype of the objective's vectors."""
    values = outputs.wide()
    if labels == "data":
        loss, rows = outputs.loss_of(values), torch.zeros_like(values)
        if loss.requires_grad:
            (rows,) = torch.autograd.grad(loss, values)
        return Columns((rows * len(rows)).flatten(1).unsqueeze(2))
    p = values.detach().softmax(1)
    if draws is None:
        return Softmax(p)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(p.double().cpu(), draws, replacement=True, generator=generator)
    hits = F.one_hot(drawn.to(p.device), p.shape[1]).to(p.dtype)  # (n, draws, classes)
    return Columns((p.unsqueeze(1) - hits).transpose(1, 2) / draws**0.5)


def check_labels(objective: Objective, labels: str, draws: int | None) -> None:
    """Refuse labels that are unknown, or that the loss has no distribution for."""
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}, got {labels!r}")
    if draws is not None:
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(
                f"draws must be a number of labels, at least 1, or None, got {draws!r}"
            )
        if labels == "data":
            raise ValueError("draws is for labels='model': the data's labels are not drawn")
    mean = mean_of(objective.loss_fn)
    if mean is not None and mean.class_weights is not None:
        raise ValueError("loss_fn has class weights, so it is not the mean over the samples")


def check_samples(index: int, outputs: Outputs, labels: str) -> None:
    """Refuse a chunk whose loss is not the mean over rows of what the labels ask for."""
    _check_rows(index, outputs)
    if labels == "model":
        _check_softmax(index, outputs)


def _check_softmax(index: int, outputs: Outputs) -> None:
    """Refuse a loss that is no cross-entropy of the outputs' softmax: its Hessian by a row of
    outputs has to be ``diag(p) - p p^T`` over the number of rows.
    """
    values = outputs.wide()
    if values.dim() != 2:
        raise ValueError(
            f"labels='model' needs outputs of shape (samples, classes), got {tuple(values.shape)}: "
            "let the model return one row for each label"
        )
    along = torch.linspace(-1, 1, values.numel(), device=values.device).view_as(values).cos()
    along = along.to(values.dtype)
    (found,) = products(outputs.loss_of(values), [values], [along])
    expected = Softmax(values.detach().softmax(1)).square(along) / len(values)
    found = torch.zeros_like(expected) if found is None else found
    tolerance = 1e3 * torch.finfo(values.dtype).eps
    if not (found - expected).norm() <= tolerance * expected.norm() + tolerance**2:
        raise ValueError(
            f"labels='model' draws labels from the softmax of the outputs, but the loss of chunk "
            f"{index} is not their cross-entropy: use GaussNewton, which for the squared error is "
            "the Fisher matrix up to a factor, or labels='data'"
        )


@torch.no_grad()
def _check_rows(index: int, outputs: Outputs) -> None:
    """Refuse a chunk whose loss is not the mean of the losses of its rows, each alone."""
    values, target = outputs.values.detach(), outputs.target
    if not isinstance(target, Tensor) or len(target) != len(values):
        raise ValueError(
            f"chunk {index} needs a target with one row for each of the {len(values)} rows of the "
            "model's output"
        )
    loss, rows = float(outputs.loss_of(values)), []
    for i in range(len(values)):
        rows.append(outputs.loss_of(values[i : i + 1], target[i : i + 1]))
    alone = torch.stack(rows).double()
    mean, eps = float(alone.mean()), torch.finfo(rows[0].dtype).eps
    scale = abs(loss) + float(alone.abs().mean())
    if not abs(mean - loss) <= min(1e3 * eps, 0.05) * scale + eps:  # NaN is refused, too
        raise ValueError(
            f"the loss of chunk {index} is {loss:.6g}, but its rows alone have the mean "
            f"{mean:.6g}: Fisher needs a loss_fn that is the mean over the rows of the outputs, "
            "without ignored targets or weights"
        )
