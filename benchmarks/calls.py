"""Whole closure calls over the chunks of a data set: ours, plain torch, and the passes alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.cases import WrongResult, require_close, scalar
from fbopt import FullBatchClosure, GradientPenalty, reference
from fbopt._tensors import flat_views

Tensors = Sequence[Tensor]
Chunks = Sequence[tuple[Tensor, Tensor]]
RADIUS, COEFFICIENT = 1e-2, 0.1


class Call:
    """A contender: visits all chunks and leaves the mean gradient in `p.grad`."""

    name: str

    def __init__(self, model: nn.Module, chunks: Chunks, penalised: bool) -> None:
        self.model, self.chunks, self.penalised = model, chunks, penalised
        self.params = list(model.parameters())

    def __call__(self) -> object:
        raise NotImplementedError


class Bare(Call):
    """As many forward and backward passes, and nothing else."""

    name = "bare passes"

    def __call__(self) -> None:
        for x, y in self.chunks:
            for _ in range(1 + self.penalised):
                torch.autograd.grad(F.cross_entropy(self.model(x), y), self.params)


class Ours(Call):
    """FullBatchClosure."""

    name = "fbopt"

    def __init__(self, model: nn.Module, chunks: Chunks, penalised: bool) -> None:
        super().__init__(model, chunks, penalised)
        penalty = GradientPenalty(coefficient=COEFFICIENT, radius=RADIUS) if penalised else None
        self.closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=penalty)

    def __call__(self) -> Tensor:
        return self.closure()


class Plain(Call):
    """As one would write it in torch, with foreach calls. BatchNorm's statistics get no care."""

    name = "plain torch"

    def __call__(self) -> Tensor:
        total, mean = sum(len(y) for _, y in self.chunks), 0.0
        sums = [torch.zeros_like(p) for p in self.params]
        for x, y in self.chunks:
            weight = len(y) / total
            loss = F.cross_entropy(self.model(x), y)
            grads = torch.autograd.grad(loss, self.params)
            mean = mean + weight * loss.detach()
            torch._foreach_add_(sums, grads, alpha=weight)
            if self.penalised:
                difference, step = self._second_pass(x, y, grads)
                torch._foreach_add_(sums, difference, alpha=weight * COEFFICIENT / step)
        for p, g in zip(self.params, sums, strict=True):
            p.grad = g
        return mean

    def _second_pass(self, x: Tensor, y: Tensor, grads: Tensors) -> tuple[list[Tensor], float]:
        step = RADIUS / torch.stack(torch._foreach_norm(grads)).norm().item()
        with torch.no_grad():
            saved = [p.clone() for p in self.params]
            torch._foreach_add_(self.params, grads, alpha=step)
        plus = torch.autograd.grad(F.cross_entropy(self.model(x), y), self.params)
        with torch.no_grad():
            torch._foreach_copy_(self.params, saved)
        return torch._foreach_sub(plus, grads), step


CALLS = (Bare, Ours, Plain)


def model(size: str) -> nn.Module:
    """The network of a size, with a gradient everywhere."""
    torch.manual_seed(0)
    network = cases.model(size)
    for module in network.modules():
        # The last BatchNorm of a block starts at zero, which would hide all that is before it.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network


def chunks(size: str, samples: int, chunk: int) -> Chunks:
    """Random inputs and labels, the last chunk ragged."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 32, 32) if size == "resnet18" else (1, 40)
    x = torch.randn(samples, *shape, generator=generator)
    y = torch.randint(10, (samples,), generator=generator)
    return list(zip(x.split(chunk), y.split(chunk), strict=True))


def expected(model: nn.Module, chunks: Chunks, penalised: bool) -> list[Tensor]:
    """The mean gradient over the chunks, by fbopt.reference, in the dtype of the model."""
    params = list(model.parameters())
    sums, originals = [torch.zeros_like(p) for p in params], [p.detach() for p in params]
    flat = torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype)
    shifted = flat_views(flat, params)
    for x, y in chunks:
        weight = scalar(float(len(y)))
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        if not penalised:
            reference.accumulate_(sums, grads, weight)
            continue
        square = reference.perturb_(flat, originals, grads, RADIUS)
        _point(params, shifted)
        plus = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        _point(params, originals)
        reference.accumulate_penalty_(
            sums, grads, plus, [], weight, scalar(COEFFICIENT), square, RADIUS
        )
    return torch._foreach_div(sums, sum(len(y) for _, y in chunks))


def _point(params: list[Tensor], at: list[Tensor]) -> None:
    for p, t in zip(params, at, strict=True):
        p.data = t


def check(size: str, samples: int, chunk: int, penalised: bool) -> None:
    """Compare every contender with the reference in float64, and count its forward passes."""
    network = copy.deepcopy(model(size)).double()
    data = [(x.double(), y) for x, y in chunks(size, samples, chunk)]
    with torch.no_grad():
        before = [p.clone() for p in network.parameters()]
    mean = expected(network, data, penalised)
    passes: list[int] = []
    network.register_forward_hook(lambda *_: passes.append(1))
    for kind in CALLS:
        call = kind(network, data, penalised)
        passes.clear()
        call()
        if len(passes) != len(data) * (1 + penalised):
            raise WrongResult(f"{kind.name}: {len(passes)} forward passes over {len(data)} chunks")
        require_close(kind.name, "a parameter afterwards", call.params, before, 0)
        if kind is not Bare:
            require_close(kind.name, "p.grad", [p.grad for p in call.params], mean, 1e-8)
