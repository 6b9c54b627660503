"""The models and data of whole calls, and the check of every contender on a few samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.calls import Bare, Call, Chunks, Ours, Plain, Task, expected
from benchmarks.cases import WrongResult, require_close
from benchmarks.devices import CPU
from fbopt._ops import reference

CALLS = (Bare, Ours, Plain)
CLASSES = 10


def model(size: str, device: torch.device = CPU, width: int | None = None) -> nn.Module:
    """The network of a size, with a gradient everywhere."""
    torch.manual_seed(0)
    network = cases.model(size, width)
    for module in network.modules():
        # The last BatchNorm of a block starts at zero, which would hide all that is before it.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            # As in a closure call: torch.compile would make one program for each momentum.
            module.momentum = 1.0
    return network.to(device)


def chunks(size: str, samples: int, chunk: int, device: torch.device = CPU) -> list:
    """Random inputs and labels on the device, the last chunk ragged."""
    generator = torch.Generator(device).manual_seed(1)
    options = {"generator": generator, "device": device}
    if size == "resnet18":
        pixels = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8, **options)
        x = pixels.float().div_(255).sub_(0.5).div_(0.25)
    else:
        x = torch.randn(samples, 1, 40, **options)
    y = torch.randint(CLASSES, (samples,), **options)
    return list(zip(x.split(chunk), y.split(chunk), strict=True))


def formatted(data: Chunks, memory_format: torch.memory_format) -> list:
    """The same chunks with their images in another order."""
    return [(x.contiguous(memory_format=memory_format), y) for x, y in data]


def check(
    size: str,
    samples: int,
    chunk: int,
    penalised: bool,
    device: torch.device = CPU,
    kinds: Sequence[type[Call]] | None = None,
) -> None:
    """Compare every contender with the reference in float64, and count its forward passes."""
    network = model(size, device).double()
    data = [(x.double(), y) for x, y in chunks(size, samples, chunk, device)]
    passes: list[int] = []
    network.register_forward_hook(lambda *_: passes.append(1))
    for kind in CALLS if kinds is None else kinds:
        task = Task(network, data if kind.ragged else data[:-1], penalised)
        before, mean = [p.detach().clone() for p in task.params], expected(task)
        call = kind(task)
        passes.clear()
        call()
        if len(passes) != len(task.chunks) * (1 + penalised):
            count = len(task.chunks)
            raise WrongResult(f"{kind.name}: {len(passes)} forward passes over {count} chunks")
        require_close(kind.name, "a parameter afterwards", call.params, before, 0)
        if not issubclass(kind, Bare):
            require_close(kind.name, "p.grad", [p.grad for p in call.params], mean, 1e-8)


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """||found - wanted|| / ||wanted||."""
    difference = torch._foreach_sub([f.detach() for f in found], list(wanted))
    ratio = reference.squared_norm(difference) / reference.squared_norm(list(wanted))
    return ratio.sqrt().item()


def require_near(
    who: str, found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float
) -> float:
    """Raise WrongResult unless the whole gradient is within tolerance; return how far it is off."""
    off = distance(found, wanted)
    if not off <= tolerance:
        raise WrongResult(f"{who}: p.grad is off by {off:.1e} of its norm, over {tolerance:g}")
    return off
