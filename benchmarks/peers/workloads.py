"""The workloads: networks with torch's initial weights, and random samples of the data's shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.cases import CLASSES
from benchmarks.peers import torch_work
from benchmarks.peers.workload import Arrays, Workload

SAMPLES = 4096
TITLES = {
    "cnn": "MNIST-1D's small CNN",
    "mlp": "tanh MLP 64-64-64-64-10",
}
CHUNKS = {"cnn": (128, 32), "mlp": (128, 32)}


def workload(network: str, samples: int, chunk: int) -> Workload:
    """A workload whose penalty shows: lambda ||g|| = radius for the first chunk."""
    parameters = torch_work.network(network).named_parameters()
    weights = {name: p.detach().numpy() for name, p in parameters}
    title = f"{TITLES[network]}, {samples:,} samples in chunks of {chunk}"
    found = Workload(network, title, weights, arrays(network, samples), chunk)
    task = torch_work.task(found).with_visible_penalty()
    return replace(found, radius=task.radius, coefficient=task.coefficient)


def arrays(network: str, samples: int) -> Arrays:
    """Random inputs and labels."""
    rng = np.random.default_rng(1)
    shape = {"cnn": (1, 40), "mlp": (64,)}[network]
    x = rng.standard_normal((samples, *shape), np.float32)
    return x, rng.integers(0, CLASSES, samples)
