"""Full-batch training in plain float64 torch, without fbopt: what test_stateful compares with.

Loops over chunks, autograd.grad, batch normalisation as formulas. Everything is kept by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

# With a usual eps of 1e-5 four layers and chunks of two samples magnify rounding a millionfold.
EPS, DROP, MOMENTUM = 0.1, 0.25, 0.3
Chunk = tuple[Tensor, Tensor]
Grads = dict[str, Tensor | None]


class Block(nn.Module):
    """A linear layer and its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, EPS, MOMENTUM)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(h)))


class Net(nn.Module):
    """BatchNorm, dropout, a part that only chunks of more than three samples run, and an unused
    parameter.
    """

    def __init__(self, depth: int, drop: float = DROP) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.scale, self.unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        self.extra = nn.BatchNorm1d(4, EPS, MOMENTUM)
        self.dropout = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        if len(x) > 3:
            h = self.scale * self.extra(h)
        return self.last(self.dropout(h))


class PlainTraining:
    """What the model, optimizer and closure should hold after each call.

    Attributes:
        params, buffers, grads, momenta: tensors by name.
        trainable: the names of parameters that require grad.
        modes: whether each normalisation layer, and dropout, is in training mode.
        groups: options of each parameter group, and its `names`.
        steps: completed closure calls.
        means: what the last closure call found.
    """

    def __init__(self, model: Net, groups: Iterable[dict[str, Any]], **clip: Any) -> None:
        self.depth, self.drop = len(model.blocks), model.dropout.p
        self.params = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.grads: Grads = dict.fromkeys(self.params)
        self.momenta: dict[str, Tensor] = {}
        self.trainable = set(self.params)
        norms = (n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d))
        self.modes = {**dict.fromkeys(norms, True), "dropout": True}
        self.groups, self.clip = [dict(g) for g in groups], clip
        self.steps = 0
        self.means: Grads = {}
        self.before: tuple[dict[str, Tensor], int] | None = None

    # --- the model -------------------------------------------------------------------------------

    def loss(self, params: Mapping[str, Tensor], chunk: Chunk, record: Callable) -> Tensor:
        """The mean squared error of one chunk; `record(layer, mean, var)` of each normalisation."""
        x, y = chunk
        h = x @ params["first.weight"].T + params["first.bias"]
        for i in range(self.depth):
            h = h @ params[f"blocks.{i}.linear.weight"].T + params[f"blocks.{i}.linear.bias"]
            h = torch.tanh(self._normalised(params, f"blocks.{i}.norm", h, record))
        if len(x) > 3:
            h = params["scale"] * self._normalised(params, "extra", h, record)
        if self.modes["dropout"]:
            h = dropout(h, self.drop)
        output = h @ params["last.weight"].T + params["last.bias"]
        return ((output - y) ** 2).mean()

    def _normalised(
        self, params: Mapping[str, Tensor], name: str, h: Tensor, record: Callable
    ) -> Tensor:
        if self.modes[name]:
            mean = h.mean(0)
            var = ((h - mean) ** 2).mean(0)
            record(name, mean.detach(), var.detach() * len(h) / (len(h) - 1))
        else:
            mean, var = self.buffers[f"{name}.running_mean"], self.buffers[f"{name}.running_var"]
        return (h - mean) / torch.sqrt(var + EPS) * params[f"{name}.weight"] + params[
            f"{name}.bias"
        ]

    def forward(self, chunk: Chunk) -> Tensor:
        """An ordinary pass outside of a closure: running statistics move by their momentum."""
        leaves = self._leaves(self.params)

        def record(name: str, mean: Tensor, var: Tensor) -> None:
            for kind, value in (("mean", mean), ("var", var)):
                old = self.buffers[f"{name}.running_{kind}"]
                self.buffers[f"{name}.running_{kind}"] = old + MOMENTUM * (value - old)
            self.buffers[f"{name}.num_batches_tracked"] += 1

        return self._gradient(self.loss(leaves, chunk, record), leaves)

    def _leaves(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: p.clone().requires_grad_(n in self.trainable) for n, p in params.items()}

    def _gradient(self, loss: Tensor, leaves: Mapping[str, Tensor], graph: bool = False) -> Grads:
        names = [n for n in leaves if n in self.trainable]
        inputs = [leaves[n] for n in names]
        found = torch.autograd.grad(loss, inputs, create_graph=graph, allow_unused=True)
        return dict.fromkeys(leaves) | dict(zip(names, found, strict=True))

    # --- the closure -----------------------------------------------------------------------------

    def call(
        self,
        chunks: Iterable[Chunk],
        weigh: Callable[[Chunk], float],
        method: str | None,
        coefficient: float,
        radius: float,
        chunk_max_norm: float | None,
    ) -> tuple[float, float]:
        """Visit all chunks and set `grads`; return the mean loss and mean squared chunk norm."""
        chunks = [chunk for chunk in chunks if weigh(chunk) != 0]
        total = sum(map(weigh, chunks))
        self.before = ({n: b.clone() for n, b in self.buffers.items()}, self.steps)
        statistics: dict[str, list] = {}
        loss = square = 0.0
        sums: Grads = dict.fromkeys(self.params)
        for chunk in chunks:
            weight, passed = weigh(chunk), []
            start = torch.get_rng_state()
            value, grads = self._chunk(self.params, chunk, lambda *found, p=passed: p.append(found))
            after = torch.get_rng_state()
            norm = norm_of(grads)
            if method is not None and coefficient != 0:
                grads = self._penalised(chunk, grads, method, coefficient, radius, start)
            torch.set_rng_state(after)
            clip = 1.0
            if chunk_max_norm is not None:
                clip = min(1.0, chunk_max_norm / (norm_of(grads) + 1e-6))
            for name, mean, var in passed:
                statistics.setdefault(name, []).append((weight, mean, var))
            for n, g in grads.items():
                if g is not None:
                    sums[n] = (0 if sums[n] is None else sums[n]) + weight * clip * g
            loss, square = loss + weight * value, square + weight * norm**2
        for name, found in statistics.items():
            share = sum(w for w, _, _ in found)
            for kind, k in (("mean", 1), ("var", 2)):
                self.buffers[f"{name}.running_{kind}"] = sum(f[0] * f[k] for f in found) / share
            self.buffers[f"{name}.num_batches_tracked"] += len(found)
        self.means = {n: None if s is None else s / total for n, s in sums.items()}
        self.grads = dict(self.means)
        self.steps += 1
        return loss / total, square / total

    def _chunk(
        self, params: Mapping[str, Tensor], chunk: Chunk, record: Callable = lambda *found: None
    ) -> tuple[float, Grads]:
        leaves = self._leaves(params)
        loss = self.loss(leaves, chunk, record)
        return loss.item(), self._gradient(loss, leaves)

    def _penalised(
        self, chunk: Chunk, grads: Grads, method: str, lam: float, radius: float, start: Tensor
    ) -> Grads:
        """g + lambda H g."""

        def at(sign: float) -> Grads:
            torch.set_rng_state(start)
            shift = sign * radius / norm_of(grads) if norm_of(grads) else 0.0
            moved = {
                n: p if grads[n] is None else p + shift * grads[n] for n, p in self.params.items()
            }
            return self._chunk(moved, chunk)[1]

        if method == "exact":
            torch.set_rng_state(start)
            leaves = self._leaves(self.params)
            found = self._gradient(self.loss(leaves, chunk, lambda *f: None), leaves, graph=True)
            half = sum((g**2).sum() for g in found.values() if g is not None) / 2
            products = self._gradient(half, leaves)
            return {
                n: None if g is None else g + lam * (0 if products[n] is None else products[n])
                for n, g in grads.items()
            }
        plus, minus = at(1), grads if method == "forward" else at(-1)
        k = lam * norm_of(grads) / (radius if method == "forward" else 2 * radius)
        return {n: None if g is None else g + k * (plus[n] - minus[n]) for n, g in grads.items()}

    def fail(self) -> None:
        """A call that raised: the gradients of the step before are gone, nothing else."""
        self.grads = dict.fromkeys(self.params)

    def rollback(self) -> None:
        """Undo what the last call did to buffers and the count of calls."""
        self.buffers, self.steps = {n: b.clone() for n, b in self.before[0].items()}, self.before[1]

    # --- the optimizer ---------------------------------------------------------------------------

    def step(self, clipped: bool = True) -> float:
        """SGD on `grads`; return the norm of those that it uses."""
        held = [n for group in self.groups for n in group["names"]]
        used = {n: self.grads[n] for n in held if self.grads[n] is not None}
        norm = norm_of(used, self.clip["norm_type"])
        factor = 1.0
        if clipped and self.clip["max_norm"] is not None:
            factor = min(1.0, self.clip["max_norm"] / (norm + 1e-6))
        for group in self.groups:
            for n in group["names"]:
                if n in used:
                    self._update(n, factor * used[n], **group)
        return norm

    def _update(
        self, name: str, g: Tensor, lr: float, momentum: float, dampening: float,
        weight_decay: float, nesterov: bool, maximize: bool, names: list[str],
    ) -> None:  # fmt: skip
        g = (-g if maximize else g) + weight_decay * self.params[name]
        if momentum:
            old = self.momenta.get(name)
            v = g if old is None else momentum * old + (1 - dampening) * g
            self.momenta[name] = v
            g = g + momentum * v if nesterov else v
        self.params[name] = self.params[name] - lr * g


