"""The work of a step besides forward and backward passes, by fbopt and in plain torch.

Penalised chunk update: norm, perturb, [second pass], restore, add w (g + lambda H g) to the sums.
Finishing step: norm, clip, weight decay, momentum, update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Operands, WrongResult, point_to
from fbopt import FullBatchGD
from fbopt._engine.flat_parameters import FlatParameters
from fbopt._engine.gradient_sums import GradientSums
from fbopt._engine.perturb import Perturbation
from fbopt._ops.flat import scalar_on

SecondPass = Callable[[], object]
Tensors = list[Tensor]


class ChunkUpdate:
    """A penalised chunk update; what is kept from chunk to chunk is made in `__init__`."""

    name: str
    words: int  # per parameter, read or written
    compiled = False

    def __init__(self, chunk: Operands) -> None:
        self.chunk, self.params = chunk, chunk.parameters()
        self.sums = [torch.zeros_like(p.detach()) for p in self.params]
        self.saved = [p.detach().clone() for p in self.params]

    def update(self, second_pass: SecondPass) -> None:
        """Add a chunk; `second_pass` is called while the parameters are perturbed."""
        raise NotImplementedError

    def step(self) -> None:
        """Add a chunk without a second pass, which is not timed."""
        self.update(lambda: None)

    def total(self, chunks: int) -> Tensors:
        """The weighted sum over the chunks so far."""
        return self.sums


class FboptUpdate(ChunkUpdate):
    """What FullBatchClosure calls between and after the passes."""

    name, words, accumulation = "fbopt", 8, "float32"

    def __init__(self, chunk: Operands) -> None:
        self.chunk, self.params = chunk, chunk.parameters()
        self.gradients = GradientSums(self.params, self.accumulation)
        self.sums = self.gradients.views
        self.perturbation = Perturbation(self.gradients.buckets)
        self.perturbation.begin()
        self.coefficient, self.weight = scalar_on(chunk.device, chunk.coefficient), chunk.weight

    def update(self, second_pass: SecondPass) -> None:
        c, gradients = self.chunk, self.gradients
        grads = gradients.gather(c.grads)
        square = self.perturbation.fill(grads, c.radius, c.eta).plain
        with self.perturbation.applied():
            second_pass()
        plus = gradients.gather(c.plus, "plus")
        gradients.add_penalised(grads, plus, [], self.weight, self.coefficient, square, c.radius)


class FboptFlatUpdate(FboptUpdate):
    """The same with ``flatten_parameters=True``."""

    name = "fbopt, parameters in one buffer"

    def __init__(self, chunk: Operands) -> None:
        super().__init__(chunk)
        FlatParameters().follow(self.params, nn.Module())
        self.perturbation = Perturbation(self.gradients.buckets, in_place=True)
        self.perturbation.begin()


class FboptExactUpdate(FboptUpdate):
    """The same with exact sums, in the units of a pass over CIFAR-10 in chunks of 128.

    After the check its weight alternates in sign: one chunk summed a hundred times would wrap far
    more often than the sums of a pass.
    """

    name, words, accumulation = "fbopt, exact sums", 10, "exact"
    chunks, checked = 391, False

    def __init__(self, chunk: Operands) -> None:
        super().__init__(chunk)
        self.update(lambda: None)
        self.gradients.store.fit(self.gradients.store.maxima(), self.chunks)
        self.gradients.reset()

    def update(self, second_pass: SecondPass) -> None:
        super().update(second_pass)
        if self.checked:
            self.weight = -self.weight

    def total(self, chunks: int) -> Tensors:
        self.checked = True
        if not self.gradients.store.fit(self.gradients.store.maxima(), self.chunks):
            raise WrongResult(f"{self.name}: the units do not fit")
        self.gradients.total_weight = 1.0
        self.gradients.finish()
        return self.sums


class LoopUpdate(ChunkUpdate):
    """One tensor at a time, each formula as it is written on paper."""

    name, words = "per-tensor loop", 19

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c = self.chunk
        norm = torch.stack([g.norm() for g in c.grads]).norm().item()
        for p, g in zip(self.params, c.grads, strict=True):
            p.add_(g, alpha=c.radius / norm)
        second_pass()
        factor = c.coefficient * norm / c.radius
        for p, old in zip(self.params, self.saved, strict=True):
            p.copy_(old)
        for a, g, up in zip(self.sums, c.grads, c.plus, strict=True):
            a.add_(c.weight * (g + factor * (up - g)))


class PublishedUpdate(ChunkUpdate):
    """The calls of the code released with the paper, in its order: 29 words and a host sync.

    It takes the norm twice (once to log it), clones the parameters for every chunk, and keeps a
    running mean in which all chunks count alike.
    """

    name, words, count = "as published", 29, 0

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c, grads = self.chunk, self.chunk.grads
        self.logged = torch.stack([g.pow(2).sum() for g in grads]).sum()
        originals = [p.detach().clone() for p in self.params]
        vector = torch._foreach_mul(grads, 1.0)  # the strength, here in the coefficient
        eps = c.radius / torch.stack([g.pow(2).sum() for g in vector]).sum().sqrt()
        torch._foreach_add_(self.params, vector, alpha=eps)
        second_pass()
        vhp = c.plus
        torch._foreach_sub_(vhp, grads)
        torch._foreach_div_(vhp, eps)
        for p, old in zip(self.params, originals, strict=True):
            p.data.copy_(old)
        torch._foreach_add_(grads, vhp, alpha=c.coefficient)
        self.count += 1
        torch._foreach_sub_(grads, self.sums)
        torch._foreach_add_(self.sums, grads, alpha=1 / self.count)

    def total(self, chunks: int) -> Tensors:
        return torch._foreach_mul(self.sums, chunks * self.chunk.weight)


class ForeachUpdate(LoopUpdate):
    """The shortest foreach sequence: perturb in place, restore from a copy made once per step."""

    name, words = "foreach, in place", 12

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c = self.chunk
        norm = torch.stack(torch._foreach_norm(c.grads)).norm().item()
        self.perturbed(second_pass, c.radius / norm)
        factor = c.coefficient * norm / c.radius
        torch._foreach_add_(self.sums, c.grads, alpha=c.weight * (1 - factor))
        torch._foreach_add_(self.sums, c.plus, alpha=c.weight * factor)

    def perturbed(self, second_pass: SecondPass, scale: float) -> None:
        torch._foreach_add_(self.params, self.chunk.grads, alpha=scale)
        second_pass()
        torch._foreach_copy_(self.params, self.saved)


class ForeachSwappedUpdate(ForeachUpdate):
    """As fbopt does it: the parameters point to other tensors for the pass, here to new ones."""

    name, words = "foreach, new tensors swapped in", 10

    def perturbed(self, second_pass: SecondPass, scale: float) -> None:
        self.swapped(second_pass, torch._foreach_add(self.saved, self.chunk.grads, alpha=scale))

    def swapped(self, second_pass: SecondPass, tensors: Tensors) -> None:
        point_to(self.params, tensors)
        second_pass()
        point_to(self.params, self.saved)


class CompiledUpdate(ForeachSwappedUpdate):
    """torch.compile of foreach: one graph before the second pass, one after it; no host sync."""

    name, words, compiled = "torch.compile of foreach", 8, True

    def __init__(self, chunk: Operands) -> None:
        super().__init__(chunk)
        self.buffer = [torch.empty_like(p) for p in self.saved]
        self.before = torch.compile(_perturb, fullgraph=True, dynamic=False)
        self.after = torch.compile(_accumulate, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def update(self, second_pass: SecondPass) -> None:
        c = self.chunk
        norm = self.before(self.buffer, self.saved, c.grads, c.radius)
        self.swapped(second_pass, self.buffer)
        self.after(self.sums, c.grads, c.plus, norm, c.weight, c.coefficient / c.radius)


def _perturb(out: Tensors, params: Tensors, grads: Tensors, radius: float) -> Tensor:
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    moved = torch._foreach_add(params, torch._foreach_mul(grads, radius / norm))
    torch._foreach_copy_(out, moved)
    return norm


def _accumulate(
    sums: Tensors, grads: Tensors, plus: Tensors, norm: Tensor, weight: float, ratio: float
) -> None:
    difference = torch._foreach_mul(torch._foreach_sub(plus, grads), ratio * norm)
    torch._foreach_add_(sums, torch._foreach_add(grads, difference), alpha=weight)


CHUNK_UPDATES = (FboptUpdate, FboptFlatUpdate, FboptExactUpdate, LoopUpdate, PublishedUpdate)
CHUNK_UPDATES += (ForeachUpdate, ForeachSwappedUpdate, CompiledUpdate)


class FinishingStep:
    """torch.nn.utils.clip_grad_norm_, then torch.optim.SGD, on gradients that are in place."""

    name, words, options = "clip_grad_norm_ + SGD(foreach=True)", None, {"foreach": True}
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.SGD
    compiled = False

    def __init__(self, finish: Operands) -> None:
        self.finish, self.params = finish, finish.parameters()
        for p, g in zip(self.params, finish.grads, strict=True):
            p.grad = g  # shared by all
        rule = {"lr": finish.lr, "momentum": finish.momentum, "weight_decay": finish.weight_decay}
        self.optimizer = self.optimizer_class(self.params, nesterov=True, **rule, **self.options)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, self.finish.max_norm, foreach=True)
        self.optimizer.step()

    def momentum(self) -> Tensors:
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.params]


class FboptStep(FinishingStep):
    """FullBatchGD without a closure: a norm, then one pass."""

    name, words, options = "fbopt", 6, {"max_norm": Operands.max_norm}
    optimizer_class = FullBatchGD

    def step(self) -> None:
        self.optimizer.step()


class FusedStep(FinishingStep):
    name, options = "clip_grad_norm_ + SGD(fused=True)", {"fused": True}


class CompiledStep(FinishingStep):
    """Both in one graph."""

    name, compiled = "torch.compile of clip_grad_norm_ + SGD", True

    def __init__(self, finish: Operands) -> None:
        super().__init__(finish)
        self.step = torch.compile(super().step)


FINISHING_STEPS = (FboptStep, FinishingStep, FusedStep, CompiledStep)
