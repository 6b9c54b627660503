"""A short run of every kernel for compute-sanitizer: dtypes, layouts and alignments, each result
compared with fbopt.reference in float64.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized

`--plant` writes past the end of an allocation instead, which memcheck has to find.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Chunk, require_close
from benchmarks.kernels import RULE, KernelArguments
from fbopt import reference
from fbopt._ops import dispatch
from fbopt._ops.flat import ALIGN, DTYPES, accumulator_dtype

# Odd and even sizes, empty and 0-dim tensors, one block and several.
SHAPES = [torch.Size(s) for s in ((3, 4), (), (0,), (7,), (2, 3, 5, 5), (33, 65), (70001,))]
# More tensors than the arguments of one launch hold.
MANY = [torch.Size([1 + i % 23]) for i in range(2500)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
AGREED = "calls agree with the reference"
Place = Callable[[Tensor], Tensor]


def misaligned(t: Tensor) -> Tensor:
    """One element behind an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def gapped(t: Tensor) -> Tensor:
    """In every second element of memory."""
    return torch.stack([t, t], -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    """With the order of the dimensions in memory reversed."""
    order = list(range(t.dim()))[::-1]
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


class Pooled:
    """Many small tensors in few allocations, which are slow under a sanitizer."""

    def __init__(self) -> None:
        self._left = torch.empty(0)

    def __call__(self, t: Tensor) -> Tensor:
        if t.numel() > len(self._left) or t.dtype != self._left.dtype:
            self._left = t.new_zeros(1 << 16)
        found = self._left[: t.numel()].view(t.shape).copy_(t)
        self._left = self._left[-(-t.numel() // ALIGN) * ALIGN :]
        return found


LAYOUTS: tuple[Place, ...] = (Tensor.clone, misaligned, gapped, transposed)


def cases() -> Iterator[tuple[list[torch.Size], torch.dtype, Place]]:
    """The shapes, dtype and layout of each set of arguments."""
    for dtype in DTYPES:
        yield from ((SHAPES, dtype, layout) for layout in LAYOUTS)
    for dtype in (torch.float32, torch.bfloat16):
        yield MANY, dtype, Pooled()


def variants(a: KernelArguments, ops: object) -> dict[str, Callable[[], object]]:
    """Other forms of the ops: central differences, a known norm, other rules of SGD."""
    sums = [g.to(accumulator_dtype(g.dtype), copy=True) for g in a.grads]
    plain = RULE | {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    first = RULE | {"nesterov": False, "maximize": True, "first": True}
    penalty, passes = (a.coefficient, a.square, a.chunk.radius), (a.grads, a.plus, a.grads)
    clip = a.weight, a.norm, 0.5

    def steps() -> None:
        ops.sgd_step_(a.stepped, sums, a.velocity, a.lr, *clip, **first)
        ops.sgd_step_(a.stepped, a.grads, [], a.lr, None, None, None, **plain)
        ops.sgd_step_(a.stepped, sums, a.velocity, a.lr, *clip, **RULE)

    return {
        "perturb_": lambda: ops.perturb_(a.perturbed, a.params, a.grads, -1.0, a.square),
        "accumulate_penalty_": lambda: ops.accumulate_penalty_(
            a.penalised, *passes, a.weight, *penalty
        ),
        "accumulate_exact_penalty_": lambda: ops.accumulate_exact_penalty_(
            *a.exact_penalised, *passes, a.weight, a.scales, *penalty
        ),
        "sgd_step_": steps,
    }


def compare(
    shapes: Sequence[torch.Size], dtype: torch.dtype, layout: Place, device: torch.device
) -> int:
    """Run all ops on one set of arguments and compare; return the number of calls."""
    chunk = Chunk.of(shapes)
    lists = {name: getattr(chunk, name) for name in ("params", "grads", "plus")}
    # The reference starts from values that the dtype can hold.
    chunk = replace(chunk, **{n: [t.to(dtype).double() for t in ts] for n, ts in lists.items()})
    found = KernelArguments(chunk, dtype, layout, device)
    right = KernelArguments(chunk, torch.float64)
    who = f"of {len(shapes)} tensors, {dtype}, {getattr(layout, '__name__', 'pooled')}"
    forms = (KernelArguments.calls, variants)
    for form in forms:
        references = form(right, reference)
        for op, call in form(found, dispatch).items():
            call()
            references[op]()
            results, expected = (side.outcome(op) for side in (found, right))
            tolerance = TOLERANCES[results[0].dtype]
            require_close(f"{op} {who}", "the result", results, expected, tolerance)
    return sum(len(form(found, dispatch)) for form in forms)


def plant(device: torch.device) -> None:
    """Write 4 bytes past an allocation of 4,096, by a kernel of torch's."""
    t = torch.zeros(1024, device=device)
    storage = torch._C._construct_storage_from_data_pointer(t.data_ptr(), t.device, 4 * 1025)
    torch.empty(0, device=device).set_(storage, 0, (1025,), (1,)).fill_(1.0)
    torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all kernels and print how many calls agreed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--plant", action="store_true", help="write out of bounds instead")
    choice = parser.parse_args(argv)
    # An allocation for each tensor: in torch's own blocks, what lies behind one is another's.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if choice.plant:
        plant(choice.device)
        return 0
    calls = sum(compare(*case, choice.device) for case in cases())
    print(f"{calls} {AGREED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
