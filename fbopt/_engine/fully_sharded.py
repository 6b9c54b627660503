"""FSDP2 (fully_shard): what its modules have to be told and asked in a step, and a reduce-scatter
that keeps the processes' gradients apart, for exact sums.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._sharding import local


class FullySharded:
    """Those modules that ``fully_shard`` has sharded; there may be none.

    Args:
        modules: all modules of a model.

    Attributes:
        averaged: the names of the process groups over which gradients are averaged.
        contributions: where the processes' gradients are kept apart; None where they are not.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        kind = _module_class()
        self._modules: list[Any] = [m for m in modules if kind and isinstance(m, kind)]
        self.contributions: Contributions | None = None
        meshes = [group.mesh_info.mesh for group in self._groups()]
        self.averaged = {mesh.get_group(d).group_name for mesh in meshes for d in range(mesh.ndim)}

    @classmethod
    def holding(cls, params: Sequence[Tensor]) -> FullySharded:
        """Return the modules that hold some of the parameters, where the model is not known.

        Looks at all objects where FSDP2 has been imported: call it once.

        Raises:
            ValueError: the parameters are gathered ones, which no optimizer holds.
        """
        kind, ids = _module_class(), {id(p) for p in params}
        if kind is None or not torch.distributed.is_initialized():
            return cls(())
        everyone = [cls([module]) for module in instances(kind)]
        if any(id(p) in ids for one in everyone for p in one._gathered()):
            raise ValueError(
                "params are those that fully_shard has gathered for a forward pass, not the shards "
                "that an optimizer trains: call model.reshard(), for each module that was given to "
                "fully_shard, before model.parameters()"
            )
        return cls(m for one in everyone if ids & set(map(id, one.shards())) for m in one._modules)

    def __bool__(self) -> bool:
        return bool(self._modules)

    def _groups(self) -> list[Any]:
        """FSDP2's groups of parameters; a module has one, in later versions of torch several."""
        if not self._modules:
            return []
        states = [m._get_fsdp_state() for m in self._modules]
        one = [getattr(state, "_fsdp_param_group", None) for state in states]
        many = [getattr(s, "_fsdp_param_groups", [g]) for s, g in zip(states, one, strict=True)]
        return [group for groups in many for group in groups if group is not None]

    def shards(self) -> list[Tensor]:
        """Return the sharded parameters."""
        return [p.sharded_param for group in self._groups() for p in group.fsdp_params]

    def _gathered(self) -> list[Any]:
        held = [p for group in self._groups() for p in group.fsdp_params]
        return [getattr(p, "_unsharded_param", None) for p in held]

    def reshard(self) -> None:
        """Drop gathered parameters: the next pass gathers the shards as they are then."""
        for module in self._modules:
            module.reshard()

    def refuse_functional(self) -> None:
        """Raise ValueError for a model whose gradients torch.autograd.grad would not get."""
        if self:
            raise ValueError(
                "model is sharded by fully_shard (FSDP2), which makes its gradients in .backward() "
                "alone: pass backward=True"
            )

    def check_complete(self, model: nn.Module) -> None:
        """Raise ValueError where fully_shard was called after these modules were found."""
        if FullySharded(model.modules())._modules != self._modules:
            raise ValueError(
                "fully_shard was called on the model after this closure was made: call it first, "
                "then make optimizer and closure"
            )

    def check(self) -> None:
        """Raise ValueError for settings under which gradients are not the processes' means."""
        for group in self._groups():
            factor, mesh = group.gradient_divide_factor, group.mesh_info.mesh
            if factor not in (None, mesh.size()):
                raise ValueError(
                    f"the model has set_gradient_divide_factor({factor}), so that its gradients "
                    f"are no means over {mesh.size()} processes: leave the factor alone"
                )
            if not (group.reduce_grads and group.all_reduce_grads):
                raise ValueError(
                    "the model does not reduce gradients in backward passes: call "
                    "model.set_requires_gradient_sync(True)"
                )

    @contextlib.contextmanager
    def exactly(self, apart: bool) -> Iterator[None]:
        """Reduce equal gradients without rounding; or (apart) keep those of all processes apart.

        Apart, gradients are sums over the processes, not means, within the context.
        """
        groups, self.contributions = self._groups(), Contributions() if apart else None
        kept = [(g._reduce_scatter_comm, g.gradient_divide_factor) for g in groups]
        try:
            for group in groups:
                group._reduce_scatter_comm = ExactReduceScatter(
                    _replicas(group), self.contributions
                )
                group.gradient_divide_factor = 1.0 if apart else None
            yield
        finally:
            self.contributions = None
            for group, (comm, factor) in zip(groups, kept, strict=True):
                group._reduce_scatter_comm, group.gradient_divide_factor = comm, factor