class PlainAccumulator:
    """sum_c w_c g_c / sum_c w_c by name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.reset()

    def reset(self) -> None:
        self.added: list[tuple[float, Grads]] = []

    def add(self, weight: float, grads: Grads) -> None:
        if weight:
            self.added.append((weight, {n: grads[n] for n in self.names}))

    def mean(self) -> Grads:
        total = sum(w for w, _ in self.added)
        found: Grads = dict.fromkeys(self.names)
        for n in self.names:
            terms = [w * g[n] for w, g in self.added if g[n] is not None]
            if terms:
                found[n] = sum(terms[1:], terms[0]) / total
        return found


def norm_of(grads: Mapping[str, Tensor | None], order: float = 2.0) -> float:
    """The norm of all gradients as one vector."""
    found = [g.reshape(-1) for g in grads.values() if g is not None]
    return torch.linalg.vector_norm(torch.cat(found), order).item() if found else 0.0


def close(a: Tensor | float | None, b: Tensor | float | None, size: float | None = None) -> bool:
    """Equal to rounding: to 1e-10 of `size`, the largest element unless given, or of one."""
    if a is None or b is None:
        return a is b
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.shape != b.shape:
        return False
    atol = 1e-10 * max(1.0, largest([b]) if size is None else size)
    return bool(torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True))


def largest(tensors: Iterable[Tensor | None]) -> float:
    """The largest finite element of all."""
    found = [t.nan_to_num(0, 0, 0).abs().max().item() for t in tensors if t is not None]
    return max(found, default=0.0)
