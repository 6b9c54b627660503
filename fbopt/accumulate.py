"""GradientAccumulator: the weighted mean of gradients over chunks, sum_c w_c g_c / sum_c w_c."""

from __future__ import annotations

import contextlib
import functools
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbopt._checks import check_grads, check_weight, refuse_flattened
from fbopt._distributed import Collectives
from fbopt._eager import eager
from fbopt._engine.assigned import AssignedMeans
from fbopt._engine.backward import drop, scaled_backward, taking
from fbopt._engine.chunk_addition import ChunkAddition
from fbopt._engine.data_parallel import unsynchronised, wrappers_of
from fbopt._engine.fully_sharded import FullySharded
from fbopt._engine.gradient_sums import MOST_PASSES, GradientSums
from fbopt._engine.lockstep import Lockstep
from fbopt._engine.processes import Comparison, combine_sums


class GradientAccumulator:
    """Weighted mean of gradients, one flat buffer per device and dtype.

    ``mean = sum_c w_c g_c / sum_c w_c``: with w_c the number of samples in chunk c and g_c the
    gradient of its mean loss this is the gradient of the mean loss over all samples, whatever the
    sizes of the chunks. One read of the gradient, one read and one write of the sum per parameter
    and chunk (3 words; 5 for exact sums).

    Args:
        params: the parameters, float32, float64, bfloat16 or float16, of any shapes and on any
            devices.
        accumulation: ``"float32"``: sums are kept in float32, for float64 parameters in float64,
            and their last bits depend on the order of the chunks. ``"exact"``: in integers, so that
            the mean has the same bits in any order, see below.
        process_group: the processes that have different chunks, a
            ``torch.distributed.ProcessGroup``; ``"local"`` for a process that trains on its own;
            see below.

    Attributes:
        params: the parameters, each once.
        accumulation: as given.
        total_weight: the sum of the weights since the last :meth:`reset`; after :meth:`mean` that
            of all processes.

    **Several processes.** Every process adds its own chunks: as many as it likes, or none. The
    first :meth:`mean` or :meth:`to_grad` after them sums over all processes, once, and all have to
    call it. Of a DistributedDataParallel gradients are taken before it averages them. With FSDP2
    processes need as many chunks; for DTensors means are DTensors of the same placements. A job of
    several processes has to pass a group or ``"local"``. See the guide "Several processes".

    **Exact sums.** ``w_c g_c`` is rounded to a multiple of a unit, a power of two for each tensor,
    that follows from the last pass. If units do not fit, as often in the first pass, all gradients
    have to be added once more, see :meth:`passes`. With M the largest ``|w_c g_c|`` in a tensor the
    sum's error is at most ``2^-49 M``, for up to 2^21 additions; one that is NaN or infinite makes
    the whole mean NaN. Memory: 16 bytes per parameter rather than 4. See the guide "Exact sums".

    Example:
        >>> accumulator = GradientAccumulator(model.parameters(), accumulation="exact")
        >>> for _ in accumulator.passes():  # one, or two if the units did not fit
        ...     for x, y in chunks:
        ...         with accumulator.chunk(weight=len(x)):
        ...             loss_fn(model(x), y).backward()
        >>> accumulator.to_grad()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        accumulation: str = "float32",
        *,
        process_group: torch.distributed.ProcessGroup | str | None = None,
    ) -> None:
        self._sums = GradientSums(params, accumulation)
        self.accumulation = accumulation
        self._collectives = Collectives(process_group)
        self._collectives.refuse_unknown_processes(self.params)
        if not self._collectives.is_single:
            cure = 'add what FSDP1 has averaged, with process_group="local"'
            refuse_flattened(self.params, "process_group", cure)
        self._comparison = Comparison(self._collectives, self._sums)
        averaged = set[str]() if self._collectives.is_single else self._sharded.averaged
        self._lockstep = Lockstep(self.params, self._collectives, averaged)
        self._comparison.is_joint = self._lockstep.is_joint
        self._additions = self._history = 0  # the latter a checksum of all weights
        self._is_open = self._is_spoiled = False
        self._wrappers: list[weakref.ref[torch.nn.parallel.DistributedDataParallel]] | None = None
        self._assigned = AssignedMeans(self._sums)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the modules around the parameters: a copy has its own parameters."""
        return vars(self) | {"_wrappers": None, "_sharded": FullySharded(())}

    @functools.cached_property
    def _sharded(self) -> FullySharded:
        return FullySharded.holding(self.params)

    @property
    def params(self) -> list[Tensor]:
        """The parameters, each once."""
        return self._sums.params

    @property
    def total_weight(self) -> float:
        """The sum of the weights since the last :meth:`reset`."""
        return self._sums.total_weight

    @eager
    def reset(self) -> None:
        """Start over: forget every gradient added so far. Buffers are kept, and cleared.

        A ``p.grad`` that lies in them, as :meth:`to_grad` sets it, becomes None.
        """
        self._refuse_open()
        self._assigned.release()
        self._sums.reset()
        self._additions, self._history, self._is_spoiled = 0, 0, False

    def passes(self) -> Iterator[int]:
        """Yield 0, then 1, 2, ... as long as all gradients have to be added once more.

        Begins each pass with :meth:`reset`. With ``accumulation="float32"`` there is one pass.

        Raises:
            RuntimeError: the gradients change so much from pass to pass that no unit fits.
        """
        for attempt in range(MOST_PASSES):
            self.reset()
            yield attempt
            if (self._collectives.is_single and not self._additions) or self._finish():
                return
        raise _unsettled()

    @eager
    @torch.no_grad()
    def add(self, grads: Sequence[Tensor | None], weight: float | Tensor = 1.0) -> None:
        """Add ``weight * grads``.

        Args:
            grads: one gradient for each of ``params``, of its shape, dtype and device; None counts
                as zero.
            weight: the number of samples that the gradients are the mean over, a number or a
                tensor of one element; 0 adds nothing.

        Raises:
            TypeError, ValueError: an argument that does not fit, before anything is added.
        """
        grads = grads if isinstance(grads, Tensor) else list(grads)
        check_grads(grads, self.params)
        self._assigned.refuse(grads)
        weight, joint = self._join(weight)
        if joint:
            self._sums.add(self._sums.gather(grads), joint)
            self._count(weight, 1)

    @contextlib.contextmanager
    def chunk(self, weight: float | Tensor = 1.0) -> Iterator[None]:
        """Add ``weight`` times the gradients that ``loss.backward()`` makes in this context.

        Each gradient is added as soon as autograd has made it, and freed: there is never a second
        copy of all gradients, and ``p.grad`` stays None. Several backward passes in one context are
        one chunk: their gradients are added up.

        Args:
            weight: the number of samples that the loss is the mean over, a number or a tensor of
                one element; with 0 the gradients are dropped.

        Raises:
            ValueError: a parameter has a gradient already that :meth:`to_grad` did not set: call
                ``optimizer.zero_grad()``. Nothing has been changed.
            RuntimeError: no gradient was made in the context; chunks are nested, or entered from
                two threads.

        An exception inside leaves the sums as they were before the chunk, unless gradients had been
        added to them already: then an error says so at the next use, and :meth:`reset` starts over.
        """
        with self._chunk(weight, is_scaled=False):
            yield

    @contextlib.contextmanager
    def _chunk(self, weight: float | Tensor, *, is_scaled: bool) -> Iterator[None]:
        weight, joint = self._join(weight, is_scaled)
        wrappers = self._find_wrappers()
        addition = ChunkAddition(self._sums, joint)
        try:
            take = addition.take if joint else drop
            with taking(self.params, take), self._opened(), unsynchronised(wrappers):
                yield
            self._sharded.check()
            addition.finish()
        except BaseException:
            self._is_spoiled |= addition.repetitions > 0
            raise
        if joint and not addition.repetitions:
            raise RuntimeError(
                "no gradient was made in chunk(): call loss.backward() inside the with block (not "
                "torch.autograd.grad), or pass weight=0 if the loss uses none of params"
            )
        self._count(weight, addition.repetitions)

    @eager
    def backward(self, loss: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``weight`` times the gradient of ``loss``: ``loss.backward()`` in a :meth:`chunk`.

        Where FSDP2 averages gradients over the processes of the group, losses are scaled so that
        each counts by its weight.

        Raises:
            ValueError: the loss is not one number; and what :meth:`chunk` raises.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, the mean, not of shape {tuple(loss.shape)}")
        with self._chunk(weight, is_scaled=True):
            scaled_backward(loss, self._lockstep.scale)

    @eager
    def mean(self) -> list[Tensor | None]:
        """Return the weighted mean: for each parameter a tensor of its shape and dtype.

        None where no gradient was ever added. The tensors share the accumulator's memory (for half
        precision they are rounded copies) and hold their values until the next :meth:`add`,
        :meth:`chunk` or :meth:`reset`, which begin a new sum.

        Raises:
            RuntimeError: nothing was added, or a chunk failed half-way; or the units of exact sums
                did not fit: add all gradients once more, or use :meth:`passes`.
        """
        if not self._finish():
            self.reset()
            raise _unsettled()
        return self._sums.means()

    @eager
    def to_grad(self) -> None:
        """Set ``p.grad`` to the :meth:`mean`, to None where no gradient was added.

        The next :meth:`chunk` or :meth:`add` drops these gradients by itself; ``zero_grad()`` is
        not needed.
        """
        self._assigned.assign(self.mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the units of exact sums: the bits of the next mean depend on them."""
        return self._sums.store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`, and start over as :meth:`reset` does."""
        self._sums.store.load_state_dict(state)
        self.reset()

    def _open_sums(self) -> dict[str, Any]:
        """Return what has been added to a float32 sum, as tensors: for a checkpoint within it."""
        sums = self._sums.partial()
        return {"sums": sums, "weight": self._sums.total_weight}

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`_open_sums`."""
        self.reset()
        self._sums.resume(state["sums"])
        self._count(state["weight"], 1)

    def _find_wrappers(self) -> list[torch.nn.parallel.DistributedDataParallel]:
        if self._wrappers is None:
            self._wrappers = [weakref.ref(model) for model in wrappers_of(self.params)]
        return [model for ref in self._wrappers if (model := ref()) is not None]

    def _begin(self, weight: float | Tensor) -> float:
        """Check that gradients can be added, and begin a new sum after a mean."""
        value = check_weight(weight)
        self._sums.store.check_weight(value)
        self._refuse_open()
        self._refuse_spoiled()
        self._sharded.check()
        self._collectives.refuse_unknown_processes(self.params)
        if self._sums.is_mean:
            self.reset()
        self._assigned.drop()
        return value

    def _join(self, weight: float | Tensor, is_scaled: bool = False) -> tuple[float, float]:
        """Return the weight, and that of the gradient: of all processes where FSDP2 averages."""
        try:
            own = self._begin(weight)
        except Exception as error:
            self._lockstep.join(0.0, error)
            raise
        self._lockstep.join(own)
        if not is_scaled and len(set(self._lockstep.weights.values())) > 1:
            raise ValueError(
                "the processes' chunks have different weights, but FSDP2 averages their gradients "
                "alike: call accumulator.backward(loss, weight), which scales the losses"
            )
        return own, self._lockstep.weight

    def _count(self, weight: float, additions: int) -> None:
        self._sums.total_weight += weight
        self._additions += additions
        self._history = zlib.crc32(repr(weight).encode(), self._history)

    def _finish(self) -> bool:
        """Sum over the processes, once; return whether the units of exact sums fitted."""
        with self._comparison.reporting():
            self._refuse_open()
            self._refuse_spoiled()
            self._collectives.refuse_unknown_processes(self.params)
        begun = self._comparison({"accumulation": self.accumulation}, not self._sums.is_mean)
        if not begun:
            return True
        if self._sums.is_mean:  # of the last step: this process has no share in this one
            self.reset()
        self._lockstep.check_weights(self._history)
        counts = self._additions, self._sums.total_weight
        sums, joint = self._sums, self._lockstep.is_joint
        empty = RuntimeError(
            "GradientAccumulator: nothing was added, or with weight 0 alone; call "
            "add(grads, weight), or loss.backward() within chunk(weight)"
        )
        if combine_sums(sums, self._collectives, counts, empty, is_joint=joint) is None:
            return False
        self._sums.settle()
        return True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def _refuse_open(self) -> None:
        if self._is_open:
            raise RuntimeError(
                "GradientAccumulator.chunk() is open, here or in another thread: leave the with "
                "block first"
            )

    def _refuse_spoiled(self) -> None:
        if self._is_spoiled:
            raise RuntimeError(
                "a chunk() raised an error half-way through its backward pass, so that the sums "
                "hold a part of its gradients: call reset() and add all chunks of the step again"
            )


def _unsettled() -> RuntimeError:
    """Return the error for exact sums whose units do not fit."""
    return RuntimeError(
        'the units of accumulation="exact" did not fit the size of the gradients, and are adapted '
        "now: add all gradients once more, as `for _ in accumulator.passes():` does by itself; "
        "where that does not help, the gradients change from one pass to the next (random draws "
        "without a seed)"
    )
