"""A short parity run for compute-sanitizer: every op and its variants over dtypes, layouts and
alignments, each result compared with fbopt.reference in float64.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized

`--plant` writes past the end of an allocation instead: a tool that does not say so sees nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Chunk, require_close, scalar
from benchmarks.devices import CPU
from benchmarks.single import RULE, Calls, Operands
from fbopt._ops import dispatch, reference
from fbopt._ops.flat import ALIGN, DTYPES, accumulator_dtype

# Odd and even, empty and 0-dim, one block and several.
SHAPES = [torch.Size(s) for s in ((3, 4), (), (0,), (7,), (2, 3, 5, 5), (33, 65), (70001,))]
ONE = [torch.Size([4099])]
# More tensors than the arguments of a launch hold.
MANY = [torch.Size([1 + i % 23]) for i in range(2500)]
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
AGREED = "calls agree with the reference"
Layout = Callable[[Tensor, torch.device], Tensor]


def dense(t: Tensor, device: torch.device) -> Tensor:
    """A copy as it is."""
    return t.to(device, copy=True)


def misaligned(t: Tensor, device: torch.device) -> Tensor:
    """One element behind an aligned address."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=device)
    return flat[1:].view(t.shape).copy_(t)


def gapped(t: Tensor, device: torch.device) -> Tensor:
    """In every second element of memory."""
    return torch.zeros(*t.shape, 2, dtype=t.dtype, device=device)[..., 0].copy_(t)


def transposed(t: Tensor, device: torch.device) -> Tensor:
    """With the order of the dimensions in memory reversed."""
    order = list(range(t.dim()))[::-1]
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(order).to(device)


def channels_last(t: Tensor, device: torch.device) -> Tensor:
    """Images with their channels last."""
    memory_format = torch.channels_last if t.dim() == 4 else torch.contiguous_format
    return t.clone(memory_format=memory_format).to(device)


LAYOUTS = (dense, misaligned, gapped, transposed, channels_last)


class Mixed:
    """One layout after the other, so that the lists of a call differ."""

    def __init__(self) -> None:
        self._layouts = itertools.cycle(LAYOUTS)

    def __call__(self, t: Tensor, device: torch.device) -> Tensor:
        return next(self._layouts)(t, device)


class Pooled:
    """Many small tensors in few allocations, which take their time under a sanitizer."""

    BLOCK = 1 << 16

    def __init__(self) -> None:
        self._left = torch.empty(0)

    def __call__(self, t: Tensor, device: torch.device) -> Tensor:
        if t.numel() > len(self._left) or t.dtype != self._left.dtype:
            self._left = torch.zeros(self.BLOCK, dtype=t.dtype, device=device)
        found = self._left[: t.numel()].view(t.shape).copy_(t)
        self._left = self._left[-(-t.numel() // ALIGN) * ALIGN :]
        return found


def cases() -> Iterator[tuple[list[torch.Size], torch.dtype, Layout]]:
    """The shapes, the type and the layout of each set of operands."""
    for dtype in DTYPES:
        for layout in (*LAYOUTS, Mixed()):
            yield SHAPES, dtype, layout
        yield ONE, dtype, dense
        yield ONE, dtype, misaligned
    for dtype in (torch.float32, torch.bfloat16):
        yield MANY, dtype, Pooled()


def variants(operands: Operands, ops: object) -> Calls:
    """The ops' other forms, besides those of Operands.calls; all write to the same places."""
    o, c = operands, operands.chunk
    sums = [g.to(accumulator_dtype(g.dtype), copy=True) for g in o.grads]
    plain = RULE | {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    first = RULE | {"nesterov": False, "maximize": True, "first": True}

    def step(grads: list[Tensor], velocity: list[Tensor], divisor: Tensor | None, rule: dict):
        norm, bound = (None, None) if divisor is None else (o.norm, 0.5)
        ops.sgd_step_(o.stepped, grads, velocity, o.lr, divisor, norm, bound, **rule)

    return {
        "perturb_": lambda: ops.perturb_(o.shifted, o.params, o.grads, -c.radius, o.square),
        "accumulate_penalty_": lambda: ops.accumulate_penalty_(
            o.penalised, o.grads, o.plus, o.grads, o.weight, o.coefficient, o.square, c.radius
        ),
        "accumulate_exact_penalty_": lambda: ops.accumulate_exact_penalty_(
            *o.exact_penalised,
            o.grads,
            o.plus,
            o.grads,
            o.weight,
            o.scales,
            o.coefficient,
            o.square,
            c.radius,
        ),
        "sgd_step_": lambda: (
            step(sums, o.velocity, o.weight, first),
            step(o.grads, [], None, plain),
            step(sums, o.velocity, o.weight, RULE),
        ),
    }


def compare(
    shapes: Sequence[torch.Size], dtype: torch.dtype, layout: Layout, device: torch.device
) -> int:
    """Run all ops on one set of operands and compare; return how many calls were made.

    The reference starts from values that the type can hold.
    """
    chunk = Chunk.of(shapes)
    lists = {name: getattr(chunk, name) for name in ("params", "grads", "plus")}
    chunk = replace(chunk, **{n: [t.to(dtype).double() for t in ts] for n, ts in lists.items()})
    found = Operands(chunk, dtype, functools.partial(layout, device=device), device)
    wanted = Operands(chunk, torch.float64)
    pairs = [(found.calls(dispatch), wanted.calls(reference))]
    pairs += [(variants(found, dispatch), variants(wanted, reference))]
    name, calls = getattr(layout, "__name__", type(layout).__name__), 0
    for ours, oracle in pairs:
        for op, call in ours.items():
            call()
            oracle[op]()
            results, right = (_flat(o.outcome(op)) for o in (found, wanted))
            tolerance = TOLERANCES[results.dtype]
            who = f"{op} of {len(shapes)} tensors, {dtype}, {name}"
            require_close(who, "the result", [results], [right], tolerance)
            calls += 1
    return calls


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, on the CPU in one copy."""
    return torch.cat([t.reshape(-1) for t in tensors]).cpu()


def nothing(device: torch.device) -> None:
    """Empty lists."""
    dispatch.accumulate_([], [], scalar(1.0, device))
    dispatch.clip_([], scalar(1.0, device), 1.0)
    dispatch.pack_(torch.empty(0, device=device), [])


def plant(device: torch.device) -> None:
    """Write 4 bytes past an allocation of 4,096, by a kernel of torch's."""
    honest = torch.zeros(1024, device=device)
    storage = torch._C._construct_storage_from_data_pointer(honest.data_ptr(), device, 4 * 1025)
    torch.empty(0, device=device).set_(storage, 0, (1025,), (1,)).fill_(1.0)
    torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print how many calls agreed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plant", action="store_true", help="write out of bounds instead")
    choice = parser.parse_args(argv)
    if choice.device == "cuda":
        # An allocation for each tensor: in torch's own blocks, what lies behind one is another's.
        os.environ[UNCACHED] = "1"
    device = CPU if choice.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    if choice.plant:
        plant(device)
        return 0
    nothing(device)
    calls = sum(compare(*case, device) for case in cases())
    print(f"{calls} {AGREED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
