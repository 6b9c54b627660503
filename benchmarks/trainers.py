"""What trainers do by themselves with ragged batches and tokens, beside fbopt's integrations.

    python -m benchmarks.trainers            every trainer that is installed
    python -m benchmarks.trainers lightning  one of them

Three steps of gradient accumulation in float64; the error is the largest difference of a parameter
from the same steps on one batch that holds all samples (tokens) of each window. A trainer is a
module of this folder, trainer_NAME.py, whose `run(case, ours)` returns that error, for CASES and
its own MORE. With bfloat16 parameters it is the gradient's error in the first step, relative to its
norm, of 256 batches.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

TRAINERS = ("lightning", "accelerate", "transformers")
STEPS, LR = 3, 0.5
# A case: batches of each window, a batch as its number of sequences and its targets that count.
CASES = {
    "ragged batch": [[(8, 4), (8, 4), (2, 4)]] * STEPS,
    "tokens": [[(4, 4), (4, 1), (4, 2)]] * STEPS,
    "leftover window": [[(8, 4)] * 3, [(8, 4)] * 3, [(8, 4), (2, 4)]],
}
BFLOAT16 = "bfloat16 parameters"
IGNORED = -100
LENGTH = 4


def model(case: str = "") -> nn.Sequential:
    """Return the network; input (sequences, LENGTH, 5), 3 classes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return network.to(torch.bfloat16 if case == BFLOAT16 else torch.float64)


def loss_fn(output: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the targets that are not IGNORED."""
    return nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def tokens(labels: Tensor) -> Tensor:
    """Return how many targets count."""
    return (labels != IGNORED).sum()


def windows(case: str) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the (input, labels) batches of each optimizer step."""
    draw = torch.Generator().manual_seed(1)
    if case == BFLOAT16:
        batches = [_batch(draw, 1, 4) for _ in range(256)]
        return [[(x.bfloat16(), labels) for x, labels in batches]]
    return [[_batch(draw, *sizes) for sizes in window] for window in CASES[case]]


def _batch(draw: torch.Generator, sequences: int, counted: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(sequences, LENGTH, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (sequences, LENGTH), generator=draw)
    labels[:, counted:] = IGNORED
    return x, labels


def error(trained: nn.Module, case: str) -> float:
    """Return the largest difference from SGD on one batch for each window."""
    reference = model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR)
    for window in windows(case):
        x, labels = (torch.cat(parts) for parts in zip(*window, strict=True))
        optimizer.zero_grad()
        loss_fn(reference(x), labels).backward()
        optimizer.step()
    pairs = zip(trained.parameters(), reference.parameters(), strict=True)
    return max((p.detach() - q).abs().max().item() for p, q in pairs)


def gradient_error(network: nn.Module, case: str) -> float:
    """Return the distance of p.grad from one batch's in float64, relative to its norm."""
    (window,) = windows(case)
    x, labels = (torch.cat(parts) for parts in zip(*window, strict=True))
    wide = model(case).double()
    grads = torch.autograd.grad(loss_fn(wide(x.double()), labels), list(wide.parameters()))
    expected = torch.cat([g.flatten() for g in grads])
    found = torch.cat([p.grad.double().flatten() for p in network.parameters()])
    return ((found - expected).norm() / expected.norm()).item()


def table(names: list[str]) -> list[str]:
    """Return the rows, in Markdown."""
    rows = ["| trainer | case | by itself | with fbopt |", "| --- | --- | ---: | ---: |"]
    for name in names:
        module = importlib.import_module(f"benchmarks.trainer_{name}")
        run: Callable[[str, bool], float] = module.run
        for case in (*CASES, *getattr(module, "MORE", ())):
            rows.append(f"| {name} | {case} | {run(case, False):.1e} | {run(case, True):.1e} |")
    return rows


def main() -> None:
    asked = sys.argv[1:] or [name for name in TRAINERS if find_spec(name)]
    print("\n".join(table(asked)))


if __name__ == "__main__":
    main()
