"""CUDA graphs of the work on chunks, or on groups of chunks: one for each kind, captured at its
third visit and replayed from then on.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fbopt._engine.chunk import ChunkGradient, Observe
from fbopt._engine.chunk_groups import Group
from fbopt._engine.cuda_capture import RECORDERS
from fbopt._engine.cuda_refusals import explain
from fbopt._engine.kinds import describe
from fbopt._engine.snapshot import GeneratorSnapshot
from fbopt._ops.flat import overlaps_itself

# How many kinds of chunks get a graph, and how many visits come before a capture: in the first,
# libraries choose algorithms, compile and allocate; the second runs as the capture will.
LIMIT, WARM_UP = 8, 2
Work = Callable[..., tuple[Tensor, Tensor | None]]


class ChunkGraphs:
    """The graphs of a closure, on one device.

    A graph works on the addresses it was captured with: when parameters, buffers or sums have
    moved, all graphs are dropped. Weight and coefficient are read on the device, so they can
    change; numbers and flags in chunks and modules cannot: other values make another kind of chunk.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coefficient = torch.zeros((), dtype=torch.float64, device=device)
        self._kinds: dict[Hashable, int | _Graph] = {}  # visits, or the graph
        self._drop()
        self._settings: dict[Hashable, int] = {}
        self._addresses: list[tuple] = []
        self._held: list[Any] = []
        self._moves = 0
        self._replaced: collections.Counter[str] = collections.Counter()
        self._warned = False

    def begin(
        self, work: ChunkGradient, coefficient: Tensor | None, observe: Observe, compiled: bool
    ) -> None:
        """Begin a call of the closure; drop the graphs if memory that they use has moved."""
        self._model = model = work.forward.model
        self._sums, self._repetitions = work.sums, work.repetitions
        kept = (work.sums.buckets, work.statistics.means, work.perturbation, work.clip)
        held = [model, work.forward.loss_fn, work.forward.evaluate, *kept]
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        tensors = [*work.sums.params, *model.parameters(), *self._buffers.values()]
        addresses = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        same = [id(x) for x in held] == [id(x) for x in self._held]
        if self._kinds and not (same and addresses == self._addresses):
            self._drop()
            self._kinds.clear()
            self._settings.clear()
            self._moves += 1
        self._addresses, self._held, self._observe = addresses, held, observe
        # In the first call every chunk is checked, which no capture and no replay can do.
        self._is_checking = work.checks and work.means is not None and not self._kinds
        setting = (*_baked(work, self.device), observe is None, compiled)
        if len(self._settings) < LIMIT:
            self._settings.setdefault(setting, len(self._settings))
        self._setting = self._settings.get(setting)
        if coefficient is not None:
            self._coefficient.copy_(coefficient)
        self._given = None if coefficient is None else self._coefficient

    def visit(
        self,
        draws: GeneratorSnapshot,
        work: Work,
        which: int | Group,
        chunk: Any,
        weight: float | Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Do the work on a chunk, or a group's stack, by a replay if there is a graph for its kind.

        Args:
            draws: the random generators.
            work: does it without a graph, or in a capture.
            which: the chunk's index, or the group.
            chunk: a chunk or a stack.
            weight: of the chunk, or of each in the stack.
        """
        leaves, structure = tree_flatten((self._sums.scalar(weight, self.device), chunk))
        index = which.indices[0] if isinstance(which, Group) else which
        kind = (
            structure,
            *(describe(index, leaf, "cuda_graph=True", "cuda_graph=False") for leaf in leaves),
            self._setting,
        )
        state = self._kinds.get(kind)
        if state == WARM_UP and not self._is_checking:
            state = self._kinds[kind] = self._capture(work, which, leaves, structure)
        if isinstance(state, _Graph):
            self._sums.unseen &= state.unseen
            return state.run([x for x in leaves if isinstance(x, Tensor)], self._observe)
        if state is None and self._admits():
            state = 0
        weight, chunk = tree_unflatten([_copied(leaf, self.device) for leaf in leaves], structure)
        with contextlib.nullcontext() if state is None else self._recorder.warming():
            result = work(which, chunk, weight, self._given, draws, self._observe)
        self._check_buffers(captured=False)
        if state is not None:
            self._kinds[kind] = min(state + 1, WARM_UP)
        return result

    def _admits(self) -> bool:
        """Whether there is room for another kind; warns once if there is none."""
        known = self._setting is not None
        room = known and len(self._kinds) < LIMIT and self._moves <= LIMIT
        if not room and not self._warned:
            self._warned = True
            warnings.warn(
                f"cuda_graph=True keeps graphs for at most {LIMIT} kinds of chunks, and this "
                "closure has met more, or the model's memory has moved again and again: the rest "
                "runs without graphs. A kind is the shapes of a chunk with its numbers and those "
                "of the model's modules: make the chunks equal in size, and turn numbers that "
                "change into tensors",
                RuntimeWarning,
                stacklevel=6,
            )
        return room

    def _capture(self, work: Work, which: int | Group, leaves: list[Any], structure: Any) -> _Graph:
        static = [_copied(leaf, self.device) for leaf in leaves]
        weight, chunk = tree_unflatten(static, structure)
        seen: list[tuple[Any, Any]] = []
        keep = None if self._observe is None else lambda *shown: seen.append(shown)
        sums = self._sums
        before, sums.unseen = sums.unseen, set(range(len(sums.params)))
        try:
            (loss, square), launch = self._recorder.capture(
                lambda draws: work(which, chunk, weight, self._given, draws, keep),
                self._repetitions,
            )
            unseen = sums.unseen
        except RuntimeError as error:
            explain(error, which)
            raise
        finally:
            sums.unseen = before
            torch.clear_autocast_cache()  # its casts were only captured, never computed
        self._check_buffers(captured=True)
        inputs = [x for x in static if isinstance(x, Tensor)]
        return _Graph(inputs, loss, square, seen, unseen, launch, work)

    def _check_buffers(self, captured: bool) -> None:
        """Drop the graphs if the model has replaced buffers; raise if it does so repeatedly."""
        now = dict(self._model.named_buffers(remove_duplicate=False))
        replaced = [name for name, b in now.items() if self._buffers.get(name) is not b]
        self._replaced.update(replaced)
        if replaced:
            self._drop()
        for name in replaced:
            if captured or self._replaced[name] > WARM_UP:
                raise RuntimeError(
                    f"cuda_graph=True: the model puts another tensor in place of its buffer "
                    f"{name} when it runs, which no replay repeats: write to the buffer in place "
                    f"(self.{name.rpartition('.')[2]}.copy_(...)), or pass cuda_graph=False"
                )
        self._buffers = now

    def _drop(self) -> None:
        """Free all graphs, and with them the recorder's pool, which torch cannot use again."""
        for kind, state in self._kinds.items():
            self._kinds[kind] = WARM_UP if isinstance(state, _Graph) else state
        self._recorder = RECORDERS[self.device.type](self.device)


@dataclass(eq=False)
class _Graph:
    """Captured work: its input and result tensors, which each replay overwrites.

    `work` may own memory that the graph uses, such as constants of compiled code.
    """

    inputs: list[Tensor]
    loss: Tensor
    square: Tensor | None
    seen: list[tuple[Any, Any]]
    unseen: set[int]
    launch: Callable[[], None]
    work: Work

    def run(self, tensors: list[Tensor], observe: Observe) -> tuple[Tensor, Tensor | None]:
        """Replay on a weight and the tensors of a chunk; return copies of the results."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self.launch()
        if observe is not None:
            for shown in self.seen:
                observe(*tree_map_only(Tensor, torch.clone, shown))
        return self.loss.clone(), None if self.square is None else self.square.clone()


def _baked(work: ChunkGradient, device: torch.device) -> tuple:
    """The settings that a capture bakes in, besides addresses."""
    rule = work.penalty
    return (
        None if rule is None else (rule.method, rule.radius, rule.direction, id(work.whole)),
        None if work.clip is None else work.clip.max_norm,
        work.chunk_norms,
        work.forward.autocast,
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        *(
            (name, value)
            for m in work.forward.model.modules()
            for name, value in vars(m).items()
            if type(value) in (bool, int, float, str)
        ),
    )


def _copied(leaf: Any, device: torch.device) -> Any:
    """A copy of a chunk's tensor with the same strides.

    Visits without a graph work on a copy, too: libraries choose algorithms by alignment, so that a
    view into a larger tensor could give other bits before the capture than after.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if overlaps_itself(leaf):
        copy = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
    else:
        copy = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return copy.copy_(leaf.detach(), non_blocking=True).requires_grad_(leaf.requires_grad)
