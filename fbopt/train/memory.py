"""Whether a model and one group of chunks fit into memory, asked before any of it is allocated.

Lower bounds, on torch's "meta" device, which computes shapes alone: parameters, their gradients,
sums and momentum, as far as there are any, and what the backward pass needs of the layers.
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fbopt.train.config.options import Options, OptionsError
from fbopt.train.precision import autocast_dtype, parameter_dtype


def available(device: torch.device) -> int:
    """The bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(1024 * int(found.split()[1]))
    with contextlib.suppress(OSError, ValueError):
        limits.append(_left_of_group(Path("/sys/fs/cgroup")))
    return min(limits)


def _left_of_group(folder: Path) -> int:
    """What the limit of a control group leaves; the cache of files gives way. Raises ValueError."""
    most, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    held = {name: int(count) for name, count in lines}
    return max(0, most - used + held.get("file", 0) - held.get("shmem", 0))


def check_fits(
    options: Options, model: nn.Module, shape: tuple[int, ...], samples: int, device: torch.device
) -> None:
    """Refuse what cannot fit. Raises OptionsError.

    Args:
        options: resolved.
        model: on the meta device.
        shape: of a sample.
        samples: in a chunk or mini-batch, all that go through the model at once.
        device: where the run will be.
    """
    width = parameter_dtype(options.precision).itemsize
    # Themselves and their gradients; sums; momentum; L-BFGS's pairs of steps and changes.
    copies = 2 + (not options.stochastic) + bool(options.momentum) + 2 * (options.history or 0)
    own = copies * width * sum(p.numel() for p in model.parameters())
    room = available(device)
    if own > room:
        count = sum(p.numel() for p in model.parameters())
        raise OptionsError(
            f"--model {options.model} of width {options.width or 'by default'} would have "
            f"{count:,} parameters, which take {_size(own)} with their gradients, sums and "
            f"momentum{f', and --history {options.history} of them' if options.history else ''}, "
            f"and {device.type} has {_size(room)} left; give a smaller --width"
            f"{' or --history' if options.history else ''} or another --model"
        )
    if options.padding is not None:
        bordered = samples * math.prod(side + 2 * options.padding for side in shape[1:])
        if own + bordered > room:  # a byte for each pixel at least
            raise OptionsError(
                f"--padding {options.padding}: {samples:,} images at once take {_size(bordered)} "
                f"with their borders, and {device.type} has {_size(room)} left; give a smaller one"
            )
    dtype = autocast_dtype(options.precision) or parameter_dtype(options.precision)
    outputs = _kept(model, (samples, *shape)) * dtype.itemsize
    if own + outputs > room:
        size = "batch-size" if options.stochastic else "chunk-size"
        raise OptionsError(
            f"--{size}: {samples:,} samples at once take {_size(outputs)} in --model "
            f"{options.model}, and {device.type} has {_size(room)} left; give a smaller --{size}, "
            "--vectorize or --width"
        )


def _kept(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many numbers autograd keeps of a forward pass for an input of a shape.

    What shares memory counts once, parameters not at all.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}  # tensors, too: memory that is freed has a new owner

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes() // tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(torch.empty(shape, device="meta"))  # which holds what is kept
        del output
    return sum(count for _, count in kept.values())


def _size(count: int) -> str:
    """Bytes in words."""
    for power, unit in ((12, "TB"), (9, "GB")):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count / 1e6:,.0f} MB"
