"""Sharded parameters (DTensor): this process's shards, which the kernels work on, and sums over all
shards, ||g||^2 = sum_r ||g_r||^2, by one all-reduce for each dimension of a device mesh.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# The process groups over which the shards of a tensor lie, by name; () for a tensor held whole.
Groups = tuple[str, ...]


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors is a DTensor."""
    return any(map(_is_dtensor, set(map(type, tensors))))


@functools.cache
def _is_dtensor(kind: type) -> bool:
    """Whether a class is DTensor; while no one has imported that, none is."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and issubclass(kind, dtensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, in the same memory; a plain tensor itself."""
    if not _is_dtensor(type(tensor)):
        return tensor
    with torch.no_grad():  # not as a decorator, which plain tensors would pay for
        shard: Any = tensor.to_local()  # type: ignore[attr-defined]
    # The result of a collective that may still be under way.
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def is_offloaded(param: Any) -> bool:
    """Whether FSDP2's CPU offload keeps a parameter elsewhere than its mesh computes."""
    return _is_dtensor(type(param)) and param.device_mesh.device_type != param.device.type


def working_device(param: Any) -> torch.device:
    """Return where a model computes with a parameter."""
    if not is_offloaded(param):
        found: torch.device = param.device
        return found
    kind = param.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def gathered(tensor: Tensor) -> Tensor:
    """Return a DTensor as a plain tensor, differentiably: for numbers, such as a loss."""
    whole: Any = tensor
    return whole.full_tensor() if _is_dtensor(type(tensor)) else tensor  # type: ignore[no-any-return]


@torch.no_grad()
def summed(grads: list[Tensor]) -> list[Tensor]:
    """Return gradients with the Partial placements of DTensors summed up."""
    return [_replicated(g) if any_sharded([g]) else g for g in grads]


def _replicated(grad: Any) -> Any:
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in grad.placements]
    return grad if placements == list(grad.placements) else grad.redistribute(placements=placements)


def locals_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return :func:`local` of each tensor; the same list where all are plain."""
    return [local(t) for t in tensors] if any_sharded(tensors) else tensors


def groups_of(tensor: Any) -> Groups:
    """Return the process groups over which the shards of a tensor lie."""
    if not any_sharded([tensor]):
        return ()
    mesh = tensor.device_mesh
    dims = [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(d).group_name for d in dims if mesh.size(d) > 1)


def mesh_groups(tensors: Sequence[Tensor]) -> list[str]:
    """Return the names of the process groups of all dimensions of the tensors' meshes."""
    found: dict[str, None] = {}
    for t in tensors if any_sharded(tensors) else ():
        mesh: Any = getattr(t, "device_mesh", None)
        dims = range(0 if mesh is None else mesh.ndim)
        found |= {mesh.get_group(d).group_name: None for d in dims if mesh.size(d) > 1}
    return list(found)


def mesh_size(tensors: Iterable[Tensor]) -> int:
    """Return the number of processes in the largest mesh of a DTensor; 1 without any."""
    meshes: list[Any] = [getattr(t, "device_mesh", None) for t in tensors]
    return max((mesh.size() for mesh in meshes if mesh is not None), default=1)


def all_groups(tensors: Sequence[Tensor]) -> list[Groups] | None:
    """Return :func:`groups_of` each tensor; None where all are plain."""
    return [groups_of(t) for t in tensors] if any_sharded(tensors) else None


@torch.no_grad()
def placed_as(tensor: Any, param: Any, name: str) -> Any:
    """Return a gradient with the placements of its parameter: a Partial one is summed up.

    Raises:
        TypeError, ValueError: one of the two is no DTensor, or their meshes differ.
    """
    if not _same_mesh(tensor, param, name) or tensor.placements == param.placements:
        return tensor
    return tensor.redistribute(placements=param.placements)


def check_same_placement(tensor: Any, param: Any, name: str) -> None:
    """Raise TypeError or ValueError for a tensor that is not sharded as its parameter is."""
    if _same_mesh(tensor, param, name) and tensor.placements != param.placements:
        raise ValueError(
            f"{name} is placed as {tensor.placements}, its parameter as {param.placements}: load "
            "it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def _same_mesh(tensor: Any, param: Any, name: str) -> bool:
    """Whether both are DTensors, on one mesh; False where both are plain."""
    sharded = [any_sharded([t]) for t in (tensor, param)]
    if sharded == [False, False]:
        return False
    if not all(sharded):
        kinds = ["a DTensor" if s else "a plain tensor" for s in sharded]
        raise TypeError(
            f"{name} is {kinds[0]}, its parameter {kinds[1]}: pass gradients as autograd returns "
            "them, and load states with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    if tensor.device_mesh != param.device_mesh:
        raise ValueError(
            f"{name} lies on {tensor.device_mesh}, its parameter on {param.device_mesh}: compute "
            "it anew, or redistribute it"
        )
    return True


def combine(values: Tensor, groups: Sequence[Groups], largest: bool = False) -> Tensor:
    """Return the sum (or maximum) of each value over the processes of its groups.

    Args:
        values: 1-D, or rows of values; overwritten. Not NaN where the maximum is wanted.
        groups: for each value, or row, where its parts lie; the same on all processes.
        largest: take the maximum.
    """
    import torch.distributed as dist

    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    for name in dict.fromkeys(name for names in groups for name in names):
        group = dist.distributed_c10d._resolve_process_group(name)
        rows = [k for k, names in enumerate(groups) if name in names]
        part = values[rows]
        dist.all_reduce(part, op, group=group)
        values[rows] = part
    return values


class Sharding:
    """How a list of parameters, one of them a DTensor at least, is spread over processes.

    Attributes:
        locals: this process's shard of each parameter, and plain parameters themselves.
        groups: for each parameter where its shards lie.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.locals = [local(p) for p in params]
        self.groups = [groups_of(p) for p in params]

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Sharding | None:
        """Return None where all parameters are plain tensors."""
        return cls(params) if any_sharded(params) else None

    def split(self, indices: Sequence[int]) -> list[list[int]]:
        """Return some parameters' indices in lists, for each the shards over the same groups."""
        found: dict[Groups, list[int]] = {}
        for i in indices:
            found.setdefault(self.groups[i], []).append(i)
        return list(found.values())

    def shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's shards of gradients, placed as their parameters."""
        pairs = enumerate(zip(tensors, self._params, strict=True))
        return [local(placed_as(t, p, f"the gradient of parameter {i}")) for i, (t, p) in pairs]


def sharded_as(param: Any, shard: Tensor) -> Tensor:
    """Return a shard as a DTensor placed as a parameter; as it is, if that is a plain tensor."""
    if not any_sharded([param]):
        return shard
    found: Tensor = type(param.data).from_local(
        shard,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return found
