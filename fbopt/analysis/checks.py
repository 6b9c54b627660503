"""Checks before anything is measured: finite weights, and a deterministic loss, one that has the
same bits when it is evaluated again.
"""

from __future__ import annotations

import torch
from torch.nn.modules.dropout import _DropoutNd

from fbopt._engine.autograd_graph import dtypes
from fbopt._engine.repeatability import DRAWN_ELSEWHERE, first_nonfinite, other_chunks
from fbopt.analysis.objective import Objective


def check(objective: Objective) -> None:
    """Refuse an objective that cannot be measured; the loss is evaluated only the first time.

    Raises:
        ValueError: a parameter or the loss is infinite or NaN.
        RuntimeError: the loss is not deterministic; the message names likely causes.
    """
    with objective.shares.preparing():
        check_finite(objective)
    if not objective.is_deterministic:
        check_deterministic(objective)
        objective.is_deterministic = True


def check_finite(objective: Objective) -> None:
    """Raise ValueError for a parameter or buffer that is infinite or NaN, by its name."""
    name = first_nonfinite(objective.model, objective.params)
    if name is not None:
        raise ValueError(
            f"{name} of the model holds infinite or undefined values: training diverged, so "
            "measure an earlier checkpoint, or train with a smaller learning rate"
        )


@torch.no_grad()
def check_deterministic(objective: Objective) -> None:
    """Evaluate every chunk twice, then all chunks again, and compare the losses' bits.

    Raises:
        ValueError: a loss is infinite or NaN, or a chunk is invalid.
        RuntimeError: two losses differ.
    """
    first: list[float] = []
    with objective.evaluating("a check whether the loss is deterministic"):
        for index, chunk, weight in objective.visit():
            losses = [_chunk_loss(objective, index, chunk)]
            objective.restore_buffers()
            losses.append(_chunk_loss(objective, index, chunk))
            if losses[0] != losses[1]:
                raise RuntimeError(_random_model(objective, index, losses))
            first.append(losses[0])
            objective.shares.add(weight, torch.tensor(losses[0]), None)
        again = [_chunk_loss(objective, index, chunk) for index, chunk, _ in objective.visit()]
        if first != again:
            found, cause, cure = other_chunks(first, again)
            raise RuntimeError(
                "the loss is not deterministic: every chunk gives the same loss twice, but the "
                f"second pass {found}. Likely cause: {cause}; {cure}"
            )
    for _ in range(3):
        objective.count("losses")


def _chunk_loss(objective: Objective, index: int, chunk: object) -> float:
    with torch.enable_grad():
        loss = objective.chunk_loss(index, chunk)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of chunk {index} is {float(loss)}: the weights are finite, so check this "
            "chunk's samples and the loss function"
        )
    objective.computed_in |= dtypes(loss)
    return float(loss)


def _random_model(objective: Objective, index: int, losses: list[float]) -> str:
    text = (
        f"the loss is not deterministic: chunk {index} gave {losses[0]!r}, then {losses[1]!r} with "
        "the same weights and samples"
    )
    for name, module in objective.model.named_modules():
        dropout = isinstance(module, _DropoutNd) and module.training and module.p > 0
        if objective.dropout == "seeded" and dropout:
            return f"{text}, though dropout ({name}) is seeded: something else is random as well"
    return (
        f"{text}. Likely causes: {DRAWN_ELSEWHERE} whether or not the module is in eval mode (draw "
        "it only where self.training, which model.eval() and dropout='off' turn off; or pass "
        "dropout='seeded' if torch's generators draw it, else fix its seed), or operations that "
        "add in no fixed order (try torch.use_deterministic_algorithms(True))"
    )
