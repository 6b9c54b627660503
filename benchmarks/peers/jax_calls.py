"""The contenders in JAX: a compiled program for a chunk, or for all, in turn or at once.

g' = g + (lambda ||g|| / r) (grad L_c(theta + r g / ||g||) - g), where g = grad L_c(theta).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.peers import jax_networks as networks
from benchmarks.peers.workload import Result, Workload

Step = Callable[[Any, Any], Any]


def penalised(loss: networks.Loss, radius: float, coefficient: float) -> Step:
    """The mean loss of a chunk, its BatchNorm statistics, and its penalised gradient."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of_chunk(params: networks.Params, chunk: tuple[Array, ...]) -> tuple[Any, Any, Any]:
        (mean, statistics), grads = gradient(params, chunk)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        moved = jax.tree.map(lambda p, g: p + (radius / norm) * g, params, grads)
        _, plus = gradient(moved, chunk)
        factor = coefficient * norm / radius
        return mean, statistics, jax.tree.map(lambda g, up: g + factor * (up - g), grads, plus)

    return of_chunk


def zeros(of_chunk: Step, params: Any, chunk: Any) -> Any:
    """Where the sums over chunks begin."""
    shapes = jax.eval_shape(of_chunk, params, chunk)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def scanned(of_chunk: Step, params: Any, chunks: Any) -> Any:
    """The mean over chunks, one at a time."""

    def add(sums: Any, chunk: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(params, chunk)), None

    start = zeros(of_chunk, params, jax.tree.map(lambda a: a[0], chunks))
    sums, _ = jax.lax.scan(add, start, chunks)
    count = len(jax.tree.leaves(chunks)[0])
    return jax.tree.map(lambda total: total / count, sums)


def vmapped(of_chunk: Step, params: Any, chunks: Any) -> Any:
    """The mean over chunks, all at once."""
    found = jax.vmap(of_chunk, (None, 0))(params, chunks)
    return jax.tree.map(lambda values: values.mean(0), found)


def whole(over_chunks: Callable[..., Any], of_chunk: Step, chunks: Any) -> Callable[[Any], Any]:
    """One compiled program for all chunks, as a function of the parameters."""
    step = jax.jit(partial(over_chunks, of_chunk))
    return lambda params: step(params, chunks)


def looped(of_chunk: Step, chunks: Any) -> Callable[[Any], Any]:
    """One compiled program for a chunk, called in a loop: XLA's convolutions are faster there."""
    count = len(jax.tree.leaves(chunks)[0])
    parts = [jax.tree.map(lambda a, i=i: a[i], chunks) for i in range(count)]

    @jax.jit
    def add(params: Any, sums: Any, chunk: Any) -> Any:
        return jax.tree.map(jnp.add, sums, of_chunk(params, chunk))

    def step(params: Any) -> Any:
        sums = start(params, parts[0])
        for chunk in parts:
            sums = add(params, sums, chunk)
        return mean(sums)

    start = jax.jit(partial(zeros, of_chunk))
    mean = jax.jit(lambda sums: jax.tree.map(lambda total: total / count, sums))
    return step


class JaxCall:
    """A call on arrays that are already where JAX keeps them."""

    def __init__(self, prepare: Callable[..., Callable[[Any], Any]], workload: Workload) -> None:
        jax.config.update("jax_enable_x64", workload.precision == "fp64")
        loss = networks.LOSSES[workload.network]
        of_chunk = penalised(loss, workload.radius, workload.coefficient)
        weights = {name: networks.from_torch(w) for name, w in workload.weights.items()}
        arrays = (networks.inputs(array) for array in workload.arrays)
        shape = workload.count, workload.chunk
        chunks = tuple(a.reshape(*shape, *a.shape[1:]) for a in arrays)
        self.params, chunks = jax.device_put((weights, chunks))
        self.step = prepare(of_chunk, chunks)

    def __call__(self) -> Any:
        return jax.block_until_ready(self.step(self.params))

    def result(self) -> Result:
        loss, _, grads = self()
        shown = {name: networks.to_torch(np.asarray(g)) for name, g in grads.items()}
        return Result(float(loss), shown)


forget = jax.clear_caches
KINDS = {
    "JAX jit, a loop": looped,
    "JAX jit(scan)": partial(whole, scanned),
    "JAX jit(vmap)": partial(whole, vmapped),
}


def contenders(workload: Workload) -> dict[str, Callable[[], JaxCall]]:
    """By name, how to make each; the passes are float32 (float64 to check)."""
    if workload.precision == "bf16":
        return {}
    return {name: partial(JaxCall, kind, workload) for name, kind in KINDS.items()}
