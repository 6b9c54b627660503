"""The recipes as data: the hyperparameters of every row of the paper's ladder, at two scales.

"images" is CIFAR-10's scale, from Geiping et al. (ICLR 2022, arXiv 2109.14119), section 4 and the
authors' released configurations. "small" is the same ladder scaled down to a few thousand samples
(MNIST-1D, digits): found by hand on MNIST-1D, and no claim of the paper.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Recipe:
    """One row: `steps` and `chunk_size` for full batch, `epochs` and `batch_size` for SGD.

    The learning rate rises linearly over `warmup` passes, then follows a cosine that would reach
    zero after `cosine` more; a pass is an epoch of SGD or one full-batch step. The penalty is
    λ = lr·penalty/4 with the current learning rate (the authors' convention). `decay`, `augment`,
    `replicas`, `with_clean` and `chunks` are what `fbopt train --help` says of these options.
    """

    summary: str
    model: str
    lr: float
    warmup: int
    cosine: int
    steps: int | None = None
    epochs: int | None = None
    chunk_size: int | None = None
    batch_size: int | None = None
    max_norm: float | None = None
    penalty: float | None = None
    radius: float = 1e-2
    method: str = "forward"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay: str = "all"
    label_smoothing: float = 0.0
    augment: str = "none"
    replicas: int | None = None
    with_clean: bool = False
    chunks: str = "fixed"

    @property
    def stochastic(self) -> bool:
        """Whether this is mini-batch SGD rather than full-batch gradient descent."""
        return self.batch_size is not None


def _ladder(sgd: Recipe, fb: Recipe, long: Recipe) -> dict[str, Recipe]:
    """The rows of one table, without augmentation."""
    clip = replace(long, summary="fb-long + global gradient clipping", lr=0.4, max_norm=0.25)
    penalty = replace(clip, summary="fb-clip + gradient penalty", lr=0.8, penalty=0.5)
    strong = replace(
        penalty, summary="fb-penalty on chunks of 32: a stronger penalty", chunk_size=32
    )
    return {
        "sgd": sgd,
        "fb": fb,
        "fb-long": long,
        "fb-clip": clip,
        "fb-penalty": penalty,
        "fb-strong": strong,
    }


def _tables(*rows: Recipe) -> dict[str, Recipe]:
    """The paper's tables, one after the other: they differ by augmentation alone."""
    plain = _ladder(*rows)
    augmented = _changed(plain, "-aug", "new crops and flips in every pass", augment="random")
    shuffled = replace(
        augmented["fb-strong-aug"],
        summary="fb-strong-aug on shuffled chunks: full batch in practice",
        chunks="shuffled",
    )
    ten, forty = (
        _changed(rows, f"-x{r}", f"{r} fixed crops and flips of each", augment="fixed", replicas=r)
        for r, rows in ((10, plain), (40, {"fb-penalty": plain["fb-penalty"]}))
    )
    return plain | augmented | {"fb-shuffled-aug": shuffled} | ten | forty


def _changed(
    rows: dict[str, Recipe], suffix: str, words: str, **values: str | int
) -> dict[str, Recipe]:
    return {
        name + suffix: replace(row, summary=f"{name}, {words}", **values)
        for name, row in rows.items()
    }


def _sgd(model: str, **values: float) -> Recipe:
    summary = "stochastic baseline: shuffled mini-batches"
    return Recipe(summary, model, warmup=5, chunks="shuffled", **values)


_FB = "full batch, nothing else changed from sgd"
_LONG = "full batch, many more steps, larger rate, long warm-up"

RECIPES: dict[str, dict[str, Recipe]] = {
    "images": _tables(
        _sgd("resnet18", lr=0.1, cosine=300, epochs=300, batch_size=128),
        Recipe(_FB, "resnet18", lr=0.1, warmup=5, cosine=300, steps=300, chunk_size=128),
        Recipe(_LONG, "resnet18", lr=0.4, warmup=400, cosine=4000, steps=3000, chunk_size=128),
    ),
    "small": _tables(
        _sgd("cnn", lr=0.05, cosine=200, epochs=200, batch_size=100),
        Recipe(_FB, "cnn", lr=0.05, warmup=5, cosine=200, steps=200, chunk_size=128),
        # Without clipping this network, which has no BatchNorm, does not survive lr 0.4.
        Recipe(_LONG, "cnn", lr=0.1, warmup=100, cosine=1300, steps=1000, chunk_size=128),
    ),
}
NAMES = tuple(RECIPES["small"])


def scale_of(data: str) -> str:
    """The scale that `--data` has unless `--scale` says otherwise: "images", or "small"."""
    return "images" if data.startswith(("imagefolder:", "cifar")) else "small"


def is_stochastic(name: str) -> bool:
    """Whether the recipe `name` is mini-batch SGD rather than full-batch gradient descent."""
    recipe = RECIPES["images"].get(name)
    return recipe is not None and recipe.stochastic


ACCURACY = {
    "sgd-aug": "95.70 ± 0.11",
    "fb-aug": "75.42 ± 0.13",
    "fb-long-aug": "87.36 ± 1.23",
    "fb-clip-aug": "93.85 ± 0.10",
    "fb-penalty-aug": "95.36 ± 0.07",
    "fb-strong-aug": "95.67 ± 0.08",
    "fb-shuffled-aug": "95.91 ± 0.14",
}


class Table(NamedTuple):
    """A table of the paper: its title, the suffix of its recipes, what else is known of it."""

    title: str
    suffix: str
    note: str = ""

    @property
    def names(self) -> list[str]:
        """The recipes of its rows, in order."""
        if self.suffix:
            return [name for name in NAMES if name.endswith(self.suffix)]
        return [name for name in NAMES if not name.endswith(("-aug", "-x10", "-x40"))]


TABLES = (
    Table("Without augmentation", "", "full batch reaches over 90 %"),
    Table("With augmentation: new crops and flips in every pass", "-aug"),
    Table("A fixed data set, 10 times enlarged", "-x10", "full batch reaches over 95 %"),
    Table("A fixed data set, 40 times enlarged", "-x40"),
)


def accuracy(name: str) -> str:
    """The published test accuracy (%) of a recipe's own row, "" where it is not known here."""
    return ACCURACY.get(name, "")


def step_of_the_ladder(name: str) -> str:
    """The published figure of the same step of the ladder, with augmentation; "" if unknown.

    For small data, which the paper has no figures for: what each step was worth there.
    """
    return accuracy(name) or ACCURACY.get(f"{name}-aug", "")


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
