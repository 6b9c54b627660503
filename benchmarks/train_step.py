"""Images/s of a full-batch step of `fbopt train`, of its passes alone, and with a DataLoader.

    python -m benchmarks.train_step [--width N] [--images N] [--chunk N] [--precision P] [--compile]
                                    [--penalty] [--device cuda] [--quick]

ResNet-18 on random 32×32 images, cropped and flipped anew in each step. Three contenders: `fbopt
train` (images resident on the device), the forward and backward passes alone on prepared images,
and the same step fed by a DataLoader whose worker processes augment (float32, contiguous). Every
gradient is first checked against fbopt.reference, without augmentation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases import CLASSES, WrongResult, require_close, with_gradients
from benchmarks.report import QUICK_ROUNDS, Report, compiles, options
from benchmarks.task import Task
from benchmarks.timing import CPU, Contender, Plan, measure
from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.train import models
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve
from fbopt.train.data.dataset import Data, from_arrays
from fbopt.train.data.load import MOMENTS
from fbopt.train.malloc import keep_freed
from fbopt.train.precision import autocast_dtype, cross_entropy, set_arithmetic
from fbopt.train.trainer import Trainer

ROUNDS = 7
LR, STRENGTH, MAX_NORM = 0.01, 0.5, 0.25
SHAPE = (3, 32, 32)
CHECKED = {"images": 72, "chunk": 32, "augment": "none", "workers": 0}
# Of the gradient's norm, from the reference in the same precision. One ReLU that rounding puts on
# its other side shows in the third digit.
TOLERANCES = {"fp32": 2e-2, "tf32": 3e-2, "bf16": 3e-2}


@dataclass(frozen=True)
class Job:
    """What is timed: a step over random images in chunks, its network and precision."""

    images: int
    chunk: int
    width: int
    penalised: bool
    augment: str = "random"
    device: torch.device = CPU
    workers: int = 2
    compiled: bool = False
    precision: str = "fp32"
    channels_last: bool = True

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The images (n, 3, 32, 32) of uint8, and labels that include the last class."""
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (self.images, *SHAPE), np.uint8)
        return x, np.append(rng.integers(0, CLASSES, self.images - 1), CLASSES - 1)

    @property
    def data(self) -> Data:
        """The same in the form that the training program uses."""
        x, y = self.arrays
        data = from_arrays(x, y, x[:1], y[:1], "random images", MOMENTS["cifar10"])
        return data.to(self.device, self.channels_last)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def network(self) -> nn.Module:
        """ResNet-18 in which every parameter gets a gradient."""
        torch.manual_seed(0)
        network = models.build("resnet18", SHAPE, CLASSES, self.width)
        return with_gradients(network).to(self.device, memory_format=self.layout)

    def task(self, network: nn.Module) -> Task:
        """The gradient that a step needs, of images without augmentation."""
        x, y = self.data.train.batch(slice(None))
        parts = [p.contiguous(memory_format=self.layout) for p in x.split(self.chunk)]
        chunks = list(zip(parts, y.split(self.chunk), strict=True))
        cast = autocast_dtype(self.precision)
        coefficient = LR * STRENGTH / 4
        return Task(network, chunks, self.penalised, cast, cross_entropy, coefficient=coefficient)


@dataclass(frozen=True)
class Step:
    """A contender: a call is one step, which leaves the mean gradient of `model` in `p.grad`."""

    kind: str
    job: Job
    run: Callable[[], object]
    model: nn.Module | None = None  # None where no gradient is left

    def __call__(self) -> None:
        set_arithmetic(self.job.precision, self.job.device)
        self.run()

    @property
    def name(self) -> str:
        layout = "channels_last" if self.job.channels_last else "contiguous"
        return f"{self.kind}, {self.job.precision}, {layout}{', compiled' * self.job.compiled}"


def trainer_step(job: Job) -> Step:
    """`fbopt train`: images resident on the device, cropped and flipped there."""
    recipe = {"recipe": "fb-penalty" if job.penalised else "fb-clip", "lr": LR, "warmup": 0}
    chunks = {"data": "cifar10", "augment": job.augment, "chunk_size": job.chunk}
    model = {"width": job.width, "channels_last": job.channels_last, "compile": job.compiled}
    machine = {"device": str(job.device), "precision": job.precision}
    chosen = Options(**recipe, **chunks, **model, **machine)
    trainer = Trainer(resolve(chosen), job.data, job.device)
    return Step("fbopt train", job, trainer.take_step, with_gradients(trainer.model))


