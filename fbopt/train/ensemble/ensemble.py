"""K networks as the rows of one tensor of parameters, and a full-batch step of all of them.

g_k = Σ_c (n_c/N) g_kc,  clipped to max_norm_k, then torch.optim.SGD's update in its own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fbopt.reference import clip_coefficient
from fbopt.train.ensemble.gradient import Pass, Stack, StackedGradient
from fbopt.train.ensemble.member import COUNTS, Member
from fbopt.train.ensemble.penalty import Perturbation, perturbation

# Of all networks, in a pass over chunks whose borders have no effect: larger ones are no faster.
SAMPLES = 8192


class Ensemble:
    """The numbers of several members, and how they take a step together.

    The members' own tensors become views of these. A member that is left out of a later ensemble
    keeps its own.

    Attributes:
        members: all at the same step.
        gradient: of stacked chunks; passed on to an ensemble of fewer members.
        parameters: (K, P).
        momentum: (K, P); None before the first step.
    """

    def __init__(self, members: Sequence[Member], gradient: StackedGradient) -> None:
        self.members, self.gradient = list(members), gradient
        self.parameters = self._rows([list(m.model.parameters()) for m in members])
        self.momentum: Tensor | None = None
        if any(m.has_momentum for m in members):
            self.momentum = self._rows([m.momentum() for m in members])
        self.counts = {n: torch.stack([getattr(m, n) for m in members]) for n in COUNTS}
        for k, member in enumerate(self.members):
            counts = {name: tensor[k] for name, tensor in self.counts.items()}
            member.use(gradient.model.named(self.parameters[k]), counts)
        self._link_momentum()
        groups = [m.optimizer.param_groups for m in members]
        options = [m.options for m in members]
        self._factor = self._column([group[0]["momentum"] for group in groups])
        self._has_momentum = any(group[0]["momentum"] for group in groups)
        self._nesterov = self._column([group[0]["nesterov"] for group in groups], torch.bool)
        bounds = [math.inf if o.max_norm is None else o.max_norm for o in options]
        self._max_norm = torch.tensor(bounds, dtype=torch.float64, device=self.parameters.device)
        self._clips = any(map(math.isfinite, bounds))
        self._norm_type = float(options[0].norm_type)
        self._decay = self._rows([self._decays(m) for m in members])
        self._logs = [o.chunk_norms for o in options]

    @staticmethod
    def _rows(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        rows = [torch.cat([t.detach().reshape(-1) for t in row]) for row in tensors]
        return torch.stack(rows)

    def _column(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """A number for each member, (K, 1)."""
        dtype = dtype or self.parameters.dtype
        return torch.tensor(values, dtype=dtype, device=self.parameters.device).unsqueeze(1)

    @staticmethod
    def _decays(member: Member) -> list[Tensor]:
        """The weight decay of every element."""
        groups = member.optimizer.param_groups
        rates = {p: group["weight_decay"] for group in groups for p in group["params"]}
        return [torch.full_like(p, rates[p]) for p in member.model.parameters()]

    def _link_momentum(self) -> None:
        if self.momentum is not None:
            for k, member in enumerate(self.members):
                if member.options.momentum:
                    member.use_momentum(self.gradient.model.named(self.momentum[k]))

    @torch.no_grad()
    def take_step(self) -> None:
        """Take one full-batch step with every member."""
        optimizers = [m.optimizer for m in self.members]
        rules = [m.rule for m in self.members]
        step = self.members[0].step
        second = perturbation(rules, optimizers, step, self.parameters.device)
        for name in ("loss", "correct", "chunk_sqnorm"):
            self.counts[name].zero_()
        gradient = self._mean_gradient(second)
        norms = torch.linalg.vector_norm(gradient, self._norm_type, dim=1, dtype=torch.float64)
        self._update(gradient, norms, [o.param_groups[0]["lr"] for o in optimizers])
        self.counts["finite"] &= self.counts["loss"].isfinite()
        self.counts["finite_passes"] += self.counts["finite"]
        logged = (
            self._logs if second is None else map(any, zip(self._logs, second.active, strict=True))
        )
        squares = self.counts["chunk_sqnorm"].unbind()
        each = zip(self.members, norms.to(gradient.dtype).unbind(), squares, logged, strict=True)
        for member, norm, square, has_square in each:
            member.advance(norm, square if has_square else None)

    def _mean_gradient(self, second: Perturbation | None) -> Tensor:
        """Visit all chunks, count, and return the mean gradients (K, P)."""
        total, weight = torch.zeros_like(self.parameters), 0
        loss = torch.zeros(len(self.members), dtype=torch.float64, device=total.device)
        joined = second is None and not any(self._logs)
        for chunks in self._joined() if joined else self._stacks():
            first = self.gradient(self.parameters, chunks)
            grads = self._with_second(first, chunks, second)
            total.add_(grads.sum(1) if grads.shape[1] > 1 else grads[:, 0], alpha=chunks.size)
            loss += first.losses.double().sum(1) * chunks.size
            self.counts["correct"] += first.correct.sum(1)
            weight += chunks.size * grads.shape[1]
        self.counts["loss"].copy_(loss / weight)
        self.counts["chunk_sqnorm"] /= weight
        return total.div_(weight)

    def _with_second(self, first: Pass, chunks: Stack, second: Perturbation | None) -> Tensor:
        """The gradients of chunks with those at second points; adds n_c ‖g_c‖² where it counts."""
        grads = first.grads
        if second is None and not any(self._logs):
            return grads
        norms = torch.linalg.vector_norm(grads, dim=2, dtype=torch.float64)
        self.counts["chunk_sqnorm"] += norms.square().sum(1) * chunks.size
        if second is None:
            return grads

        def at(length: Tensor) -> Tensor:
            points = torch.addcmul(self.parameters.unsqueeze(1), length, grads)
            return self.gradient(points, chunks, counts=False).grads

        return second.add(grads, norms, at)

    def _stacks(self) -> Iterator[Stack]:
        """All chunks of the current pass, those of equal size together as the options say."""
        chunks = self.members[0].chunks
        at_once = self.members[0].options.vectorize or 1
        whole = chunks.samples // chunks.size  # a last chunk may be smaller
        for start in range(0, whole, at_once):
            yield self._stack(range(start, min(start + at_once, whole)), torch.stack)
        for last in range(whole, len(chunks)):
            yield self._stack(range(last, last + 1), torch.stack)

    def _joined(self) -> Iterator[Stack]:
        """The same samples in larger chunks: the mean loss of all does not depend on the chunks."""
        chunks = self.members[0].chunks
        count = max(1, SAMPLES // (len(self.members) * chunks.size))
        for start in range(0, len(chunks), count):
            indices = range(start, min(start + count, len(chunks)))
            yield self._stack(indices, lambda parts: torch.cat(parts).unsqueeze(0))

    def _stack(self, indices: range, together: Callable[[list[Tensor]], Tensor]) -> Stack:
        """Some of the chunks of the current pass, of every network where it has its own."""
        shared = self.members[0].chunks.sampling == "fixed"
        found = []
        for member in self.members[: 1 if shared else None]:
            inputs, targets = zip(*(member.chunks[i] for i in indices), strict=True)
            found.append((together(list(inputs)), together(list(targets))))
        if shared:
            return Stack(*found[0], shared=True)
        input, target = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Stack(input, target, shared=False)

    def _update(self, gradient: Tensor, norms: Tensor, lrs: Sequence[float]) -> None:
        """Clip, decay, follow the momentum, and move, in torch.optim.SGD's order."""
        if self._clips:
            clip = clip_coefficient(self._max_norm, norms)
            gradient *= clip.to(gradient.dtype).unsqueeze(1)
        gradient.addcmul_(self._decay, self.parameters)
        if self._has_momentum:
            if self.momentum is None:
                self.momentum = gradient.clone()
                self._link_momentum()
            else:
                self.momentum.mul_(self._factor).add_(gradient)
            ahead = gradient.addcmul_(self._factor, self.momentum)
            gradient = torch.where(self._nesterov, ahead, self.momentum)
        self.parameters.sub_(self._column(lrs) * gradient)
