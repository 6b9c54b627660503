"""A short run of every kernel under a sanitizer: dtypes, layouts and alignments, stacks too, each
result compared with fbopt.reference in float64.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized

`--plant` makes a fault instead, which the tool has to find. On the CPU `make sanitize` runs this
under the compilers' own sanitizers: see benchmarks.sanitizers.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Operands, require_close
from benchmarks.kernels import RULE, KernelArguments, Place, Tensors, cloned
from fbopt import reference
from fbopt._build import load
from fbopt._ops import dispatch
from fbopt._ops.flat import DTYPES, accumulator_dtype, flat_size, flat_views, stacks_like

# Odd and even sizes, empty and 0-dim tensors, one block and several.
SHAPES = [torch.Size(s) for s in ((3, 4), (), (0,), (7,), (2, 3, 5, 5), (33, 65), (70001,))]
STACKED = ("squared_norm", "perturb_", "adaptive_norms", "perturb_adaptive_", "accumulate_")
STACKED += ("accumulate_penalty_", "accumulate_exact_", "accumulate_exact_penalty_")
# More tensors than the arguments of one launch hold.
MANY = [torch.Size([1 + i % 23]) for i in range(2500)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# What planted.cpp is called with.
FAULTS = {"overflow": 8, "undefined": 2**63 - 1, "race": 10_000}
PLANTED = ("planted", [Path(__file__).with_name("planted.cpp")], "planted faults")
AGREED = "calls agree with the reference"
Form = Callable[[KernelArguments, object], dict[str, Callable[[], object]]]


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


class StackArguments(KernelArguments):
    """Arguments with stacks of three chunks, for the ops that take them."""

    chunks = 3

    def __init__(self, chunk: Operands, *where: Any) -> None:
        super().__init__(chunk, *where)
        place = where[1] if len(where) > 1 else cloned
        self.grads, self.plus = (
            place([torch.stack([t * 2**k for k in range(self.chunks)]) for t in tensors])
            for tensors in (self.grads, self.plus)
        )
        like = stacks_like(self.params, self.chunks)
        self.perturbed, self.adapted = (
            self.perturbed.new_full((flat_size(like),), float("nan")) for _ in range(2)
        )
        scales = 2.0 ** torch.arange(self.chunks).to(self.square)
        self.square, self.weight = self.square * scales**2, self.weight * scales
        self.scaled = self.scaled * scales**2

    def calls(self, ops: object) -> dict[str, Callable[[], object]]:
        calls = {n: call for n, call in super().calls(ops).items() if n in STACKED}
        return calls | {"squared_norm": lambda: ops.squared_norm(self.grads, True)}

    def outcome(self, op: str) -> list[Tensor]:
        if op in ("perturb_", "perturb_adaptive_"):
            out = self.perturbed if op == "perturb_" else self.adapted
            return flat_views(out, stacks_like(self.params, self.chunks))
        return super().outcome(op)


def compare(
    shapes: Sequence[torch.Size], dtype: torch.dtype, layout: Place, device: torch.device
) -> int:
    """Run all ops on one set of arguments and compare; return the number of calls."""
    chunk = Operands.of(shapes)
    lists = {name: getattr(chunk, name) for name in ("params", "grads", "plus")}
    # The reference starts from values that the dtype can hold.
    chunk = replace(chunk, **{n: [t.to(dtype).double() for t in ts] for n, ts in lists.items()})
    calls = 0
    for kind in (KernelArguments, StackArguments):
        who = f"of {len(shapes)} tensors, {dtype}, {layout.__name__}, {kind.__name__}"
        found, right = kind(chunk, dtype, layout, device), kind(chunk, torch.float64)
        for form in (kind.calls, variants):
            calls += agree(who, form, found, right)
    return calls


def agree(who: str, form: Form, found: KernelArguments, right: KernelArguments) -> int:
    """Compare a form of each op that takes these arguments with its reference; count the ops."""
    calls, references = form(found, dispatch), form(right, reference)
    names = [name for name in calls if name in found.calls(dispatch)]
    for name in names:
        returned, wanted = calls[name](), references[name]()
        if wanted is not None:
            require_close(f"{name} {who}", "the squared norm", [returned], [wanted], 1e-6)
        results, expected = found.outcome(name), right.outcome(name)
        tolerance = TOLERANCES[results[0].dtype]
        require_close(f"{name} {who}", "the result", results, expected, tolerance)
    return len(names)


def plant(fault: str, device: torch.device) -> None:
    """Make a fault: on a GPU by a kernel of torch's, on the CPU by planted.cpp."""
    if fault == "device":
        plant_on_device(device)
    else:
        library = ctypes.CDLL(str(load.build(*PLANTED)))
        getattr(library, fault)(ctypes.c_int64(FAULTS[fault]))


def plant_on_device(device: torch.device) -> None:
    """Write 4 bytes past an allocation of 4,096."""
    t = torch.zeros(1024, device=device)
    storage = torch._C._construct_storage_from_data_pointer(t.data_ptr(), t.device, 4 * 1025)
    torch.empty(0, device=device).set_(storage, 0, (1025,), (1,)).fill_(1.0)
    torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all kernels and print how many calls agreed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument(
        "--plant",
        nargs="?",
        const="device",
        choices=("device", *FAULTS),
        help="make a fault instead; by default write out of bounds on the device",
    )
    choice = parser.parse_args(argv)
    # An allocation for each tensor: in torch's own blocks, what lies behind one is another's.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if choice.plant:
        plant(choice.plant, choice.device)
        return 0
    calls = sum(compare(*case, choice.device) for case in cases())
    print(f"{calls} {AGREED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