def bare_passes(job: Job) -> Step:
    """As many forward and backward passes over images that are ready, and nothing else."""
    task = job.task(job.network())
    if job.compiled:
        task.model.compile()
    return Step("its passes alone", job, task.passes)


def data_loader_step(job: Job) -> Step:
    """The usual way: torchvision's transforms in a DataLoader's worker processes, float32."""
    job = replace(job, compiled=False, precision="fp32", channels_last=False)
    model, rule = job.network(), {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = FullBatchGD(model.parameters(), lr=LR, max_norm=MAX_NORM, **rule)
    penalty = GradientPenalty(STRENGTH) if job.penalised else None
    closure = FullBatchClosure(
        model, F.cross_entropy, LoadedChunks(job), penalty=penalty, optimizer=optimizer
    )
    kind = f"DataLoader with {job.workers} workers"
    return Step(kind, job, lambda: optimizer.step(closure), model)


class LoadedChunks(DataLoader):
    """The chunks of a DataLoader, moved to the device."""

    def __init__(self, job: Job) -> None:
        how = {"num_workers": job.workers, "persistent_workers": job.workers > 0}
        how |= {"pin_memory": job.device.type == "cuda"}
        super().__init__(AugmentedImages(job), job.chunk, **how)
        self.device = job.device

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for pair in super().__iter__():
            yield tuple(t.to(self.device, non_blocking=True) for t in pair)


class AugmentedImages(Dataset):
    """Images as torchvision's own CIFAR-10 returns them, with the usual transforms."""

    def __init__(self, job: Job) -> None:
        from torchvision import transforms

        random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        ready = [transforms.ToTensor(), transforms.Normalize(*MOMENTS["cifar10"])]
        self.transform = transforms.Compose((random if job.augment == "random" else []) + ready)
        self.x, self.y = job.arrays[0].transpose(0, 2, 3, 1), job.arrays[1].tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[index])), self.y[index]


def contenders(job: Job) -> list[Step]:
    """`fbopt train` as asked for, its passes, the DataLoader, and the first two without options."""
    found = [trainer_step(job), bare_passes(job), data_loader_step(job)]
    if job.precision != "fp32" or job.compiled:
        plain = replace(job, compiled=False, precision="fp32")
        found += [trainer_step(plain), bare_passes(plain)]
    return found


def check(job: Job) -> None:
    """Compare the gradients of one step, and see that the parameters move."""
    for step in contenders(replace(job, **CHECKED)):
        if step.model is None:
            continue
        before = [p.detach().clone() for p in step.model.parameters()]
        set_arithmetic(step.job.precision, job.device)
        expected = step.job.task(copy.deepcopy(step.model)).expected
        step()
        now = list(step.model.parameters())
        grads, tolerance = [p.grad for p in now], TOLERANCES[step.job.precision]
        require_close(step.name, "p.grad", grads, expected, tolerance, norm=2)
        moved = any(not torch.equal(p, old) for p, old in zip(now, before, strict=True))
        if not moved or not all(torch.isfinite(p).all() for p in now):
            raise WrongResult(f"{step.name}: parameters did not move, or not to finite values")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the path of its JSON."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16, help="of ResNet-18; 64 is the paper's")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--precision", choices=tuple(TOLERANCES), default="fp32")
    parser.add_argument("--compile", dest="compiled", action="store_true")
    parser.add_argument("--penalty", dest="penalised", action="store_true")
    choice = parser.parse_args(argv)
    known = {field.name for field in fields(Job)}
    job = Job(**{name: value for name, value in vars(choice).items() if name in known})
    if job.compiled and not compiles(job.device):
        parser.error("--compile: torch.compile does not work here; leave it out")
    report = Report("train_step", choice, argv)
    freed = "kept" if keep_freed() else "returned"  # by all contenders, as by `fbopt train`
    check(job)
    steps = contenders(job)
    for step in steps:  # worker processes, memory and algorithms are found once
        step()
    what = f"{'with' if job.penalised else 'without'} penalty, ResNet-18 of width {job.width}"
    title = f"Full-batch step {what}, {job.images} images in chunks of {job.chunk}"
    title += f", freed memory is {freed}"
    rounds = choice.rounds or (QUICK_ROUNDS if choice.quick else ROUNDS)
    plan = Plan(rounds, job.device, choice.seconds, whole=True)
    rows = [Contender(step.name, step, samples=job.images) for step in steps]
    report.table(measure(title, rows, plan))
    return report.write(choice.out)


if __name__ == "__main__":
    main()
