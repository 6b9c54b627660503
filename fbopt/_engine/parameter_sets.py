"""Who else works on a closure's parameters: the optimizer that steps, and other threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_at_work: list[tuple[int, set[int]]] = []
_lock = threading.Lock()


class AloneInThreads:
    """Refuses parameters that another thread's closure works on: it may have shifted them."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._entry = threading.get_ident(), set(map(id, params))

    def __enter__(self) -> None:
        own, wanted = self._entry
        with _lock:
            if any(other != own and not ids.isdisjoint(wanted) for other, ids in _at_work):
                raise RuntimeError(
                    "another thread's FullBatchClosure is at work on these parameters, and may "
                    "point them to other values meanwhile: wait for it, or give this thread a copy "
                    "of the model"
                )
            _at_work.append(self._entry)

    def __exit__(self, *raised: object) -> None:
        with _lock:
            _at_work.remove(self._entry)


def stepping_optimizer() -> torch.optim.Optimizer | None:
    """The optimizer of torch whose ``step(closure)`` calls the closure, where none is between."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(found, torch.optim.Optimizer):
            return found
        if not str(frame.f_globals.get("__name__")).startswith(("torch.", "fbopt.")):
            return None
    return None


def check_optimizers(
    stepping: torch.optim.Optimizer | None,
    given: torch.optim.Optimizer | None,
    trained: Sequence[Tensor],
    model: nn.Module,
) -> list[Tensor]:
    """Refuse optimizers with parameters that would never be trained; return their frozen ones.

    Args:
        stepping: the optimizer that calls the closure, where that is known.
        given: the closure's.
        trained: what the closure differentiates by.
        model: whose names an error shows.
    """
    frozen = check_covered(stepping, trained, model)
    if stepping is not given:
        frozen += check_covered(given, trained, model)
    return frozen + check_stepping(stepping, trained, model)


def check_stepping(
    known: torch.optim.Optimizer | None, trained: Sequence[Tensor], model: nn.Module
) -> list[Tensor]:
    """Refuse a call by an optimizer that holds none of the parameters; return its frozen ones.

    It may hold others as well, that another closure trains. `known` has been checked already.
    """
    optimizer = stepping_optimizer()
    if optimizer is None or optimizer is known:
        return []
    held = [p for g in optimizer.param_groups for p in g["params"]]
    covered = set(map(id, trained))
    if any(p.requires_grad for p in held) and not any(id(p) in covered for p in held):
        raise ValueError(_uncovered(optimizer, covered, model))
    return [p for p in held if not p.requires_grad]


def check_covered(
    optimizer: torch.optim.Optimizer | None, trained: Sequence[Tensor], model: nn.Module
) -> list[Tensor]:
    """Refuse an optimizer with a parameter that gets no gradient; return its frozen parameters."""
    if optimizer is None:
        return []
    covered = set(map(id, trained))
    others = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in covered]
    if any(p.requires_grad for p in others):
        raise ValueError(_uncovered(optimizer, covered, model))
    return others


def _uncovered(optimizer: torch.optim.Optimizer, covered: set[int], model: nn.Module) -> str:
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    wanted = {i: p for i, p in enumerate(held) if p.requires_grad}
    missed = {i: p for i, p in wanted.items() if id(p) not in covered}
    listed = [f"{names.get(id(p), f'params[{i}]')} {list(p.shape)}" for i, p in missed.items()]
    cure = (
        "pass FullBatchClosure(..., params=[...]) with all tensors to train, or freeze these with "
        "requires_grad_(False)"
    )
    if len(missed) == len(wanted):
        cure = (
            "it holds none of the closure's: make the optimizer with the parameters of the "
            "closure's model itself, not of a copy, and after fully_shard"
        )
    return (
        f"the optimizer holds {len(missed)} parameters that the closure does not differentiate by, "
        f"so that they would never be trained ({', '.join(listed[:3])}{', ...' * (len(listed) > 3)}"
        f"): {cure}"
    )
