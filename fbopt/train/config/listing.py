"""`fbopt recipes`: the hyperparameters of all recipes, and the published accuracies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fbopt.train.config.parser import parse, wrapped
from fbopt.train.config.recipes import NAMES, RECIPES, RHO, TABLES, Recipe, published, split

HEAD = (
    "recipe",
    "passes",
    "chunk",
    "lr",
    "warm-up",
    "cosine",
    "clip",
    "perturbation",
    "accuracy (%)",
)
ABOUT = """All rows: {model}, momentum {momentum:g} (Nesterov), weight decay {weight_decay:g}. A
pass is a full-batch step, or an epoch of sgd in mini-batches of the size of `chunk`. The learning
rate rises over the warm-up passes, then follows a cosine that would end after that many passes
more."""
MODELS = {"images": "ResNet-18", "small": "the small CNN"}
SOURCES = {
    "images": "Accuracies: Geiping et al. (ICLR 2022, arXiv 2109.14119), CIFAR-10; – if unknown.",
    "small": "Found by hand on MNIST-1D, not by the paper.",
}


@dataclass(frozen=True)
class Listing:
    """List the recipes, the rows of the paper's ladder, with their hyperparameters."""

    scale: Literal["images", "small"] = "images"
    """images: as published; small: scaled down to a few thousand samples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fbopt recipes`; returns 0."""
    (options,) = parse("fbopt recipes", arguments, Listing)
    print(listing(options.scale))
    return 0


def listing(scale: str) -> str:
    """The recipes of a scale, table by table."""
    rows = RECIPES[scale]
    about = ABOUT.format_map(rows["fb"] | {"model": MODELS[scale]})
    parts = [wrapped(f"{about} {SOURCES[scale]}")]
    for suffix, table in TABLES.items():
        title = table.title[0].upper() + table.title[1:]
        note = f" ({table.note})" if table.note and scale == "images" else ""
        cells = [_row(n, rows[n], scale) for n in NAMES if split(n)[1] == suffix]
        parts.append(f"{title}{note}\n{_aligned([HEAD[: len(cells[0])], *cells])}")
    return "\n\n".join(parts)


def _row(name: str, recipe: Recipe, scale: str) -> tuple[str, ...]:
    size = recipe.get("batch_size") or recipe["chunk_size"]
    return (
        name,
        f"{recipe.get('epochs') or recipe['steps']:,}",
        f"{size}, shuffled" if recipe["chunks"] == "shuffled" else str(size),
        f"{recipe['lr']:g}",
        str(recipe["warmup"]),
        f"{recipe['cosine']:,}",
        f"{recipe['max_norm']:g}" if "max_norm" in recipe else "–",
        _perturbation(recipe),
        *([published(name, scale) or "–"] if scale == "images" else []),
    )


def _perturbation(recipe: Recipe) -> str:
    if kind := recipe.get("perturbation"):
        return f"{kind} {RHO[kind]:g}"
    return f"penalty {recipe['penalty']:g}" if "penalty" in recipe else "–"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