class Contributions:
    """The gradients of all processes in the last reduce-scatter: a row each, and its rank."""

    rows: Tensor
    ranks: list[int]

    def of(self, grad: Tensor) -> dict[int, Tensor]:
        """Return by rank the shares in a reduced gradient, which is a view of FSDP2's output."""
        flat = local(grad)
        rows = getattr(self, "rows", flat[:0])
        if flat.untyped_storage().nbytes() != rows.shape[-1] * flat.element_size():
            raise RuntimeError(
                'accumulation="exact" cannot keep the gradients of processes apart here (CPU '
                'offload, or a mesh without shards): pass accumulation="float32"'
            )
        start = flat.storage_offset()
        views = [r.as_strided(flat.shape, flat.stride(), r.storage_offset() + start) for r in rows]
        return {rank: v.to(flat.dtype) for rank, v in zip(self.ranks, views, strict=True)}


class ExactReduceScatter:
    """FSDP2's custom reduce-scatter, by all-to-all: what arrives is added here, in float64.

    Args:
        replicas: the process group of HSDP's replicas, or None.
        contributions: where to leave what arrives; the result is then a sum.
    """

    def __init__(self, replicas: Any, contributions: Contributions | None) -> None:
        self._replicas, self._contributions = replicas, contributions

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for the collective."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write the mean, or the sum, of all processes' shares of this process's shard."""
        import torch.distributed as dist

        pieces = torch.empty_like(input_tensor)
        dist.all_to_all_single(pieces, input_tensor, group=group)
        rows = pieces.view(group.size(), -1)
        total = rows.sum(0, dtype=torch.float64)
        # Processes with the same chunk have the same gradient, whose sum could be rounded.
        total = torch.where((rows == rows[0]).all(0), rows[0].double() * len(rows), total)
        if self._contributions is not None:
            self._contributions.ranks = dist.get_process_group_ranks(group)
            self._contributions.rows = rows
            if self._replicas is not None:
                self._gather_replicas()
        elif op == dist.ReduceOp.AVG:
            total /= len(rows)
        elif op != dist.ReduceOp.SUM:
            raise RuntimeError(
                f'accumulation="exact" does not know the reduction {op} of FSDP2: leave '
                "set_gradient_divide_factor alone"
            )
        output_tensor.copy_(total)

    def _gather_replicas(self) -> None:
        import torch.distributed as dist

        rows, own = self._contributions.rows, self._contributions.ranks
        ranks = torch.tensor(own, device=rows.device)
        both = []
        for part in (rows, ranks):
            found = [torch.empty_like(part) for _ in range(self._replicas.size())]
            dist.all_gather(found, part.contiguous(), group=self._replicas)
            both.append(torch.cat(found))
        self._contributions.rows, self._contributions.ranks = both[0], both[1].tolist()


def instances(kind: type) -> list[Any]:
    """Return all objects of a class, among those that Python collects."""
    objects = gc.get_objects()
    kinds = {k for k in set(map(type, objects)) if issubclass(k, kind)}
    return [x for x in objects if type(x) in kinds] if kinds else []


def _module_class() -> type | None:
    """FSDP2's class of modules; None while nobody has imported that."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _replicas(group: Any) -> Any:
    """The process group of HSDP's replicas; None without."""
    mesh, dim = group.mesh_info.mesh, getattr(group.mesh_info, "replicate_mesh_dim", None)
    return None if dim is None else mesh.get_group(dim)
