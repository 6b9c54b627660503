"""What torch is told about the ops: that they have no derivative, which tensors they write, and for
torch.compile what they return.

Torch calls Python for the first two, which costs more than a small op. The library therefore calls
the ops past them where nothing is recorded, and marks what was written itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._ops.arguments import refuse_derivatives

_mark_written = torch.autograd.graph.increment_version
_below_autograd = torch._C._AutoDispatchBelowAutograd
_below_versions = torch._C._AutoDispatchBelowADInplaceOrView
_libraries: list[torch.library.Library] = []  # they hold what they register


def register(namespace: str, names: Sequence[str]) -> None:
    """Tell torch about ops of a C++ library, once in a process."""
    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    for name in names:
        op = getattr(getattr(torch.ops, namespace), name).default
        library.impl(name, _without_derivative(op), "Autograd", with_keyset=True)
        if op._schema.is_mutable:
            library.impl(name, _with_versions(op), "ADInplaceOrView", with_keyset=True)
        torch.library.register_fake(f"{namespace}::{name}", FAKES.get(name, _fake_none))


def past_autograd(op: Any) -> Callable[..., Any]:
    """Return an op that costs no call of Python by torch where autograd records nothing."""
    name, positions = _name_of(op), _written_positions(op)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return op(*args)
        with _below_versions():
            found = op(*args)
        _mark(name, positions, args)
        return found

    return run


def _without_derivative(op: Any) -> Callable[..., Any]:
    name, names = _name_of(op), [argument.name for argument in op._schema.arguments]

    def run(keys: Any, *args: Any) -> Any:
        refuse_derivatives(name, zip(names, args, strict=False))
        with _below_autograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return run


def _with_versions(op: Any) -> Callable[..., Any]:
    name, positions = _name_of(op), _written_positions(op)

    def run(keys: Any, *args: Any) -> Any:
        with _below_versions():
            found = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
        _mark(name, positions, args)
        return found

    return run


def _mark(name: str, positions: Sequence[int], args: Sequence[Any]) -> None:
    """Raise the versions of what was written: a backward that needs it as it was is an error."""
    for i in positions:
        if name == "sgd_step_" and i == 1 and args[4] is None:
            continue  # gradients are written only where they are sums, with a divisor
        _mark_written(args[i])


def _name_of(op: Any) -> str:
    return str(op._schema.name.partition("::")[2])


def _written_positions(op: Any) -> list[int]:
    arguments = enumerate(op._schema.arguments)
    return [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _fake_squared_norm(tensors: list[Tensor], stacked: bool = False) -> Tensor:
    shape = tensors[0].shape[:1] if stacked else ()
    return tensors[0].new_empty(shape, dtype=torch.float64)


def _fake_perturb(
    out: Tensor, params: list[Tensor], grads: list[Tensor], *args: object, **rest: object
) -> Tensor:
    return out.new_empty(_chunks_of(params, grads), dtype=torch.float64)


def _fake_adaptive_norms(params: list[Tensor], grads: list[Tensor], eta: float) -> Tensor:
    return params[0].new_empty((2, *_chunks_of(params, grads)), dtype=torch.float64)


def _chunks_of(params: list[Tensor], grads: list[Tensor]) -> tuple[int, ...]:
    """The shape of a number for each chunk."""
    stacked = bool(params) and grads[0].dim() > params[0].dim()
    return tuple(grads[0].shape[:1]) if stacked else ()


def _fake_none(*args: object) -> None:
    return None


FAKES: dict[str, Callable[..., Tensor]] = {
    "squared_norm": _fake_squared_norm,
    "perturb_": _fake_perturb,
    "adaptive_norms": _fake_adaptive_norms,
}
