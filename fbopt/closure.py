"""FullBatchClosure: mean loss and gradient over all chunks, a closure for any optimizer."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._checks import check_params
from fbopt._eager import eager
from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.full_pass import FullPass
from fbopt._engine.fully_sharded import FullySharded
from fbopt._engine.inputs import (
    ARGUMENTS,
    check_arguments,
    refuse_compiled,
    refuse_inference_mode,
    refuse_sharded,
    refuse_sharded_groups,
    refuse_twice,
    unwrapped,
)
from fbopt._engine.modules import list_parts
from fbopt._engine.parameter_sets import AloneInThreads, check_optimizers
from fbopt._engine.preparation import Preparation
from fbopt._engine.reduce import Reduction
from fbopt._engine.whole_gradient import WholeGradient
from fbopt._sharding import any_sharded
from fbopt.accumulate import GradientAccumulator
from fbopt.diagnosis import require_right
from fbopt.penalty import GradientPenalty
from fbopt.sharpness import SharpnessAware


class FullBatchClosure:
    """Fill ``p.grad`` with the full-batch gradient and return the mean loss, at every call.

    With chunks c of n_c samples, mean losses L_c with gradients g_c, and ``N = sum_c n_c``::

        loss    L = sum_c (n_c / N) L_c
        g'_c      = g_c + lambda H_c g_c
        p.grad    = sum_c (n_c / N) g'_c min(1, chunk_max_norm / (||g'_c|| + 1e-6))

    where lambda is 0 without a penalty, and the factor is 1 without ``chunk_max_norm``. A ragged
    last chunk counts by its samples. Follows torch's closure convention, so it serves
    ``FullBatchGD``, ``torch.optim.LBFGS``, Adam or SGD alike. Gradients replace what ``p.grad``
    held and live in a buffer that the next call overwrites: clone what you keep.

    The caller's ``torch.autocast`` counts for forward passes alone. Closure, model and optimizer
    that are pickled or deep-copied together still belong together.

    Afterwards BatchNorm's running statistics are the n_c-weighted mean over all chunks of what the
    passes at theta recorded. The passes at perturbed parameters change nothing but the gradient:
    not the parameters, buffers or random generators; dropout masks are the same in all passes of a
    chunk. An exception puts all buffers back.

    Args:
        model: the module to train.
        loss_fn: ``loss_fn(model(input), target)`` is the chunk's mean loss, 0-dim.
        chunks: an iterable over (input, target) that every call iterates anew: a list, a
            DataLoader. The size of a chunk, and which samples share it, are part of the model where
            there is a penalty, a chunk clip or BatchNorm: ``shuffle=True`` is refused with the
            first two and with exact sums.
        penalty: a :class:`GradientPenalty`, a :class:`SharpnessAware`, or None.
        optimizer: whose learning rate the penalty's coefficient follows. All of its parameters that
            require grad have to be among ``params``.
        accumulation: how the sum over chunks is kept, see :class:`GradientAccumulator`.
        evaluate: ``evaluate(model, chunk)`` returns the chunk's mean loss, or (loss, aux); takes
            the place of ``loss_fn`` for chunks that are no (input, target) pairs. It also runs in
            the passes at perturbed parameters: do not count metrics in it, return them as aux.
        weight: ``weight(chunk)`` returns n_c, what the chunk's loss is the mean over: a number or a
            tensor of one element. A chunk of weight 0 is left out. By default, with torch's
            cross-entropy as ``loss_fn``, the number of targets that are not ignored, or the sum of
            their class weights; with its losses by element the number of elements; otherwise the
            length that the chunk's tensors share.
        params: the tensors to differentiate by; by default the model's parameters that require
            grad.
        autocast: dtype to autocast the forward passes to, e.g. ``torch.bfloat16``.
        chunk_max_norm: bound of the norm of each chunk's gradient g'_c; None does not clip.
        chunk_norms: set ``mean_sqnorm`` also where neither penalty nor chunk clip needs it.
        observe: ``observe(output, target)``, or with evaluate ``observe(aux, chunk)``, is called
            after every chunk's first pass with detached tensors.
        on_pass_start: called without arguments before all chunks are visited, again where exact
            sums visit them once more: the place to reset what ``observe`` counts. Without it
            ``observe`` sees the first of these visits only.
        cuda_graph: capture the work on a chunk, or on K, in a CUDA graph and replay it, see below.
        backward: take gradients from ``loss.backward()`` rather than ``torch.autograd.grad``, for
            models that need it, see below.
        debug: at the first call look for mistakes in the set-up, as :func:`fbopt.check` does, by a
            few passes over the first chunks: raise for errors, warn of doubts, print a line if all
            is right.
        vectorize: K, how many chunks of equal shapes go through the model at once, see below.
        compile: compile the gradient of a chunk, or of K, with ``torch.compile``: both passes
            forward and backward in one function. The model itself must not be compiled.
        flatten_parameters: move the parameters that require grad one after the other into one flat
            buffer for each device and dtype, now and whenever a call finds them elsewhere, as after
            ``model.to``. Values and strides stay, and so do state dicts; tensors outside the model
            that shared a parameter's memory no longer do. Of hundreds of small parameters the
            passes at perturbed ones then overwrite that buffer and copy it back, rather than to
            point each of them to a second one.
        returns: ``"loss"``, or ``"objective"`` for the objective J, float64: what a line search has
            to see, as its gradient is what ``p.grad`` holds.
        process_group: the processes that have different chunks, a
            ``torch.distributed.ProcessGroup``; ``"local"`` for a process that trains on its own;
            see below.

    **Chunks at once.** With ``vectorize=K`` those chunks whose indices i have the same ``i // K``
    and whose tensors have the same shapes go through the model in one call of
    ``torch.func.vmap``: at theta, then each at its own perturbed parameters. Every chunk keeps its
    own loss, norm and BatchNorm statistics; results are those of ``vectorize=1`` to rounding. It
    pays for small models and chunks; activations of K chunks are in memory at once. Random draws,
    the same in all passes of a group, are others than with ``vectorize=1``. Of several processes
    each has to get whole groups, ``i // K % world_size == rank``. See the guide "Chunks at once".

    **Exact sums.** With ``accumulation="exact"`` gradients, BatchNorm statistics and loss have the
    same bits in any order of the chunks and on any number of processes. At the first call, and
    seldom later, the call visits all chunks once more. See the guide "Exact sums".

    **Several processes.** Every process of ``process_group`` has to call, and visits its own
    ``chunks``, such as ``chunks[rank::world_size]``. Afterwards all have the same gradients, loss,
    ``mean_sqnorm`` and BatchNorm statistics, bit for bit: those of all chunks, summed once per
    call. A job of several processes has to pass a group or ``"local"``. With DTensors ``p.grad`` is
    a DTensor, and None means that all processes of their mesh visit the same chunks; FSDP2
    (``fully_shard``) needs ``backward=True``. See the guide "Several processes".

    **Backward.** With ``backward=True`` hooks take each gradient as ``loss.backward()`` makes it:
    for reentrant checkpointing, ``fully_shard`` and DistributedDataParallel, which is unwrapped
    (``evaluate`` gets the module in it). ``p.grad`` of tensors other than ``params`` stays as it
    was. Not with ``method="exact"`` or ``cuda_graph``.

    **CUDA graphs.** With ``cuda_graph=True`` all device work on a chunk, or on K chunks at once, is
    captured at the third visit of its kind and then replayed; the bits are those without graphs.
    Python of the model, ``loss_fn`` and ``evaluate`` does not run in a replay, and tensors that the
    model uses besides parameters and buffers must not move in memory. See the guide "CUDA graphs".

    Attributes:
        step: number of completed calls; the argument of a penalty's ``coefficient`` function.
        mean_sqnorm: with a penalty, ``chunk_max_norm`` or ``chunk_norms``, the last call's
            ``sum_c (n_c/N) ||g_c||^2``, of gradients without penalty and clip (0-dim float64); else
            None.
        accumulator: the :class:`GradientAccumulator` at work.
        cuda_graph: whether chunks are captured. Set to False, the next call frees all graphs; set
            to True, captures begin again.

    Raises:
        TypeError, ValueError: an argument, a chunk or a loss that does not fit; the message names
            it. With ``cuda_graph`` also a model that is not on one CUDA device or that
            ``torch.compile`` captures itself.
        RuntimeError: a call while another one is at work; ``method="exact"`` with a model that
            cannot be differentiated twice, or of which torch would lose second derivatives. Chunks
            cannot go through the model at once; ``vectorize=1`` works. A chunk
            cannot be captured since the model waits for the device or replaces a buffer; the call
            has changed nothing, and the next one tries again. Or another process failed or was
            lost; the call has changed nothing on any.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        chunks: Iterable[Any] | None = None,
        *,
        penalty: GradientPenalty | SharpnessAware | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        accumulation: str = "float32",
        evaluate: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]] | None = None,
        weight: Callable[[Any], float | Tensor] | None = None,
        params: Iterable[Tensor] | None = None,
        autocast: torch.dtype | None = None,
        chunk_max_norm: float | None = None,
        chunk_norms: bool = False,
        observe: Callable[[Any, Any], None] | None = None,
        on_pass_start: Callable[[], object] | None = None,
        cuda_graph: bool = False,
        backward: bool = False,
        debug: bool = False,
        vectorize: int = 1,
        compile: bool = False,
        flatten_parameters: bool = False,
        returns: str = "loss",
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.chunks: Iterable[Any] = () if chunks is None else chunks
        self.penalty, self.optimizer = penalty, optimizer
        self.evaluate, self.weight, self.autocast = evaluate, weight, autocast
        self.chunk_max_norm, self.chunk_norms = chunk_max_norm, chunk_norms
        self.observe, self.on_pass_start = observe, on_pass_start
        self.cuda_graph, self.backward, self.debug = cuda_graph, backward, debug
        self.vectorize, self.compile = vectorize, compile
        self.flatten_parameters, self.returns = flatten_parameters, returns
        check_arguments(vars(self) | {"chunks": chunks, "accumulation": accumulation})
        if backward:
            self.model = model = unwrapped(model)
        sharded = FullySharded(model.modules())
        sharded.reshard()  # gathered parameters would take the place of shards
        if not backward:
            sharded.refuse_functional()
        self._given = None if params is None else check_params(params)
        self.accumulator = GradientAccumulator(
            self._trainable(self._candidates()), accumulation, process_group="local"
        )
        self.sums = self.accumulator._sums
        self._statistics = RunningStatistics(model, accumulation)
        self._reduction = Reduction(model, self.sums, self._statistics, process_group, sharded)
        shared = self.sums, self._statistics, self._reduction
        self._prepared = Preparation(model, *shared)
        if flatten_parameters:
            self._prepared.flat.follow(self.sums.params, model)
        self._prepared.follow_cuda_graph(cuda_graph, model, self._candidates())
        self._full_pass = FullPass(*shared, self._prepared)
        self._whole_gradient: WholeGradient | None = None
        self._saved_whole: Mapping[str, Any] | None = None
        self._running = threading.Lock()
        self._verified = self._arguments()
        self.step = self._step_before = 0
        self.mean_sqnorm: Tensor | None = None
        self._last: tuple[Any, ...] | None = None  # what the objective is made of
        self._coefficient()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but the lock."""
        state = dict(vars(self))
        del state["_running"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._running = threading.Lock()

    @property
    def accumulation(self) -> str:
        """How the sum over chunks is kept."""
        return self.sums.accumulation

    @eager
    def __call__(self) -> Tensor:
        """Fill ``p.grad`` and return the mean loss: 0-dim, float32 (float64 for a float64 loss).

        With ``returns="objective"`` the objective, float64.
        """
        loss = self._accumulate(self.optimizer)
        self.assign()
        return loss

    @eager
    def accumulate(self) -> Tensor:
        """Visit every chunk, keep the weighted sum for :meth:`assign`, return the mean loss, or the
        objective.

        ``p.grad`` is None afterwards; :meth:`assign` fills it. An exception leaves parameters and
        buffers as they were.
        """
        return self._accumulate(self.optimizer)

    @eager
    def loss_only(self) -> Tensor:
        """Return the mean loss where the parameters are, without gradients.

        One forward pass over each chunk, one at a time; neither ``p.grad`` nor buffers nor torch's
        random generators change, and ``observe`` is not called. Without ``vectorize`` it has the
        dropout masks of the next call.

        Raises:
            ValueError: parameters are sharded.
        """
        self._claim("called")
        try:
            with AloneInThreads(self.sums.params):
                with self._reduction.preparing():
                    refuse_inference_mode()
                    self._check_again()
                    if any_sharded(self.sums.params):
                        raise ValueError(
                            "loss_only() needs plain parameters, and these are sharded (DTensor): "
                            "call the closure"
                        )
                self._reduction.begin(call="loss_only()")
                with torch.no_grad():
                    return self._full_pass.loss_only(self)
        finally:
            self._running.release()

    def _accumulate(self, optimizer: torch.optim.Optimizer | None) -> Tensor:
        """Accumulate for a step of this optimizer."""
        self._claim("called")
        try:
            with AloneInThreads(self.sums.params):
                return self._visit_all(optimizer)
        finally:
            self._running.release()

    def _claim(self, what: str) -> None:
        """Refuse a call while another one is at work on the same sums."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                f"this FullBatchClosure is {what} while it is at work (from evaluate, loss_fn, "
                "observe, or another thread), which would mix the sums of both: make a closure of "
                "its own for the other call, or wait for the first"
            )

    def _visit_all(self, optimizer: torch.optim.Optimizer | None) -> Tensor:
        with self._reduction.preparing():
            if self.debug:
                require_right(self, optimizer)
                self.debug = False
            coefficient = self._begin(optimizer)
            is_single = self._reduction.collectives.is_single
            facts = {} if is_single else self._facts(coefficient, optimizer)
        self._reduction.begin(**facts)
        try:
            whole = self._find_whole_gradient(coefficient)
            means = self._full_pass(self, coefficient, whole)
        except BaseException:
            self._prepared.restore_parameters()
            self._rollback()
            raise
        self.step += 1
        self.mean_sqnorm = means.square
        rule = None if coefficient is None else self.penalty
        self._last = rule, self.chunk_max_norm is not None, means, coefficient, whole
        objective = self.objective if self.returns == "objective" else None
        return means.loss if objective is None else objective

    @property
    def loss(self) -> Tensor | None:
        """L of the last call, whatever it returned (0-dim); None before the first."""
        return None if self._last is None else self._last[2].loss

    @property
    def objective(self) -> Tensor | None:
        """J = L + penalty of the last call, whose gradient ``p.grad`` holds (0-dim, float64).

        None before the first call, with ``chunk_max_norm``, and for :class:`SharpnessAware`: the
        gradient is then that of no function. By finite differences ``p.grad`` is J's gradient to
        first order in the radius, with ``method="central"`` to second order.
        """
        if self._last is None:
            return None
        rule, clips, means, coefficient, whole = self._last
        if clips:
            return None
        loss: Tensor = means.loss.double()
        if rule is None:
            return loss
        square = None if whole is None else whole.squared_norm
        penalty = rule.value(coefficient, means.square, means.norm, square)
        return None if penalty is None else loss + penalty

    def _find_whole_gradient(self, coefficient: float | Tensor | None) -> WholeGradient | None:
        """The gradient of all chunks, where the penalty's direction has a share of it."""
        if self.penalty is None or coefficient is None or not self.penalty.direction.whole:
            return None
        known = self._whole_gradient
        if known is None or not known.fits(self.sums):
            visitor = FullBatchClosure(
                self.model,
                self.loss_fn,
                self.chunks,
                evaluate=self.evaluate,
                accumulation=self.accumulation,
                params=self.sums.params,
                process_group=self._reduction.collectives.given,
                backward=self.backward,
            )
            if self._saved_whole is not None:
                visitor.load_state_dict(self._saved_whole)
                self._saved_whole = None
            self._whole_gradient = known = WholeGradient(visitor, self.sums)
        known.find(self)
        return known

    def _facts(
        self, coefficient: float | Tensor | None, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """What has to be the same on all processes."""
        rates = [_shown(g.get("lr")) for g in optimizer.param_groups] if optimizer else []
        return {
            "accumulation": self.accumulation,
            "penalty": self.penalty and self.penalty.method,
            "the penalty's direction": self.penalty and str(self.penalty.direction),
            "coefficient": _shown(coefficient),
            "lr": rates,
            "chunk_max_norm": self.chunk_max_norm,
            "chunk_norms": self.chunk_norms,
        }

    def assign(self) -> None:
        """Set ``p.grad`` to the mean over all chunks, None for parameters that no chunk used."""
        self._claim("assigned")
        try:
            if self.sums.total_weight == 0:
                raise RuntimeError("assign(): nothing was accumulated; call accumulate() first")
            for p, g in zip(self.sums.params, self.sums.means(), strict=True):
                p.grad = g
        finally:
            self._running.release()

    def rollback(self) -> None:
        """Put all buffers and the count of steps back to what they were before the last call."""
        self._claim("rolled back")
        try:
            self._rollback()
        finally:
            self._running.release()

    def _rollback(self) -> None:
        self._prepared.before.restore()
        self.step = self._step_before

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the number of calls, and the units of exact sums."""
        state = {
            "step": self.step,
            "sums": self.sums.store.state_dict(),
            "statistics": self._statistics.store.state_dict(),
        }
        whole = self._whole_gradient
        return state if whole is None else state | {"whole": whole.visitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`."""
        self.step = int(state["step"])
        self.sums.store.load_state_dict(state["sums"])
        self._statistics.store.load_state_dict(state["statistics"])
        self._saved_whole, self._whole_gradient = state.get("whole"), None

    def _arguments(self) -> list[Any]:
        return [vars(self)[name] for name in ARGUMENTS]

    def _check_again(self) -> None:
        """Check the arguments if one has been replaced since."""
        given = self._arguments()
        if not all(map(operator.is_, given, self._verified)):
            check_arguments(vars(self) | {"accumulation": self.accumulation})
            self._verified = given

    def _candidates(self) -> list[Tensor]:
        return list(self.model.parameters()) if self._given is None else self._given

    def _trainable(self, candidates: Iterable[Tensor]) -> list[Tensor]:
        found = [p for p in candidates if p.requires_grad]
        if not found:
            raise ValueError("model has no parameters that require grad: there is nothing to train")
        return found

    def _coefficient(self) -> float | Tensor | None:
        """Lambda for this step; None where no second pass is needed."""
        if self.penalty is None:
            return None
        if self.backward:
            refuse_twice(self.penalty)
        if self.penalty.method == "exact":
            refuse_compiled(self.model)
            refuse_sharded(self.sums.params)
        value = self.penalty.coefficient_at(self.step, self.optimizer)
        return None if isinstance(value, (int, float)) and value == 0 else value

    def _begin(self, optimizer: torch.optim.Optimizer | None) -> float | Tensor | None:
        """Prepare for the first chunk; return lambda."""
        refuse_inference_mode()
        self._check_again()
        self._reduction.sharded.reshard()  # gathered parameters would be listed in place of shards
        modules, listed = list_parts(self.model)
        candidates = self._given or listed
        self._prepared.follow_cuda_graph(self.cuda_graph, self.model, candidates)
        coefficient = self._coefficient()
        if self.backward:
            self.accumulator._find_wrappers()
        trainable = self._trainable(candidates)
        frozen = check_optimizers(optimizer, self.optimizer, trainable, self.model)
        if self.flatten_parameters:
            self._prepared.flat.follow(trainable, self.model)
        self._prepared.follow_params(self.model, trainable, candidates, frozen)
        if self.vectorize > 1 or self.compile:
            refuse_sharded_groups(self.sums.params)
        by_difference = self.penalty is not None and self.penalty.method != "exact"
        is_perturbed = coefficient is not None and by_difference
        self._reduction.needs_norms = self.penalty is not None and self.penalty.needs_norms
        self._prepared.begin(modules, is_perturbed, self.chunk_max_norm, self.flatten_parameters)
        self._step_before = self.step
        return coefficient


def _shown(value: float | Tensor | None) -> str:
    """A number as other processes are told; one on a device is not read."""
    is_read = not isinstance(value, Tensor) or value.device.type == "cpu"
    return str(float(value)) if is_read and value is not None else "unknown"
