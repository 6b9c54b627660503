"""FullBatchClosure: mean loss and gradient over all chunks, a closure for any optimizer."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbopt._checks import check_params
from fbopt._eager import eager
from fbopt._engine.batchnorm import RunningStatistics
from fbopt._engine.chunk import ChunkGradient
from fbopt._engine.chunk_clip import ChunkClip
from fbopt._engine.cuda_graphs import ChunkGraphs, graph_device, refuse_nested
from fbopt._engine.forward import ChunkLoss, autocast_suspended
from fbopt._engine.fully_sharded import FullySharded
from fbopt._engine.gradient_sums import MOST_PASSES
from fbopt._engine.inputs import (
    check_arguments,
    refuse_compiled,
    refuse_sharded,
    refuse_sharded_graph,
    refuse_twice,
    unwrapped,
)
from fbopt._engine.modules import list_modules, list_parameters
from fbopt._engine.other_means import SampleMeans
from fbopt._engine.parameter_sets import alone_in_threads, check_covered, check_stepping
from fbopt._engine.perturb import Perturbation
from fbopt._engine.reduce import Reduction
from fbopt._engine.snapshot import BufferSnapshot, GeneratorSnapshot
from fbopt._engine.weights import Mean, TargetCounts, mean_of, weigh
from fbopt._ops.flat import scalar_on
from fbopt._sharding import working_device
from fbopt.accumulate import GradientAccumulator
from fbopt.diagnosis import check
from fbopt.penalty import GradientPenalty


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
        penalty: a :class:`GradientPenalty`, or None.
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
        cuda_graph: capture the work on a chunk in a CUDA graph and replay it, see below.
        backward: take gradients from ``loss.backward()`` rather than ``torch.autograd.grad``, for
            models that need it, see below.
        debug: at the first call look for mistakes in the set-up, as :func:`fbopt.check` does, by a
            few passes over the first chunks: raise for errors, warn of doubts, print a line if all
            is right.
        process_group: the processes that have different chunks, a
            ``torch.distributed.ProcessGroup``; ``"local"`` for a process that trains on its own;
            see below.

    **Exact sums.** With ``accumulation="exact"`` gradients, BatchNorm statistics and loss have the
    same bits in any order of the chunks and on any number of processes. Where the units of the sums
    do not fit the gradients, at the first call and seldom later, the call visits all chunks once
    more, with buffers and random generators as before. Each call reads once from the device.

    **Several processes.** Every process of ``process_group`` has to call, and visits its own
    ``chunks``, such as ``chunks[rank::world_size]``: uneven shares, or none. Afterwards all have
    the same gradients, loss, ``mean_sqnorm`` and BatchNorm statistics, bit for bit: those of all
    chunks, summed once per call. How chunks are spread changes gradients by rounding (exact sums
    not at all), loss and ``mean_sqnorm`` not. The back end has to fit the model: gloo on the CPU,
    nccl on CUDA (then one read from the device per call; none with ``"cpu:gloo,cuda:nccl"``). A job
    of several processes has to pass a group or ``"local"``: without, each would follow its own
    data. Where a process fails, all put their buffers back; it raises its own error, the others one
    that names it. Buffers of other than normalisation layers stay each process's own.

    **Sharded parameters.** With DTensors norms and units of exact sums are those of whole tensors,
    and ``p.grad`` is a DTensor; not with ``method="exact"`` or ``cuda_graph``. With None as the
    group all processes of their mesh visit the same chunks, which is checked once. A model sharded
    by ``fully_shard`` (FSDP2) needs ``backward=True``. Where FSDP2 averages gradients over
    ``process_group``, the k-th chunks of all processes are one chunk, all have to visit as many,
    and chunks count by their weight. Exact sums have the bits of one process there without penalty,
    clip and norms of chunks.

    **Backward.** With ``backward=True`` hooks take each gradient as ``loss.backward()`` makes it:
    for reentrant checkpointing, and for a model in DistributedDataParallel, which is unwrapped
    (``evaluate`` gets the module in it): one reduction per call takes the place of its own. Without
    penalty, norms and exact sums there is then no second copy of all gradients. ``p.grad`` of
    tensors other than ``params`` stays as it was. Not with ``method="exact"`` or ``cuda_graph``.

    **CUDA graphs.** With ``cuda_graph=True`` all device work on a chunk is captured at the third
    visit of its kind and then replayed on copies of the chunk's tensors, which may come from the
    CPU. The bits are those without graphs, random draws included; learning rate, coefficient and
    weights may change. Python of the model, ``loss_fn`` and ``evaluate`` does not run in a replay;
    that of the other arguments does. A kind is the shapes of a chunk and all numbers and flags in
    it and in the modules: 8 kinds get a graph, the rest run without, after one RuntimeWarning.
    Tensors that the model uses besides parameters and buffers must not move in memory.

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
            cannot be differentiated twice, or of which torch would lose second derivatives. A chunk
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
        penalty: GradientPenalty | None = None,
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
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.chunks: Iterable[Any] = () if chunks is None else chunks
        self.penalty, self.optimizer = penalty, optimizer
        self.evaluate, self.weight, self.autocast = evaluate, weight, autocast
        self.chunk_max_norm, self.chunk_norms = chunk_max_norm, chunk_norms
        self.observe, self.on_pass_start = observe, on_pass_start
        self.cuda_graph, self.backward, self.debug = cuda_graph, backward, debug
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
        self._graphs: ChunkGraphs | None = None
        self._follow_cuda_graph()
        self._perturbation: Perturbation | None = None
        self._clip: ChunkClip | None = None
        self._before, self._between = BufferSnapshot(model), BufferSnapshot(model)
        self._outer_autocast: torch.dtype | None = None
        self._checked: tuple[object, ...] = ()  # for what autograd graphs were checked
        self._counts = TargetCounts()
        self._running = threading.Lock()
        self.step = self._step_before = 0
        self.mean_sqnorm: Tensor | None = None
        self._coefficient()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but what every call makes anew; CUDA graphs are captured again."""
        transient = {"_perturbation": None, "_clip": None, "_graphs": None}
        state = vars(self) | transient
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
        """Fill ``p.grad`` and return the mean loss: 0-dim, float32 (float64 for a float64 loss)."""
        loss = self.accumulate()
        self.assign()
        return loss

    @eager
    def accumulate(self) -> Tensor:
        """Visit every chunk, keep the weighted sum for :meth:`assign`, return the mean loss.

        ``p.grad`` is None afterwards; :meth:`assign` fills it. An exception leaves parameters and
        buffers as they were.
        """
        return self._accumulate(self.optimizer)

    def _accumulate(self, optimizer: torch.optim.Optimizer | None) -> Tensor:
        """Accumulate for a step of this optimizer."""
        self._claim("called")
        try:
            with alone_in_threads(self.sums.params):
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
                self._diagnose(optimizer)
            coefficient = self._begin(optimizer)
        if not self._reduction.collectives.is_single:
            self._reduction.begin(**self._facts(coefficient, optimizer))
        try:
            with autocast_suspended(working_device(self.sums.params[0])) as self._outer_autocast:
                loss, square = self._complete(coefficient)
        except BaseException:
            self._rollback()
            raise
        noted = coefficient is not None or self.chunk_norms or self.chunk_max_norm is not None
        self.mean_sqnorm = square if noted else None
        self.step += 1
        return loss

    def _facts(
        self, coefficient: float | Tensor | None, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """What has to be the same on all processes."""
        rates = [_shown(g.get("lr")) for g in optimizer.param_groups] if optimizer else []
        return {
            "accumulation": self.accumulation,
            "penalty": self.penalty and self.penalty.method,
            "coefficient": _shown(coefficient),
            "lr": rates,
            "chunk_max_norm": self.chunk_max_norm,
            "chunk_norms": self.chunk_norms,
        }

    def _diagnose(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Check the set-up as :func:`fbopt.check` does, until it has once been right."""
        diagnosis = check(self, optimizer)
        if not diagnosis.ok:
            raise RuntimeError(f"FullBatchClosure(debug=True) found {diagnosis}")
        if diagnosis.findings:
            warnings.warn(f"FullBatchClosure(debug=True) found {diagnosis}", stacklevel=6)
        elif self._reduction.collectives.rank == 0:
            print(f"fbopt check: {diagnosis}")
        self.debug = False

    def _complete(self, coefficient: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """Visit all chunks, again where the units of exact sums did not fit; return the means."""
        start = self._generators()
        if self.accumulation == "exact":
            start.begin()  # which a CUDA graph of the whole step does not allow
        for attempt in range(MOST_PASSES):
            if attempt:
                self._before.restore()
                self.sums.reset()
                start.rewind()
            with torch.no_grad(), self._statistics.averaging():
                whole = coefficient is not None or self.chunk_norms or self.chunk_max_norm
                with self._reduction.visiting(apart=not whole):
                    self._visit(coefficient, attempt)
                found = self._reduction.combine()
            if found is not None:
                return found
        raise RuntimeError(
            f'accumulation="exact" visited all chunks {MOST_PASSES} times, and the gradients '
            "changed in size each time: make chunks, model and loss give the same values in every "
            "pass (draws from torch's generators are repeated, others are not), or pass "
            'accumulation="float32"'
        )

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
        self._before.restore()
        self.step = self._step_before

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the number of calls, and the units of exact sums."""
        return {
            "step": self.step,
            "sums": self.sums.store.state_dict(),
            "statistics": self._statistics.store.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`."""
        self.step = int(state["step"])
        self.sums.store.load_state_dict(state["sums"])
        self._statistics.store.load_state_dict(state["statistics"])

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

    def _follow_cuda_graph(self) -> None:
        """Make or free the CUDA graphs, as ``cuda_graph`` says."""
        if not self.cuda_graph:
            self._graphs = None
            return
        device = graph_device(self.model, self._candidates())
        if self._graphs is None or self._graphs.device != device:
            refuse_nested(self.model)
            refuse_sharded_graph(self.sums.params)
            self._graphs = ChunkGraphs(device)

    def _begin(self, optimizer: torch.optim.Optimizer | None) -> float | Tensor | None:
        """Prepare for the first chunk; return lambda."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "FullBatchClosure needs gradients: call it outside torch.inference_mode()"
            )
        self._follow_cuda_graph()
        self._reduction.sharded.reshard()
        coefficient = self._coefficient()
        if self.backward:
            self.accumulator._find_wrappers()
        modules, before = list_modules(self.model), self.sums.params
        candidates = self._given or list_parameters(self.model, modules)
        trainable = self._trainable(candidates)
        frozen = check_covered(optimizer, trainable, self.model)
        if optimizer is not self.optimizer:
            frozen += check_covered(self.optimizer, trainable, self.model)
        frozen += check_stepping(optimizer, trainable, self.model)
        self.sums.reset(trainable)
        self._reduction.follow_params(self.model)
        self._reduction.sharded.check()
        for p in (*before, *candidates, *frozen):  # a frozen one could keep an old gradient
            p.grad = None
        if coefficient is not None and self.penalty and self.penalty.method != "exact":
            if self._perturbation is None or not self._perturbation.fits(self.sums.buckets):
                self._perturbation = Perturbation(
                    self.sums.buckets, self._reduction.sharded.reshard
                )
            self._perturbation.begin()
        if self.chunk_max_norm is None:
            self._clip = None
        else:
            if self._clip is None or not self._clip.fits(self.sums):
                self._clip = ChunkClip(self.sums)
            self._clip.max_norm = self.chunk_max_norm
        self._statistics.follow(modules)
        self._before.follow(modules)
        self._between.follow(modules)
        self._before.save()
        self._step_before = self.step
        return coefficient

    def _generators(self) -> GeneratorSnapshot:
        return GeneratorSnapshot({working_device(p) for p in self.sums.params})

    def _weighed(self, known: Mean | None) -> Iterator[tuple[int, Any, float]]:
        if self.on_pass_start is not None:  # here, where an error reaches other processes
            self.on_pass_start()
        for index, chunk in enumerate(self.chunks):
            weight = weigh(index, chunk, self.weight, known, self._counts)
            self.sums.store.check_weight(weight)
            yield index, chunk, weight

    def _visit(self, coefficient: float | Tensor | None, attempt: int) -> None:
        """Add up this process's chunks."""
        # Without on_pass_start an observer has counted these chunks already.
        is_again = attempt and self.observe is not None and self.on_pass_start is None
        observe = _ignore if is_again else self.observe
        first = self.sums.params[0]
        scale = None if coefficient is None else scalar_on(first.device, coefficient)
        draws = self._generators()
        autocast = self.autocast or self._outer_autocast
        penalty = coefficient is not None and self.penalty
        given = self.evaluate or self.loss_fn, self.chunks
        known = self.sums.buckets, penalty, *map(id, given)
        mean = mean_of(self.loss_fn)
        by_samples = self.weight is None and mean is None
        work = ChunkGradient(
            ChunkLoss(
                self.model,
                self.loss_fn,
                self.evaluate,
                autocast,
                working_device(first),
                self.observe is not None,
            ),
            None if coefficient is None else self.penalty,
            self.sums,
            self._statistics,
            self._between,
            self._perturbation,
            self._clip,
            self.chunk_norms,
            self.backward,
            self._reduction.sharded,
            self._reduction.lockstep,
            self._checked != known,
            SampleMeans(self._reduction.collectives.is_single) if by_samples else None,
        )
        if self._graphs is not None:
            self._graphs.begin(work, scale, observe)
        for index, chunk, weight in self._reduction.lockstep(self._weighed(mean), self.chunks):
            if self._graphs is None:
                loss, square = work(index, chunk, weight, scale, draws, observe)
            else:
                loss, square = self._graphs.visit(work, index, chunk, weight, draws)
            self._reduction.add(loss, square, weight)
        self._checked = known


def _shown(value: float | Tensor | None) -> str:
    """A number as other processes are told; one on a device is not read."""
    is_read = not isinstance(value, Tensor) or value.device.type == "cpu"
    return str(float(value)) if is_read and value is not None else "unknown"


def _ignore(*shown: Any) -> None:
    """Observe nothing, in the same CUDA graphs as an observer."""
