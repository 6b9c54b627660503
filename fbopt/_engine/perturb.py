"""Perturbed parameters theta + s T^2 v, ||s T v|| = radius, in a second buffer; products with the
Hessian by double backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbopt._direction import Direction
from fbopt._engine.autograd_graph import naming_methods
from fbopt._ops import dispatch
from fbopt._ops.buckets import FlatBuckets
from fbopt._ops.flat import accumulator_dtype


class Norms(NamedTuple):
    """What scales the shift along g: 0-dim, float64; (K,) for stacks of K gradients.

    Attributes:
        plain: ``||g||^2``.
        scaled: ``||T g||^2``; the same where T = 1.
    """

    plain: Tensor
    scaled: Tensor


class Perturbation:
    """A second buffer for the parameters, which point to it while they are perturbed.

    The memory of plain parameters is not written: afterwards they are bit for bit what they were,
    also if the pass in between raises. Saved, overwritten and copied back are shards of DTensors,
    whose memory FSDP2 keeps pointers to (`written` is called after each of both), and with
    `in_place` many small parameters that lie one after the other (:meth:`FlatBuckets.memory`).
    """

    def __init__(
        self,
        buckets: FlatBuckets,
        written: Callable[[], None] | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self.buckets, self._written, self.in_place = buckets, written, in_place
        self._originals = [p.detach() for p in buckets.locals]
        self._places = [p.data_ptr() for p in self._originals]
        self._flats = buckets.buffers()
        self._views = buckets.views(self._flats)
        memory = buckets.memory() if in_place else []
        self._memory = {k: flat for k, flat in enumerate(memory) if flat is not None}
        self._kept = {k: torch.empty_like(flat) for k, flat in self._memory.items()}
        whole = [p is shard for p, shard in zip(buckets.params, buckets.locals, strict=True)]
        flat = {i for k in self._memory for i in buckets.indices[k]}
        self._pointed = [i for i, is_whole in enumerate(whole) if is_whole and i not in flat]
        self._in_place = [i for i, is_whole in enumerate(whole) if not is_whole]
        self._saved = [torch.empty_like(self._originals[i]) for i in self._in_place]
        self._shard_views = [self._views[i] for i in self._in_place]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parameters alone: the buffer holds nothing between calls."""
        return functools.partial(Perturbation, in_place=self.in_place), (
            self.buckets,
            self._written,
        )

    def fits(self, buckets: FlatBuckets) -> bool:
        """Whether the buffer was made for these parameters and their current memory."""
        if buckets is not self.buckets:
            return False
        return [p.data_ptr() for p in buckets.current()] == self._places

    @torch.no_grad()
    def begin(self) -> None:
        """Read theta, which all perturbations start from until the next call."""
        theta = list(self._originals)
        for i, saved in zip(self._in_place, self._saved, strict=True):
            theta[i] = saved.copy_(theta[i])
        self._theta = self.buckets.group(theta, "params")
        for k, kept in self._kept.items():
            self._theta[k] = [kept.copy_(self._memory[k])]

    def fill(
        self,
        grads: list[list[Tensor]],
        radius: float,
        eta: float | None = None,
        known: Norms | None = None,
    ) -> Norms:
        """Write ``theta + radius T^2 g / ||T g||`` to the buffer and return both squared norms.

        The gradients are gathered (:meth:`FlatBuckets.gather`); the radius may be negative.

        Args:
            grads: g.
            radius: the length of the shift, ``||T^-1 shift||``.
            eta: ``T = abs(theta) + eta``, elementwise; None for T = 1.
            known: the norms, if they are.
        """
        return fill_(self.buckets, self._flats, self._theta, grads, radius, eta, known)

    @property
    def points(self) -> list[Tensor]:
        """The perturbed parameters."""
        return self._views

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Point the parameters to the buffer, or copy it to the shards, within this context."""
        return _Applied(self)

    def shift(self) -> None:
        """Let the parameters have the values in the buffer."""
        self._move_to(self._views, self._shard_views, self._flats)

    def restore(self) -> None:
        """Let the parameters be what they were at :meth:`begin`, whatever happened since."""
        self._move_to(self._originals, self._saved, self._kept)

    def _move_to(
        self,
        tensors: list[Tensor],
        shards: list[Tensor],
        flats: Sequence[Tensor] | Mapping[int, Tensor],
    ) -> None:
        for i in self._pointed:
            self.buckets.params[i].data = tensors[i]
        for k, memory in self._memory.items():
            memory.copy_(flats[k])
        if self._in_place:
            with torch.no_grad():
                for i, shard in zip(self._in_place, shards, strict=True):
                    self._originals[i].copy_(shard)
            if self._written is not None:
                self._written()


class _Applied:
    """Parameters at their perturbed values; a class, as every chunk enters it."""

    def __init__(self, perturbation: Perturbation) -> None:
        self._of = perturbation

    def __enter__(self) -> None:
        try:
            self._of.shift()
        except BaseException:
            self._of.restore()
            raise

    def __exit__(self, *raised: object) -> None:
        self._of.restore()


def fill_(
    buckets: FlatBuckets,
    flats: Sequence[Tensor],
    theta: list[list[Tensor]],
    grads: list[list[Tensor]],
    radius: float,
    eta: float | None,
    known: Norms | None,
    *,
    stacked: bool = False,
) -> Norms:
    """Write ``theta + radius T^2 g / ||T g||`` to the flat buffer of each bucket; return the norms.

    See :meth:`Perturbation.fill`, and :func:`fbopt.reference.perturb_` for stacks of gradients.
    """
    triples = list(zip(flats, theta, grads, strict=True))
    if eta is not None:
        norms = known or Norms(*buckets.adaptive_norms(theta, grads, eta, stacked))
        for flat, part, along in triples:
            dispatch.perturb_adaptive_(flat, part, along, radius, eta, norms.scaled.to(flat.device))
        return norms
    if known is None and len(grads) == 1 and buckets.sharding is None:  # one call for all of it
        ((flat, part, along),) = triples
        square = dispatch.perturb_(flat, part, along, radius)
        return Norms(square, square)
    square = buckets.squared_norm(grads, stacked) if known is None else known.scaled
    for flat, part, along in triples:
        dispatch.perturb_(flat, part, along, radius, square.to(flat.device))
    return known or Norms(square, square)


def hessian_product(
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    direction: Direction,
    whole: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return ``H v`` from gradients g with an autograd graph, v = own g + whole G.

    It is the gradient of ``own ||g||^2 / 2 + whole <g, G>``.
    """
    curved = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    if not curved:  # the loss is linear in every parameter
        return [torch.zeros_like(p) for p in params]
    with torch.enable_grad():
        value = potential([grads[i] for i in curved], [whole[i] for i in curved], direction)
    with naming_methods():
        products = torch.autograd.grad(value, params, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for h, p in zip(products, params, strict=True)]


def potential(
    grads: Sequence[Tensor], whole: Sequence[Tensor | None], direction: Direction
) -> Tensor:
    """Return ``own ||g||^2 / 2 + whole <g, G>``, whose gradient is H v."""
    total = grads[0].new_zeros((), dtype=accumulator_dtype(grads[0].dtype))
    for g, shared in zip(grads, whole, strict=True):
        wide = g.to(accumulator_dtype(g.dtype))
        if direction.own:
            total = total + direction.own * wide.square().sum() / 2
        if direction.whole and shared is not None:
            total = total + direction.whole * (wide * shared).sum()
    return total
