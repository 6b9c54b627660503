"""LBFGS: limited-memory BFGS with line searches, p <- p + t lr d, d = -H g in two passes over the
stored pairs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import (
    built_by_zero,
    check_disjoint,
    check_number,
    check_scalar,
    check_storage,
    refuse_flattened,
)
from fbopt._eager import eager
from fbopt._line_search.closures import Calls, check_closure, check_processes
from fbopt._line_search.quasi_newton import QuasiNewton
from fbopt._line_search.search import check_name
from fbopt._sharding import any_sharded

# What is the same for all groups.
GLOBAL = (
    *("history_size", "line_search", "damping", "max_norm", "max_iter", "max_eval"),
    *("tolerance_grad", "tolerance_change", "history_device", "maximize"),
)
# Where a state dict has what was learnt.
SAVED = "lbfgs"


class LBFGS(torch.optim.Optimizer):
    """Limited-memory BFGS with line searches, for closures over the whole training set.

    A step makes up to ``max_iter`` iterations. With g the gradient, H the inverse of BFGS's
    approximation to the Hessian from the last ``history_size`` pairs ``s = p' - p``,
    ``y = g' - g``, and ``H = <s, y> / <y, y>`` without pairs to apply::

        d <- -H g                                  (-g without pairs)
        d <- d min(1, max_norm / ||d||)
        p <- p + t lr d

    where the line search finds t, from 1 on, or ``min(1, 1 / ||d||)`` without pairs. The searches
    of ``phi(t) = f(p + t lr d)``:

    - ``"strong_wolfe"``: ``phi(t) <= phi(0) + 1e-4 t phi'(0)`` and ``|phi'(t)| <= 0.9 |phi'(0)|``,
      by cubic interpolation (Nocedal and Wright, algorithms 3.5 and 3.6);
    - ``"armijo"``: the first of them, by shorter and shorter steps;
    - ``"nonmonotone"``: as Armijo's, below the largest of the last 10 values (Grippo, Lampariello
      and Lucidi, 1986);
    - None: t as it begins.

    All look at up to 25 points, strong Wolfe's once more at the best of them; one where the loss or
    its gradient is not finite counts as too far. A search that fails puts the parameters back bit
    for bit, warns, the first time, and goes on along -g; so does a step without a search that leads
    to NaN, found out when the next one begins. The pairs are forgotten too where d is no direction
    of descent, or where ``<s, y>`` is not positive. An exception of the closure puts the parameters
    back to those of the last iteration. At lr = 0 nothing moves, and nothing is forgotten.

    The recursion is in compact form: 4 m + 5 words per parameter for m pairs, against some 10 m of
    two loops, all inner products in float64 and none with the pairs read on the host. In memory are
    ``2 history_size + 4`` words per parameter, in float32 for half precision.

    With a :class:`FullBatchClosure` the search has to see the function whose gradient it gets:
    with a penalty pass ``returns="objective"``. All processes of a ``process_group`` see the same
    numbers and so take the same steps. Any other closure has to return the same value on all
    processes that share parameters; beside :class:`torch.nn.parallel.DistributedDataParallel`, with
    which each returns the loss of its own data, one is refused. The closure should give the same
    value at the same parameters; dropout, which draws anew at every call, makes searches fail.

    Args:
        params: parameters or parameter groups, as for any torch optimizer; no DTensors.
        lr: the length of a step that the search begins at, or that of every step without a search;
            a tensor of one element is read on the host.
            Groups may have rates of their own, by which their part of d is multiplied; there is one
            history over all of them, of the steps as they were taken. All other options are the
            same for all groups.
        history_size: m, the most pairs.
        line_search: a name above, or None.
        damping: make y have ``<s, y> >= 0.2 <s, B s>`` (Powell), ``B s = -t lr g``, so that pairs
            of negative curvature are of use; with groups lr is the largest.
        max_norm: bound of ``||d||``, and so of every step: at most ``lr max_norm`` long. The
            gradient itself is not clipped, of which y would not be the change.
        max_iter: the most iterations per step.
        max_eval: calls of the closure after which a step begins no other iteration; by default
            ``1.25 max_iter``.
        tolerance_grad: end a step where no element of g is larger.
        tolerance_change: end a step where no parameter, nor the loss, changes by more, or the slope
            is no steeper.
        history_device: where to keep the pairs, such as ``"cpu"``; None for the parameters' own.
        maximize: maximize what the closure returns.

    Attributes:
        stopped: why the last step ended, in words; None before the first.
        last_evaluations: the calls of the closure in the last step.

    Source: Liu and Nocedal, "On the limited memory BFGS method for large scale optimization",
    Mathematical Programming 45 (1989); Byrd, Nocedal and Schnabel, "Representations of quasi-Newton
    matrices and their use in limited memory methods", Mathematical Programming 63 (1994).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1,
        history_size: int = 10,
        line_search: str | None = "strong_wolfe",
        damping: bool = False,
        max_norm: float | None = None,
        *,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_device: torch.device | str | None = None,
        maximize: bool = False,
    ) -> None:
        if isinstance(params, Tensor):
            raise TypeError(
                "params must be an iterable of tensors or groups, not one tensor: pass [params]"
            )
        defaults = {
            "lr": lr,
            "history_size": history_size,
            "line_search": line_search,
            "damping": damping,
            "max_norm": max_norm,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_device": None if history_device is None else str(history_device),
            "maximize": maximize,
        }
        _check_options(defaults)
        if built_by_zero():
            raise ValueError(
                "LBFGS needs all parameters in every process; ZeroRedundancyOptimizer gives each "
                "some of them: make LBFGS itself, with the model's parameters"
            )
        super().__init__(params, defaults)
        self.stopped: str | None = None
        self.last_evaluations = 0
        self._method: QuasiNewton | None = None
        self._key: Any = None
        self._saved: Mapping[str, Any] | None = None
        self._has_warned = False

    @property
    def n_iter(self) -> int:
        """The iterations of all steps."""
        if self._method is not None:
            return self._method.iterations
        return 0 if self._saved is None else int(self._saved["iterations"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; refuses tensors that the kernels cannot work on."""
        super().add_param_group(param_group)
        try:
            self._options()
            self._trainable()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Make up to ``max_iter`` iterations and return what the closure returned at the start.

        Args:
            closure: evaluates the loss and fills ``p.grad``; a :class:`FullBatchClosure` or any
                other. Called at least once.

        Raises:
            TypeError, ValueError: options, parameters or a closure that do not fit, before anything
                is changed. Among them a plain closure over a ``DistributedDataParallel``.
        """
        options = self._options()
        check_closure(closure, options["line_search"])
        params, rates = self._trainable()
        check_processes(closure, self, params)
        calls = Calls(closure, self)
        if not params:
            return calls()
        method = self._follow(params, options)
        try:
            loss, self.stopped = method.run(calls, options, rates)
        finally:
            self.last_evaluations = calls.count
        if method.failure is not None:
            self._warn(method.failure)
        return loss

    def _options(self) -> dict[str, Any]:
        """The options that all groups share."""
        found, *others = self.param_groups
        _check_options(found)
        for group in others:
            _check_options(group)
            for name in GLOBAL:
                if group[name] != found[name]:
                    raise ValueError(
                        f"{name} differs between parameter groups, but there is one direction for "
                        f"all parameters: set one {name} for all groups (lr may differ)"
                    )
        return found

    def _trainable(self) -> tuple[list[Tensor], list[float]]:
        """The parameters that are not frozen, all of them checked, and their learning rates."""
        pairs = [
            (p, float(group["lr"]))
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        held, rates = [p for p, _ in pairs], [rate for _, rate in pairs]
        if any_sharded(held):
            raise ValueError(
                "params are sharded (DTensor), over which LBFGS has no inner products: use "
                "FullBatchGD, or keep the parameters whole"
            )
        refuse_flattened(held, "LBFGS", "use FullBatchGD")
        for i, p in enumerate(held):
            check_storage(p, f"params[{i}]")
        check_disjoint(held, "params")
        return held, rates

    def _follow(
        self, params: list[Tensor], options: dict[str, Any], must_fit: bool = False
    ) -> QuasiNewton:
        """Return the method for these parameters; a new one where they, or options, are others.

        What was learnt of others before the optimizer was pickled is forgotten, unless it
        `must_fit`.
        """
        kept = [options[name] for name in ("history_size", "history_device", "maximize")]
        key = [(id(p), p.shape, p.dtype, p.device) for p in params], kept
        if key != self._key or self._method is None:
            method, saved = self._make(params, options), self._saved
            if saved is not None and (must_fit or method.fits(saved)):
                method.load_state_dict(saved)
            else:
                method.iterations = self.n_iter
            self._method, self._key, self._saved = method, key, None
        return self._method

    def _make(self, params: list[Tensor], options: dict[str, Any]) -> QuasiNewton:
        device, sign = options["history_device"], -1 if options["maximize"] else 1
        place = None if device is None else torch.device(device)
        return QuasiNewton(params, options["history_size"], place, sign)

    def _warn(self, what: str) -> None:
        """Say, once, that something went wrong."""
        if not self._has_warned:
            warnings.warn(
                f"LBFGS: {what}; the parameters are as they were before it, and the next iteration "
                "goes along the gradient. Further failures are in LBFGS.stopped alone",
                RuntimeWarning,
                stacklevel=6,  # the caller of step, which torch wraps
            )
        self._has_warned = True

    def _learnt(self) -> Mapping[str, Any] | None:
        return self._saved if self._method is None else self._method.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict, with copies of the pairs under ``state["lbfgs"]``."""
        state: dict[Any, Any] = self.state
        if (learnt := self._learnt()) is not None:
            state[SAVED] = learnt
        try:
            return super().state_dict()
        finally:
            state.pop(SAVED, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, with the same bits.

        Raises:
            ValueError: it is of parameters of other shapes or dtypes, of another ``history_size``,
                or of another optimizer; nothing is changed.
        """
        saved = dict(state_dict["state"])
        learnt = saved.pop(SAVED, None)
        if saved:
            raise ValueError(
                "the state dict is of another optimizer: of torch.optim.LBFGS and others LBFGS can "
                "take nothing up; begin without it"
            )
        before = self._method, self._saved, self._key, [dict(g) for g in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        self._method, self._saved, self._key = None, copy.deepcopy(learnt), None
        try:
            params, _ = self._trainable()
            if params and learnt is not None:
                self._follow(params, self._options(), must_fit=True)
        except (TypeError, ValueError):
            self._method, self._saved, self._key, groups = before
            for group, old in zip(self.param_groups, groups, strict=True):
                group.clear()
                group.update(old)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what was learnt as its state dict."""
        own = {name: vars(self)[name] for name in ("stopped", "last_evaluations", "_has_warned")}
        return super().__getstate__() | own | {"_saved": self._learnt()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Tensors may get their values later: what was learnt is taken up by the next step.
        super().__setstate__(state)
        self._method, self._key = None, None


def _check_options(options: Mapping[str, Any]) -> None:
    """Check the options of the optimizer or of one group."""
    check_scalar("lr", options["lr"], least=0)
    check_name(options["line_search"])
    for name in ("history_size", "max_iter"):
        _check_count(name, options[name])
    if options["max_eval"] is not None:
        _check_count("max_eval", options["max_eval"])
    if options["max_norm"] is not None:
        check_number("max_norm", options["max_norm"], above=0)
    for name in ("tolerance_grad", "tolerance_change"):
        check_number(name, options[name], least=0)
    for name in ("damping", "maximize"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}")
    if options["history_device"] is not None:
        try:
            torch.device(options["history_device"])
        except RuntimeError as error:
            raise ValueError(f"history_device is no device: {error}") from None


def _check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    check_number(name, value, least=1)
