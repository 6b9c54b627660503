"""Where the ops run in tests: the CPU's kernels, directly and through torch's dispatcher, CUDA's
compiled for the CPU, CUDA's on a GPU, and plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import clone, fences_hold

from fbopt._build import load
from fbopt._ops import dispatch, reference

EMULATED = Path(__file__).parent / "emulated"
KERNELS = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu*"))
EMULATED_FLAGS = (
    f"-I{EMULATED} -DUSE_CUDA -DFBOPT_LIBRARY=fbopt_emulated -DFBOPT_CUDA_KEY=CPU "
    # What nvcc unrolls; warnings about functions that were merged, and about what is loaded and
    # used under the same condition.
    "-Wno-unknown-pragmas -fno-ipa-icf -Wno-uninitialized -Wno-maybe-uninitialized "
    # The sources that kernels.cpp includes: the library's name has to change with them.
    f"-DSOURCES={hashlib.sha256(b''.join(map(Path.read_bytes, KERNELS))).hexdigest()}"
)


@dataclass(frozen=True)
class Target:
    """Ops, and the device their tensors have to be on."""

    name: str
    device: str
    op: Callable[[str], Callable[..., Any]]
    # How many cases with a thousand tensors it is tried with: fibers are slow.
    few: int = 3

    def call(self, name: str, arguments: tuple) -> tuple[Any, list]:
        """Run an op on copies; return its result and the copies afterwards, on the CPU."""
        mine = clone(list(arguments), self.device)
        result = self.op(name)(*mine)
        assert fences_hold(mine), f"{name} wrote beside its tensors"
        return (None if result is None else result.cpu()), to_cpu(mine)


def to_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [to_cpu(v) for v in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


@functools.cache
def emulator() -> ctypes.CDLL:
    """Compile and load the emulated kernels, as the ops fbopt_emulated::*."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", EMULATED_FLAGS)
        library = load.build("emulated", [EMULATED / "kernels.cpp"], "the emulated CUDA kernels")
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def target(name: str) -> Target:
    if name == "emulated":
        emulator()
        return Target(name, "cpu", lambda op: getattr(torch.ops.fbopt_emulated, op).default, few=1)
    if name == "dispatched":
        dispatch.table("cpu")
        return Target(name, "cpu", lambda op: getattr(torch.ops.fbopt, op).default)
    if name == "reference":
        return Target(name, "cpu", lambda op: getattr(reference, op))
    if name == "cuda":
        assert load.cuda_kernels() is not None  # not plain torch in their place
    return Target(name, name, lambda op: getattr(dispatch.table(name), op))


def rows(device, sizes, capacity, chunk):
    """The plan for a list of tensors: (first, count, blocks) of every launch."""
    found = (ctypes.c_int64 * (3 * len(sizes)))()
    n = device.plan(
        (ctypes.c_int64 * len(sizes))(*sizes),
        *map(ctypes.c_int64, (len(sizes), capacity, chunk)),
        found,
    )
    return [tuple(found[3 * i : 3 * i + 3]) for i in range(n)]


def span(device, sizes, chunk, block):
    """The tensor, begin and length that a block works on."""
    row = (ctypes.c_int64 * 3)()
    array = (ctypes.c_int64 * len(sizes))(*sizes)
    device.span(array, *map(ctypes.c_int64, (len(sizes), chunk, block)), row)
    return tuple(row)
