"""The workloads: networks with torch's initial weights, and samples of the data's shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.cases import CLASSES
from benchmarks.peers import torch_work
from benchmarks.peers.workload import Arrays, Workload
from fbopt.train.data.load import load

QUICK = {"samples": 32, "chunk": 8}


@dataclass(frozen=True)
class Setting:
    """A workload in words, and its sizes: for each size of a chunk how many go at once."""

    title: str
    samples: int
    together: dict[int, int]
    precisions: tuple[str, ...] = ("fp32",)
    left_out: str | None = None

    def shows(self, contender: str) -> bool:
        """Whether a contender takes part, by its name: those left out take too long to compile."""
        return self.left_out is None or self.left_out not in contender


SETTINGS = {
    "cnn": Setting("the small CNN for MNIST-1D", 4096, {128: 8, 32: 16}),
    "mlp": Setting("tanh network 64-64-64-64-10", 4096, {128: 16, 32: 32}),
    "pinn": Setting("Burgers' equation, tanh network 2-32-32-32-32-1", 4096, {512: 0, 128: 0}),
    "resnet18": Setting("ResNet-18 of width 16", 512, {128: 2}, left_out="at once, compiled"),
}


def chosen(choice: argparse.Namespace) -> Iterator[Workload]:
    """The workloads of a command line."""
    for network in choice.workloads:
        setting = SETTINGS[network]
        for chunk, together in setting.together.items():
            size = QUICK if choice.quick else {"samples": setting.samples, "chunk": chunk}
            found = workload(network, **size, folder=choice.data_dir)
            for precision in setting.precisions:
                yield replace(found, precision=precision, together=together)
            if choice.quick:
                break


def workload(
    network: str, samples: int, chunk: int, width: int | None = None, folder: Path | None = None
) -> Workload:
    """A workload whose penalty shows: lambda ||g|| = radius for the first chunk."""
    if network == "resnet18":
        width = width or torch_work.RESNET_WIDTH
    parameters = torch_work.network(network, width).named_parameters()
    weights = {name: p.detach().numpy() for name, p in parameters}
    data = images(samples, folder) if network == "resnet18" else arrays(network, samples)
    found = Workload(network, SETTINGS[network].title, weights, data, chunk, width=width)
    task = torch_work.task(found).with_visible_penalty()
    return replace(found, radius=task.radius, coefficient=task.coefficient)


def arrays(network: str, samples: int) -> Arrays:
    """Random inputs and labels; for the equation points inside, and on the boundary with values."""
    rng = np.random.default_rng(1)
    if network == "pinn":
        points, known = rng.random((2, samples, 2), np.float32)
        points[:, 0], known[:, 0] = 2 * points[:, 0] - 1, 2 * known[:, 0] - 1
        known[::2, 1] = 0
        known[1::2, 0] = np.sign(known[1::2, 0])
        values = np.where(known[:, 1] == 0, -np.sin(np.pi * known[:, 0]), 0)
        return points, known, values.astype(np.float32)
    x = rng.standard_normal((samples, *((64,) if network == "mlp" else (1, 40))), np.float32)
    return x, rng.integers(0, CLASSES, samples)


def images(samples: int, folder: Path | None) -> Arrays:
    """CIFAR-10's first images as folder/train/CLASS/IMAGE, or random ones of that shape."""
    if folder is None:
        rng = np.random.default_rng(1)
        x = rng.standard_normal((samples, 3, 32, 32), np.float32)
        return x, rng.integers(0, CLASSES, samples)
    x, y = load(f"imagefolder:{folder}", samples=samples).train.batch(slice(None))
    return x.numpy(), y.numpy()
