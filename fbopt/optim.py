"""FullBatchGD: gradient descent with momentum and global-norm clipping, SGD's step in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import (
    built_by_zero,
    check_disjoint,
    check_scalar,
    check_storage,
    is_flattened,
    refuse_flattened,
)
from fbopt._eager import eager
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.step_batches import Batch, batched, mean_norm
from fbopt._line_search.closures import Calls, check_closure, check_processes
from fbopt._line_search.search import check_name
from fbopt._line_search.searched_step import SearchedStep
from fbopt._ops import dispatch
from fbopt._ops.flat import scalar_on
from fbopt._sharding import locals_of
from fbopt.clip import check_finite, clip_operands, norm_order
from fbopt.closure import FullBatchClosure

# The whole gradient is clipped at once, and its step searched: one value for all groups.
GLOBAL = ("max_norm", "norm_type", "error_if_nonfinite", "line_search")


class FullBatchGD(torch.optim.Optimizer):
    """Gradient descent, one deterministic step per pass over the whole training set.

    In ``torch.optim.SGD``'s own order, g being the gradient of the mean loss::

        g <- -g                                  (maximize)
        g <- g min(1, max_norm / (||g|| + 1e-6)) (one norm over all parameters)
        g <- g + weight_decay p
        v <- momentum v + (1 - dampening) g      (first step: v <- g)
        g <- g + momentum v (nesterov), or v
        p <- p - lr g

    The norm reads the gradient once, the update makes one pass: 6 words per parameter with
    momentum. Without a closure, or with any other, it steps on ``p.grad`` like SGD. With a
    :class:`FullBatchClosure` it reads the sums over chunks directly (half-precision parameters get
    their gradient in float32), divides by N in the same pass (1 word more) and leaves the mean, not
    clipped, in ``p.grad``. State dicts are interchangeable with ``torch.optim.SGD``'s. DTensors are
    updated shard by shard, with momentum of their placements and the norm of all shards.

    With ``line_search`` the step above gives the direction d = p' - p alone, and the search the
    length: ``p <- p + t d``, from t = 1 on, of ``phi(t) = f(p + t d)`` where f is what the closure
    returns (its negative to maximize) with ``weight_decay / 2 ||p||^2``. Momentum is that of the
    directions, whatever t. Where d is no direction of descent, as momentum may have it, momentum
    begins anew with this step's gradient, with a warning the first time. A search that fails puts
    parameters and buffers back bit for bit and drops momentum; so it is where there is no descent
    without momentum either, as a clipped gradient with its decay may have it. Where d = 0, as with
    lr = 0, the parameters stay and momentum goes on; where loss or gradient are not finite before
    the step, both stay. The decay of parameters without gradient, which the step leaves alone, is
    no part of f. An exception puts parameters, buffers and momentum back to before the step.

    The searches, and what closures they see, are those of :class:`fbopt.LBFGS`; Armijo's and the
    non-monotone one look at points by ``loss_only()`` of a :class:`FullBatchClosure` without
    penalty, and take the gradient of the one that is low enough, to know that it is finite. With a
    search the step is on ``p.grad``, in the parameters' dtype, and d is a difference of parameters:
    where lr is so small that it is a few units of their rounding, t > 1 makes that error longer,
    and a step that is lost in it altogether is said to be, once.

    Args:
        params: parameters or parameter groups, named or not, as for any torch optimizer. Frozen
            ones may be of any dtype and layout.
        lr: learning rate; a tensor of one element is read on the device.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``; tensors
            of one element are read on the host.
        foreach, fused: accepted for compatibility; there is one implementation.
        differentiable: must be False.
        max_norm: bound of the global gradient norm; None does not clip. A tensor of one element is
            read on the device.
        norm_type: the p of that norm, ``inf`` (or ``"inf"``) for the maximum.
        error_if_nonfinite: raise before anything is changed if the norm is NaN or infinite. Reads
            the norm on the host. With ``line_search`` of the gradient where the step begins.
        line_search: ``"strong_wolfe"``, ``"armijo"``, ``"nonmonotone"``, or None for t = 1. Needs a
            closure, and plain parameters.

    Attributes:
        last_grad_norm: the norm of the last step's gradient before clipping, 0-dim, on the device;
            None before the first step, and with FSDP1 or ZeroRedundancyOptimizer.

    Source: Geiping et al., "Stochastic Training is Not Necessary for Generalization", ICLR 2022,
    section 3-4.
    """

    # GradScaler then sets attributes, by which `step` recognises and refuses it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | Tensor | None = None,
        norm_type: float | str = 2.0,
        error_if_nonfinite: bool = False,
        line_search: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "error_if_nonfinite": error_if_nonfinite,
            "line_search": line_search,
        }
        _check_options(defaults, read=True)
        self._is_partial = built_by_zero()
        if isinstance(params, Tensor):
            raise TypeError(
                "params must be an iterable of tensors or groups, not one tensor: pass [params]"
            )
        super().__init__(params, defaults)
        self.last_grad_norm: Tensor | None = None
        self._searched = SearchedStep()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; refuses tensors that the kernels cannot work on."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1], read=True)
            for i, p in enumerate(self.param_groups[-1]["params"]):
                if not _frozen(p):
                    check_storage(p, f"params[{i}]")
            held = [p for group in self.param_groups for p in group["params"] if not _frozen(p)]
            check_disjoint(held, "params")
            self._clipping()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in options that a state dict of torch.optim.SGD lacks."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("last_grad_norm", None)
        self.__dict__.setdefault("_is_partial", False)
        self.__dict__.setdefault("_searched", SearchedStep())

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and return what the closure returned.

        Args:
            closure: evaluates the loss and fills ``p.grad``; a :class:`FullBatchClosure` or any
                other.

        Raises:
            RuntimeError: a GradScaler calls this, or the gradient is not finite and
                ``error_if_nonfinite`` is set.
            TypeError, ValueError: gradients or options that do not fit, or a plain closure with
                ``line_search`` over a ``DistributedDataParallel``. After any of these errors
                parameters, state and buffers are as they were.
        """
        self._refuse_grad_scaler()
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be callable, got {type(closure).__name__}: pass the closure itself, "
                "not what it returns"
            )
        clipping = self._clipping()
        for group in self.param_groups:
            _check_options(group, read=False)
        if (kind := clipping.pop("line_search")) is not None:
            if closure is None:
                raise ValueError("line_search evaluates the loss: call step(closure)")
            check_closure(closure, kind)
            if self._holds_part():
                raise ValueError(
                    "line_search: each process holds a part of the parameters alone (FSDP1, "
                    "ZeroRedundancyOptimizer), so that it would search for itself: leave it out"
                )
            held = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
            check_processes(closure, self, held)
            calls = Calls(closure, self)
            if not held:
                return calls()
            return self._searched(self, calls, lambda: self._update(None, **clipping))
        whole = closure if isinstance(closure, FullBatchClosure) else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure() if whole is None else whole._accumulate(self)
        try:
            self._update(None if whole is None else whole.sums, **clipping)
        except (RuntimeError, TypeError, ValueError):
            if whole is not None:
                whole.assign()
                whole.rollback()
            raise
        if whole is not None:
            whole.assign()
        return loss

    @property
    def last_length(self) -> float:
        """The length t of the last step that was searched, in units of lr; 0 where it failed."""
        return self._searched.length

    @property
    def last_evaluations(self) -> int:
        """How often the last step that was searched evaluated the closure."""
        return self._searched.evaluations

    def _update(
        self,
        sums: GradientSums | None,
        max_norm: float | Tensor | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> None:
        batches = list(batched(self.param_groups, self.state, sums))
        norm = mean_norm(batches, norm_type)
        if error_if_nonfinite:
            check_finite(norm)
        clip = (None, None) if max_norm is None else clip_operands(norm, max_norm)
        for batch in batches:
            self._step(batch, *clip)
        if sums is not None:
            sums.settle({i for batch in batches for i in batch.indices})
        is_part = max_norm is None and self._holds_part()  # with max_norm that was refused
        self.last_grad_norm = None if is_part else norm

    def _step(self, batch: Batch, norm: Tensor | None, max_norm: float | None) -> None:
        device = batch.params[0].device
        if batch.first:
            batch.buffers = [torch.empty_like(p, requires_grad=False) for p in batch.params]
        params, buffers = locals_of(batch.params), locals_of(batch.buffers)
        dispatch.sgd_step_(
            params,
            batch.grads,
            buffers,
            scalar_on(device, batch.lr),
            batch.divisor,
            None if norm is None else norm.to(device),
            max_norm,
            first=batch.first,
            **batch.rule,
        )
        if batch.first:
            for p, buffer in zip(batch.params, batch.buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _clipping(self) -> dict[str, Any]:
        found, *others = map(_global_options, self.param_groups)
        for name in GLOBAL if others else ():
            if not all(_same(options[name], found[name]) for options in others):
                raise ValueError(
                    f"{name} differs between parameter groups, but the clip is of the whole "
                    f"gradient: set one {name} for all groups"
                )
        if found["max_norm"] is not None or found["error_if_nonfinite"]:
            self._refuse_partial_norm()
        return found

    def _holds_part(self) -> bool:
        firsts = [group["params"][0] for group in self.param_groups if group["params"]]
        return self._is_partial or is_flattened(firsts)

    def _refuse_partial_norm(self) -> None:
        """Refuse to clip where this process holds a part of the gradient, unknown to torch."""
        cure = "leave max_norm and error_if_nonfinite out and {} before the step"
        held = (p for group in self.param_groups for p in group["params"])
        refuse_flattened(held, "max_norm", cure.format("call model.clip_grad_norm_(max_norm)"))
        if self._is_partial:
            raise ValueError(
                "max_norm: ZeroRedundancyOptimizer gives each process some of the parameters, so "
                "that each would clip by the norm of its own: "
                + cure.format("call fbopt.clip_grad_norm_(model.parameters(), max_norm)")
            )

    def _refuse_grad_scaler(self) -> None:
        announced = [self.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
        if all(value is None for value in announced):
            return
        raise RuntimeError(
            "torch.amp.GradScaler cannot drive FullBatchGD: it would skip whole passes over the "
            "data when one chunk overflows, and scale the gradients that the penalty's radius and "
            "max_norm are measured on. Use bfloat16, which needs no scaling: "
            "FullBatchClosure(..., autocast=torch.bfloat16), then optimizer.step(closure) without "
            "a scaler"
        )


def _global_options(group: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same in all groups, since the clip is of the whole gradient."""
    return {name: group[name] for name in GLOBAL} | {"norm_type": norm_order(group["norm_type"])}


def _frozen(param: Tensor) -> bool:
    return not param.requires_grad and param.grad is None


def _same(a: Any, b: Any) -> bool:
    """Whether two options are equal, without a read from the device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(a == b)


def _check_options(options: dict[str, Any], *, read: bool) -> None:
    """Check the options of the optimizer or of one group; `read`: also tensors on the device."""
    check_scalar("lr", options["lr"], read=read, least=0)
    for name in ("momentum", "weight_decay"):
        check_scalar(name, options[name], least=0)
    check_scalar("dampening", options["dampening"])
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening = 0")
    if options["max_norm"] is not None:
        check_scalar("max_norm", options["max_norm"], read=read, above=0)
    norm_order(options["norm_type"])
    if options["differentiable"]:
        raise ValueError(
            "differentiable must be False: FullBatchGD updates in place, and autograd does not "
            "follow. Use torch.optim.SGD(differentiable=True)"
        )
    check_name(options["line_search"])
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused are both True, which torch refuses: set one")
