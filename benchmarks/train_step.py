"""A whole full-batch step in three ways: as `fbopt train` takes it, its forward and backward passes
alone, and fed by a DataLoader whose worker processes augment on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases import WrongResult
from benchmarks.devices import CPU
from benchmarks.networks import CLASSES
from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.train import models, precision
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.data.dataset import Data, from_arrays
from fbopt.train.data.load import MOMENTS
from fbopt.train.trainer import Run

LR, STRENGTH, MAX_NORM = 0.01, 0.5, 0.25
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Job:
    """What a step is over: random images in chunks, a network, and how it is computed."""

    images: int
    chunk: int
    width: int
    penalised: bool
    augment: str = "random"
    device: torch.device = CPU
    workers: int = 2
    compiled: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The images (n, 3, 32, 32) of uint8, and labels."""
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (self.images, *SHAPE), np.uint8), rng.integers(
            0, CLASSES, self.images
        )

    @property
    def data(self) -> Data:
        """The same as the training program holds them."""
        x, y = self.arrays
        y = np.concatenate([y[:-1], [CLASSES - 1]])  # all labels have to be there
        return from_arrays(x, y, x[:1], y[:1], "random images", MOMENTS["cifar10"])

    def network(self) -> nn.Module:
        """ResNet-18 with a gradient everywhere."""
        torch.manual_seed(0)
        return revealed(models.build("resnet18", SHAPE, CLASSES, self.width).to(self.device))


def revealed(model: nn.Module) -> nn.Module:
    """The same; the last BatchNorm of a block starts at zero, which would hide what is before."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


class Step:
    """A contender: a call is one step, which leaves the mean gradient in `p.grad`."""

    def __init__(self, job: Job, precision: str, channels_last: bool) -> None:
        self.job, self.precision, self.channels_last = job, precision, channels_last

    @property
    def arithmetic(self) -> str:
        """Precision and layout in words, and whether the model is compiled."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.precision}, {layout}{', compiled' if self.job.compiled else ''}"


class Trained(Step):
    """`fbopt train`: images resident on the device, crops and flips there."""

    def __init__(self, job: Job, precision: str, channels_last: bool) -> None:
        super().__init__(job, precision, channels_last)
        options = Options(
            data="cifar10",
            recipe="fb-penalty" if job.penalised else "fb-clip",
            width=job.width,
            augment=job.augment,
            precision=precision,
            channels_last=channels_last,
            compile=job.compiled,
            device=str(job.device),
            chunk_size=job.chunk,
            lr=LR,
            warmup=0,
        )
        data = job.data.to(job.device, channels_last)
        self.run = Run(resolve(options), data, job.device)
        self.name = f"fbopt train, {self.arithmetic}"
        self.model = revealed(self.run.model)

    def __call__(self) -> None:
        precision.settle(self.precision, self.job.device)
        self.run.take_step()


class Passes(Step):
    """As many forward and backward passes over images that are ready, and nothing else."""

    def __init__(self, job: Job, precision: str, channels_last: bool) -> None:
        super().__init__(job, precision, channels_last)
        self.name = f"its passes alone, {self.arithmetic}"
        self.model = job.network()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        if job.compiled:
            self.model.compile()
        train = job.data.to(job.device).train
        self.chunks = [
            (x.contiguous(memory_format=layout), y)
            for x, y in zip(
                train.batch(slice(None))[0].split(job.chunk), train.y.split(job.chunk), strict=True
            )
        ]

    def __call__(self) -> None:
        precision.settle(self.precision, self.job.device)
        params, dtype = list(self.model.parameters()), precision.cast_to(self.precision)
        for x, y in self.chunks:
            for _ in range(1 + self.job.penalised):
                with precision.autocast(self.job.device, dtype):
                    loss = precision.cross_entropy(self.model(x), y)
                torch.autograd.grad(loss, params)


class Loaded(Step):
    """The usual way: torchvision's transforms in a DataLoader's worker processes, float32."""

    def __init__(self, job: Job) -> None:
        super().__init__(replace(job, compiled=False), "fp32", channels_last=False)
        self.name = f"DataLoader with {job.workers} workers, {self.arithmetic}"
        self.model = job.network()
        self.optimizer = FullBatchGD(
            self.model.parameters(),
            lr=LR,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            max_norm=MAX_NORM,
        )
        self.loader = DataLoader(
            Images(job),
            job.chunk,
            num_workers=job.workers,
            persistent_workers=job.workers > 0,
            pin_memory=job.device.type == "cuda",
        )
        self.closure = FullBatchClosure(
            self.model,
            nn.functional.cross_entropy,
            self,
            penalty=GradientPenalty(STRENGTH) if job.penalised else None,
            optimizer=self.optimizer,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield (
                x.to(self.job.device, non_blocking=True),
                y.to(self.job.device, non_blocking=True),
            )

    def __call__(self) -> None:
        precision.settle(self.precision, self.job.device)
        self.optimizer.step(self.closure)


class Images(Dataset):
    """Images as torchvision's own CIFAR-10 hands them out, with the usual transforms."""

    def __init__(self, job: Job) -> None:
        from torchvision import transforms

        random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        ready = [transforms.ToTensor(), transforms.Normalize(*MOMENTS["cifar10"])]
        self.transform = transforms.Compose((random if job.augment == "random" else []) + ready)
        x, _ = job.arrays
        self.x, self.y = x.transpose(0, 2, 3, 1), job.data.train.y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[index])), self.y[index]


def require_model(step: Step, before: dict[str, Tensor]) -> None:
    """Raise WrongResult for a step that left the parameters where they were, or not finite."""
    now = dict(step.model.named_parameters())
    moved = any(not torch.equal(now[name], p) for name, p in before.items())
    if not moved or not all(torch.isfinite(p).all() for p in now.values()):
        raise WrongResult(f"{step.name}: parameters did not move, or not to finite values")
