"""The trace of the Fisher matrix, the mean squared norm of a sample's gradient:
tr(F) = (1/N) sum_i E_y |g_i|^2 = (1/N) E |sum_i s_i g_i|^2 for random signs s_i.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fbopt._checks import check_number
from fbopt._ops import dispatch
from fbopt._random import mix
from fbopt.analysis.checks import check
from fbopt.analysis.fisher import Columns, Softmax, check_labels, check_samples, root_of
from fbopt.analysis.hessian import Trace
from fbopt.analysis.objective import Objective
from fbopt.analysis.outputs import Outputs, check_model


def fisher_trace(
    objective: Objective,
    labels: str = "data",
    *,
    draws: int | None = None,
    samples: int | None = 32,
    seed: int = 0,
) -> Trace:
    """Estimate or compute the trace of the Fisher matrix.

    Novack, Kaur, Marwah, Garg, Lipton, "Disentangling the Mechanisms Behind Implicit Regularization
    in SGD" (ICLR 2023, arXiv 2211.15853), who penalise the squared gradient norms of micro-batches,
    with the data's labels, and their Fisher trace, with the model's. These are the two for
    micro-batches of one sample; for those of a chunk's size :func:`gradient_statistics` has the
    first.

    With B_i a root of ``E_y r_i r_i^T`` (see :class:`Fisher`), the squared norm of ``sum_i J_i^T
    B_i s_i`` for random signs s_i is an unbiased sample of the trace. It takes one backward pass,
    all of a chunk's through the graph of one forward pass.

    Args:
        objective: as for :class:`Fisher`.
        labels: whose labels, ``"data"`` or ``"model"``.
        draws: with ``"model"``: draw so many labels for each sample in place of the expectation.
        samples: the number of sign vectors, at least 2. None: the exact trace, by one backward pass
            for each row of the outputs (with ``"model"`` for each row and class or drawn label).
        seed: of the signs and the drawn labels.

    Returns:
        A :class:`Trace`; of the exact one `error` is 0 and `samples` too.

    Raises:
        TypeError, ValueError, RuntimeError: as for :class:`Fisher`, at once.
    """
    if samples is not None:
        check_number("samples", samples, least=2)
    check_model(objective, "fisher_trace")
    check_labels(objective, labels, draws)
    check(objective)
    rows: list[Tensor] = []
    backwards = 0
    with objective.evaluating("Fisher traces"), torch.enable_grad():
        for index, chunk, weight in objective.visit():
            outputs = Outputs(objective, index, chunk)
            check_samples(index, outputs, labels)
            root = root_of(outputs, labels, draws, mix(seed, outputs.place))
            squares = [
                dispatch.squared_norm([g for g in outputs.pull(vector) if g is not None])
                for vector in _vectors(root, outputs, samples, mix(seed, outputs.place, 1))
            ]
            backwards = max(backwards, len(squares))
            found = torch.stack(squares).double() / len(outputs.values)
            rows.append(found.sum(0, keepdim=True) if samples is None else found)
            objective.shares.add(weight, outputs.loss, None)
            del outputs
    objective.count("gradients", *["second_backwards"] * (backwards - 1))
    return _mean(objective, rows, samples)


def _vectors(
    root: Columns | Softmax, outputs: Outputs, samples: int | None, seed: int
) -> Iterator[Tensor]:
    """B s for random signs, or each column of B, in the outputs' shape."""
    shape, size = outputs.values.shape, (len(outputs.values), root.width)
    like = {"dtype": outputs.objective.dtype, "device": outputs.values.device}
    if samples is None:
        for place in range(size[0] * size[1]):
            weights = torch.zeros(size, **like)
            weights.view(-1)[place] = 1
            yield root.times(weights).view(shape)
        return
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        signs = torch.randint(2, size, generator=generator, dtype=torch.int8)
        yield root.times((2 * signs - 1).to(**like)).view(shape)


def _mean(objective: Objective, rows: list[Tensor], samples: int | None) -> Trace:
    """The mean over the chunks of all processes, of each sample."""
    own = torch.zeros(1 + (samples or 1), len(rows), dtype=torch.float64)
    if rows:
        own[0] = torch.tensor(objective.shares.weights)
        own[1:] = torch.stack(rows, dim=1).cpu()
    weights, *values = objective.shares.gather(own).cpu()
    found = [float(weights @ value / weights.sum()) for value in values]
    return Trace(found[0], 0.0, 0) if samples is None else Trace.of(found)
