"""What an optimizer's step updates by one kernel call: parameters of one group, device and dtype,
with their gradients and momenta; and the norm of the mean gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_storage
from fbopt._engine.gradient_sums import GradientSums
from fbopt._ops import dispatch
from fbopt._ops.flat import accumulator_dtype
from fbopt._sharding import all_groups, any_sharded, check_same_placement, local, placed_as
from fbopt.clip import total_norm

RULE = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
State = Mapping[Tensor, Mapping[str, Any]]
_NONE: Mapping[str, Any] = {}


@dataclass
class Batch:
    """Tensors that one kernel call updates.

    Where gradients are sums over chunks, `indices` locate them and `divisor` is their weight.
    """

    rule: dict[str, Any]
    lr: float | Tensor
    divisor: Tensor | None = None
    first: bool = False
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)


def batched(
    groups: Iterable[Mapping[str, Any]], state: State, sums: GradientSums | None
) -> Iterator[Batch]:
    """Batch the parameters that have a gradient, all of them checked.

    Args:
        groups: the optimizer's parameter groups.
        state: the optimizer's state.
        sums: of gradients; None where those of ``p.grad`` count.

    Raises:
        TypeError, ValueError: a gradient or momentum that does not fit.
    """
    index = {} if sums is None else {id(p): i for i, p in enumerate(sums.params)}
    for group in groups:
        rule = {name: _number(group[name]) for name in RULE}
        params, grads, indices = _with_gradient(group["params"], sums, index)
        buffers: list[Tensor | None] = [None] * len(params)
        if rule["momentum"] != 0:
            buffers = [state.get(p, _NONE).get("momentum_buffer") for p in params]
        kinds = [range(len(params))] if params else []
        if not _are_usual(params, grads if sums is None else None, buffers):
            grads = _checked(params, grads, buffers, sums is None)
            kinds = _kinds(params, grads, buffers)
        for kind in kinds:
            batch = Batch(rule, group["lr"])
            batch.params, batch.grads = [params[i] for i in kind], [grads[i] for i in kind]
            batch.buffers = [b for i in kind if (b := buffers[i]) is not None]
            batch.indices = [indices[i] for i in kind if indices]
            batch.first = rule["momentum"] != 0 and not batch.buffers
            if sums is not None:
                batch.divisor = sums.divisor(batch.params[0].device)
            yield batch


def _with_gradient(
    params: Sequence[Tensor], sums: GradientSums | None, index: Mapping[int, int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The parameters of a group that have a gradient, these, and where sums have them."""
    if sums is None:
        pairs = [(p, g) for p in params if (g := p.grad) is not None]
        return [p for p, _ in pairs], [g for _, g in pairs], []
    found = [(p, i) for p in params if (i := index.get(id(p))) is not None]
    seen = [(p, i) for p, i in found if i not in sums.unseen]
    return [p for p, _ in seen], [sums.views[i] for _, i in seen], [i for _, i in seen]


def _are_usual(
    params: list[Tensor], grads: list[Tensor] | None, buffers: list[Tensor | None]
) -> bool:
    """Whether one batch can hold all, and none needs a closer look: a step's time counts."""
    held = [b for b in buffers if b is not None]
    if held and len(held) < len(params):
        return False
    others = [held] if held else []
    if grads is not None:
        if not all(p.requires_grad for p in params):
            return False
        others.append(grads)
    return dispatch.are_alike(params, *others)


def _checked(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], own: bool
) -> list[Tensor]:
    """Return gradients (with `own` those of p.grad) as the kernels take them, or raise an error."""
    sharded, found = any_sharded(params), []
    for p, grad, buffer in zip(params, grads, buffers, strict=True):
        found.append(_own_gradient(p, grad, sharded) if own else grad)
        if buffer is not None:
            _check_fit(buffer, p, "momentum_buffer", p.dtype)
            if sharded:
                check_same_placement(buffer, p, "a momentum_buffer")
    return found


def _kinds(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]
) -> list[list[int]]:
    """Indices of what goes together: of one device, dtypes, and with a momentum or none yet."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, grad, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
        kinds.setdefault((p.device, p.dtype, grad.dtype, buffer is None), []).append(i)
    return list(kinds.values())


def mean_norm(batches: list[Batch], norm_type: float) -> Tensor:
    """The norm of the mean gradient: that of the sums is divided by N, not each element."""
    grads = [g for batch in batches for g in batch.grads]
    groups = all_groups([p for batch in batches for p in batch.params])
    norm = total_norm(grads, norm_type, groups)
    divisor = batches[0].divisor if batches else None
    return norm if divisor is None else norm / divisor.to(norm)


def _own_gradient(param: Tensor, grad: Tensor, sharded: bool) -> Tensor:
    """Return what p.grad holds as the kernels take it, or raise an error."""
    if not param.requires_grad:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} does not require grad but has a gradient, "
            "from before it was frozen: call optimizer.zero_grad() (or set p.grad = None) after "
            "freezing"
        )
    if not param.is_contiguous():  # was it frozen when its group was added?
        check_storage(param, "a parameter")
    check_storage(grad, "a gradient")
    _check_fit(grad, param, "gradient", accumulator_dtype(param.dtype))
    return local(placed_as(grad, param, "a gradient")) if sharded else grad


def _check_fit(tensor: Tensor, param: Tensor, name: str, wide: torch.dtype) -> None:
    """Refuse a gradient or momentum that does not fit, before any parameter is changed."""
    dtype = tensor.dtype
    same = dtype == param.dtype or dtype == wide
    if same and tensor.shape == param.shape and tensor.device == param.device:
        return
    raise ValueError(
        f"a {name} has shape {tuple(tensor.shape)}, dtype {dtype} and device {tensor.device}, its "
        f"parameter {tuple(param.shape)}, {param.dtype} and {param.device}: compute it anew, or "
        "load the state dict of the same model"
    )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
