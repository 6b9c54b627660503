"""`fbopt recipes`: the rows of the paper's tables, as published and as scaled down."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fbopt.train.config.published import TABLES, accuracy
from fbopt.train.config.recipes import RECIPES, Recipe

HEAD = ("recipe", "passes", "chunk", "lr", "warm-up", "cosine", "clip", "penalty", "accuracy (%)")
MODELS = {"images": "ResNet-18", "small": "the small CNN"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt recipes`; returns 0."""
    parser = argparse.ArgumentParser("fbopt recipes", description=__doc__)
    parser.add_argument(
        "--scale",
        choices=tuple(RECIPES),
        default="images",
        help="images: as published (default); small: for a few thousand samples",
    )
    print(listing(parser.parse_args(arguments).scale))
    return 0


def listing(scale: str) -> str:
    """The recipes of a scale, table by table."""
    first = next(iter(RECIPES[scale].values()))
    parts = [
        f"All rows: {MODELS[scale]}, momentum {first.momentum:g} (Nesterov), weight decay "
        f"{first.weight_decay:g}. A pass is a full-batch\nstep, or an epoch of sgd in mini-batches "
        "of the size of `chunk`. The learning rate rises over the warm-up,\nthen follows a cosine "
        "that would end after so many passes more."
    ]
    if scale == "images":
        parts[0] += (
            " Accuracies: Geiping et al. (ICLR 2022, arXiv\n2109.14119), CIFAR-10; – where none is "
            "known here."
        )
    else:
        parts[0] += " Found by hand on MNIST-1D; no claim\nof the paper."
    for table in TABLES:
        note = f" ({table.note})" if table.note and scale == "images" else ""
        rows = [_row(name, RECIPES[scale][name], scale) for name in table.names]
        parts.append(f"{table.title}{note}\n{_aligned([HEAD[: len(rows[0])], *rows])}")
    return "\n\n".join(parts)


def _row(name: str, recipe: Recipe, scale: str) -> tuple[str, ...]:
    size = recipe.batch_size or recipe.chunk_size
    return (
        name,
        f"{recipe.epochs or recipe.steps:,}",
        f"{size}, shuffled" if recipe.chunks == "shuffled" else str(size),
        f"{recipe.lr:g}",
        str(recipe.warmup),
        f"{recipe.cosine:,}",
        "–" if recipe.max_norm is None else f"{recipe.max_norm:g}",
        "–" if recipe.penalty is None else f"{recipe.penalty:g}",
        *([accuracy(name) or "–"] if scale == "images" else []),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
