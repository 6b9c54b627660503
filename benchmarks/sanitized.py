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

from benchmarks.cases import Operands, require_close
from benchmarks.kernels import RULE, KernelArguments, Place, Tensors, cloned
from fbopt import reference
from fbopt._ops import dispatch
from fbopt._ops.flat import DTYPES, accumulator_dtype, flat_size, flat_views

# Odd and even sizes, empty and 0-dim tensors, one block and several.
SHAPES = [torch.Size(s) for s in ((3, 4), (), (0,), (7,), (2, 3, 5, 5), (33, 65), (70001,))]
# More tensors than the arguments of one launch hold.
MANY = [torch.Size([1 + i % 23]) for i in range(2500)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
AGREED = "calls agree with the reference"


def misaligned(tensors: Tensors) -> Tensors:
    """One element behind an aligned address."""
    return [torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for t in tensors]


def gapped(tensors: Tensors) -> Tensors:
    """Strided: in every second element of memory."""
    return [torch.stack([t, t], -1)[..., 0] for t in tensors]


def transposed(tensors: Tensors) -> Tensors:
    """With the order of the dimensions in memory reversed."""
    orders = [list(range(t.dim()))[::-1] for t in tensors]
    return [
        torch.empty_permuted(t.shape, o, dtype=t.dtype, device=t.device).copy_(t)
        for t, o in zip(tensors, orders, strict=True)
    ]


def pooled(tensors: Tensors) -> Tensors:
    """All in one allocation; many allocations are slow under a sanitizer."""
    views = flat_views(tensors[0].new_zeros(flat_size(tensors)), tensors)
    torch._foreach_copy_(views, tensors)
    return views


def cases() -> Iterator[tuple[list[torch.Size], torch.dtype, Place]]:
    """The shapes, dtype and layout of each set of arguments."""
    for dtype in DTYPES:
        for layout in (cloned, misaligned, gapped, transposed):
            yield SHAPES, dtype, layout
    for dtype in (torch.float32, torch.bfloat16):
        yield MANY, dtype, pooled


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
    chunk = Operands.of(shapes)
    lists = {name: getattr(chunk, name) for name in ("params", "grads", "plus")}
    # The reference starts from values that the dtype can hold.
    chunk = replace(chunk, **{n: [t.to(dtype).double() for t in ts] for n, ts in lists.items()})
    found = KernelArguments(chunk, dtype, layout, device)
    right = KernelArguments(chunk, torch.float64)
    who = f"of {len(shapes)} tensors, {dtype}, {layout.__name__}"
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
