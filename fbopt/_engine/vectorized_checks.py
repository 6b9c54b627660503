"""What is looked at where a kind of chunks is new: whether chunks together give what each gives by
itself, at theta and at shifted points, and draw the same random numbers at both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fbopt._engine.chunk import ChunkGradient
from fbopt._engine.functional import ChunkFunction, Passes, Tensors
from fbopt._engine.rounding import Comparison, Found, pointing
from fbopt._engine.shared_state import SharedState
from fbopt._engine.vectorized_errors import explained
from fbopt._engine.vectorized_probe import Kind, Probe, Visit, parameter_names


class Checks:
    """The first and the last chunk of a group by themselves, in this order.

    Args:
        work: what is done with one chunk.
        visit: the group.
        state: what chunks share.
        observed: whether somebody looks at what the loss shows.
    """

    def __init__(
        self, work: ChunkGradient, visit: Visit, state: SharedState, observed: bool = False
    ) -> None:
        self._work, self._visit, self._state = work, visit, state
        places = sorted({0, visit.stack.count - 1})
        self._probes = [Probe(work, visit, state, k, observed and not k) for k in places]

    def kind(self) -> Kind:
        """What is known of the group's kind."""
        return self._probes[0].kind()

    def call(self, function: ChunkFunction, buffers: Tensors) -> None:
        """Check that the loss is a function of the chunk and of what the model is called with.

        Args:
            function: calls the model with copies of its parameters.
            buffers: of one chunk.

        Raises:
            RuntimeError: it takes parameters from elsewhere; or it depends on earlier chunks.
        """
        work, visit = self._work, self._visit
        with work.in_passing(visit.draws), explained(work, visit, self._state, function.compiled):
            loss, strays = function.by_copies(buffers, visit.stack.chunk(0))
        if strays:
            raise RuntimeError(
                f"the loss of {visit.group.where} uses parameter "
                f"{parameter_names(work)[strays[0]]} in another way than by calling the model (a "
                "list of parameters from outside?), and with vectorize= or compile= the model is "
                "called with copies: take parameters from the model that evaluate is given, or "
                "pass vectorize=1 and compile=False"
            )
        self._probes[0].compare_loss(loss)

    def compare(self, passes: Passes) -> None:
        """Compare the passes of all chunks with these."""
        for probe in self._probes:
            probe.compare(passes)


def check_shifted(
    work: ChunkGradient,
    visit: Visit,
    state: SharedState,
    points: Sequence[Tensor],
    passes: Passes,
) -> bool:
    """Compare passes at shifted points; return whether they draw random numbers."""
    for k in sorted({0, visit.stack.count - 1}):
        with pointing(work.sums.params, [p[k] for p in points]):
            probe = Probe(work, visit, state, k)
            probe.compare(passes)
    return probe.has_drawn


def check_draws(
    work: ChunkGradient,
    visit: Visit,
    points: Sequence[Tensor],
    first: Callable[[], Passes],
    further: Callable[[], Passes],
) -> None:
    """Raise RuntimeError if two kinds of passes at theta draw other numbers.

    Args:
        work: what is done with one chunk.
        visit: the group.
        points: where the further passes are made; they are put back.
        first: one kind of passes.
        further: the other.
    """

    def run() -> Found:
        visit.draws.rewind()
        passes = first()
        return Found(passes.loss, passes.grads)

    shifted = [p.clone() for p in points]
    with visit.draws.repeated() as rewind:
        comparison = Comparison(run, work.sums.params, parameter_names(work), visit.longest_sum)
        after = copy.copy(visit.draws)
        after.begin()
        try:
            _copy(points, work.sums.params)
            rewind()
            passes = further()
        finally:
            _copy(points, shifted)
        differs = after.has_moved()  # it has drawn more numbers, or less
        differs |= comparison.difference(Found(passes.loss, passes.grads)) is not None
    if differs:
        raise RuntimeError(
            f"{visit.group.where} together draw other random numbers in the passes at perturbed "
            "parameters than in the first passes, so that their difference would be noise: pass "
            "vectorize=1 and compile=False"
        )


def check_means(work: ChunkGradient, visit: Visit) -> None:
    """Check each loss of a group as that of a chunk by itself is."""
    pairs = zip(visit.group.indices, visit.group.weights, strict=True)
    with work.in_passing(visit.draws):
        for k, (index, weight) in enumerate(pairs):
            work.probe_loss(index, visit.stack.chunk(k), weight)


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for t, s in zip(to, source, strict=True):
        t.copy_(s)
