"""What has to hold before anything is measured: finite weights, and a loss that is a function of
them, so that evaluating it twice gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from fbopt.analysis.objective import Objective


def check(objective: Objective) -> None:
    """Refuse what cannot be measured; the loss is evaluated only the first time.

    Raises:
        ValueError: a parameter or the loss is infinite or NaN.
        RuntimeError: the loss is not deterministic; the message says what is likely random.
    """
    check_finite(objective)
    if not objective.is_deterministic:
        check_deterministic(objective)
        objective.is_deterministic = True


def check_finite(objective: Objective) -> None:
    """Refuse parameters and buffers that are infinite or NaN, by name."""
    trained = {id(p) for p in objective.params}
    held = [(n, t) for n, t in objective.model.named_parameters() if id(t) in trained]
    held += [(n, t) for n, t in objective.model.named_buffers() if t.is_floating_point()]
    for name, tensor in held:
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} of the model holds infinite or undefined values: training diverged, so "
                "measure an earlier checkpoint, or train with a smaller learning rate"
            )


@torch.no_grad()
def check_deterministic(objective: Objective) -> None:
    """Evaluate every chunk twice, then all chunks again, and compare the losses' bits.

    Raises:
        ValueError: a loss that is infinite or NaN, or a chunk that does not fit.
        RuntimeError: two losses differ.
    """
    first: list[float] = []
    again: list[float] = []
    with objective.evaluating():
        for index, chunk, _ in objective.visit():
            losses = [_value(objective, index, chunk)]
            objective.put_back()
            losses.append(_value(objective, index, chunk))
            if losses[0] != losses[1]:
                raise RuntimeError(_noisy_model(objective, index, losses))
            first.append(losses[0])
        _count(objective, 2)
        for index, chunk, _ in objective.visit():
            again.append(_value(objective, index, chunk))
    _count(objective, 1)
    if first != again:
        raise RuntimeError(_other_chunks(first, again))


def _count(objective: Objective, passes: int) -> None:
    for _ in range(passes):
        objective.cost.losses += 1
        objective.on_pass()


def _value(objective: Objective, index: int, chunk: object) -> float:
    with torch.enable_grad():
        loss: Tensor = objective.differentiable_loss(index, chunk)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of chunk {index} is {float(loss)}: the weights are finite, so look at this "
            "chunk's samples and at the loss function"
        )
    return float(loss)


def _noisy_model(objective: Objective, index: int, losses: list[float]) -> str:
    text = (
        f"the loss is not deterministic: chunk {index} gave {losses[0]!r}, then {losses[1]!r} with "
        "the same weights and samples"
    )
    active = [
        name
        for name, module in objective.model.named_modules()
        if isinstance(module, _DropoutNd) and module.training and module.p > 0
    ]
    if objective.dropout == "off" or not active:
        return (
            f"{text}. Likely causes: dropout or noise that is drawn in a forward() or in the loss "
            "rather than by a Dropout module (pass dropout='seeded' if torch's generators draw "
            "it, else fix its seed), or operations that add in no fixed order (try "
            "torch.use_deterministic_algorithms(True))"
        )
    return f"{text}, though dropout ({active[0]}) is seeded: something else is drawn as well"


def _other_chunks(first: list[float], again: list[float]) -> str:
    text = "the loss is not deterministic: every chunk gives the same loss twice, but "
    if len(first) != len(again):
        return (
            f"{text}the second pass had {len(again)} chunks and the first {len(first)}: chunks "
            "must be the same each time they are iterated over"
        )
    if sorted(first) == sorted(again):
        return (
            f"{text}the second pass visited them in another order. Likely cause: chunks are "
            "shuffled; pass a list of them, or a DataLoader with shuffle=False"
        )
    return (
        f"{text}the second pass had other samples in them. Likely causes: a DataLoader with "
        "shuffle=True (pass shuffle=False), or random augmentation (leave it out, or pass a list "
        "of chunks)"
    )
