"""What rules for second points are tested on: a small network in float64, and five chunks; and
gradients and Hessian-vector products by torch.func.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp

from fbopt import FullBatchClosure

WAYS = [{}, {"vectorize": 2}, {"accumulation": "exact"}, {"vectorize": 3, "accumulation": "exact"}]


def data():
    """Five chunks, the last of them ragged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(18, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (18,), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *extra, nn.Tanh(), nn.Linear(6, 3)).double()


class Oracle:
    """Gradients and Hessian-vector products of each chunk, and of all, as flat vectors."""

    def __init__(self, model, chunks):
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        self.theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        total = sum(len(x) for x, _ in chunks)
        self.weights = [len(x) / total for x, _ in chunks]
        self.losses = [
            lambda theta, x=x, y=y: F.cross_entropy(functional_call(model, self.part(theta), x), y)
            for x, y in chunks
        ]
        self.grads = [grad(loss)(self.theta) for loss in self.losses]
        self.whole = self.mean(self.grads)

    def part(self, theta):
        pieces = theta.split([s.numel() for s in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def mean(self, vectors):
        return sum(w * v for w, v in zip(self.weights, vectors, strict=True))

    def product(self, c, v):
        return jvp(grad(self.losses[c]), (self.theta,), (v,))[1]

    def at(self, c, shift):
        return grad(self.losses[c])(self.theta + shift)


def gradient(rule, ways, model=None, chunks=None):
    model, chunks = model or network(), chunks or data()
    closure = FullBatchClosure(model, F.cross_entropy, chunks, penalty=rule, **ways)
    closure()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), closure


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
