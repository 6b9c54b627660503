"""The recipes: the hyperparameters of every row of the paper's ladder, at two scales.

"images" is CIFAR-10's scale, from Geiping et al. (ICLR 2022, arXiv 2109.14119), section 4 and the
authors' released configurations. "small" is the same ladder scaled down to a few thousand samples
(MNIST-1D, digits): found by hand on MNIST-1D, not by the paper. `fbopt recipes` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Recipe:
    """One row: `steps` and `chunk_size` for full batch, `epochs` and `batch_size` for SGD.

    The learning rate rises linearly over `warmup` passes, then follows a cosine that would reach
    zero after `cosine` more; a pass is an epoch of SGD or one full-batch step. The penalty is
    λ = lr·penalty/4 with the current learning rate (the authors' convention). `fbopt train --help`
    explains every field.
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
    chunks: str = "fixed"

    @property
    def stochastic(self) -> bool:
        """Whether this is mini-batch SGD rather than full-batch gradient descent."""
        return self.batch_size is not None


class Table(NamedTuple):
    """A table of the paper: the suffix of its recipes, what it changes and what is known of it."""

    suffix: str
    title: str
    changes: dict[str, Any]
    note: str = ""


TABLES = (
    Table("", "without augmentation", {}, "full batch reaches over 90 %"),
    Table("-aug", "new crops and flips in every pass", {"augment": "random"}),
    Table(
        "-x10",
        "10 fixed crops and flips of every image",
        {"augment": "fixed", "replicas": 10},
        "full batch reaches over 95 %",
    ),
    Table("-x40", "40 fixed crops and flips of every image", {"augment": "fixed", "replicas": 40}),
)


def _ladder(sgd: Recipe, fb: Recipe, long: Recipe) -> dict[str, Recipe]:
    """All rows of all tables, from the first three."""
    clip = replace(long, summary="fb-long + global gradient clipping", lr=0.4, max_norm=0.25)
    penalty = replace(clip, summary="fb-clip + gradient penalty", lr=0.8, penalty=0.5)
    strong = replace(
        penalty, summary="fb-penalty on chunks of 32: a stronger penalty", chunk_size=32
    )
    steps = {
        "sgd": sgd,
        "fb": fb,
        "fb-long": long,
        "fb-clip": clip,
        "fb-penalty": penalty,
        "fb-strong": strong,
    }
    rows = dict(steps)
    for suffix, title, changes, _ in TABLES[1:]:
        for name in ("fb-penalty",) if suffix == "-x40" else steps:
            rows[name + suffix] = replace(steps[name], summary=f"{name}, {title}", **changes)
        if suffix == "-aug":
            rows["fb-shuffled-aug"] = replace(
                rows["fb-strong-aug"],
                summary="fb-strong-aug, samples shuffled into new chunks every pass",
                chunks="shuffled",
            )
    return rows


def _sgd(model: str, **values: float) -> Recipe:
    summary = "stochastic baseline: shuffled mini-batches"
    return Recipe(summary, model, warmup=5, chunks="shuffled", **values)


_FB = "full batch, nothing else changed from sgd"
_LONG = "more steps, larger learning rate, longer warm-up"

RECIPES: dict[str, dict[str, Recipe]] = {
    "images": _ladder(
        _sgd("resnet18", lr=0.1, cosine=300, epochs=300, batch_size=128),
        Recipe(_FB, "resnet18", lr=0.1, warmup=5, cosine=300, steps=300, chunk_size=128),
        Recipe(_LONG, "resnet18", lr=0.4, warmup=400, cosine=4000, steps=3000, chunk_size=128),
    ),
    "small": _ladder(
        _sgd("cnn", lr=0.05, cosine=200, epochs=200, batch_size=100),
        Recipe(_FB, "cnn", lr=0.05, warmup=5, cosine=200, steps=200, chunk_size=128),
        # This network, which has no BatchNorm, diverges at lr 0.4 without clipping.
        Recipe(_LONG, "cnn", lr=0.1, warmup=100, cosine=1300, steps=1000, chunk_size=128),
    ),
}
NAMES = tuple(RECIPES["small"])

# Published test accuracy (%) on CIFAR-10 with augmentation, where known: mean ± deviation.
_PUBLISHED = {
    "sgd": "95.70 ± 0.11",
    "fb": "75.42 ± 0.13",
    "fb-long": "87.36 ± 1.23",
    "fb-clip": "93.85 ± 0.10",
    "fb-penalty": "95.36 ± 0.07",
    "fb-strong": "95.67 ± 0.08",
    "fb-shuffled": "95.91 ± 0.14",
}


def split(name: str) -> tuple[str, str]:
    """The step of the ladder and the table's suffix: ("fb-clip", "-aug") for "fb-clip-aug"."""
    suffix = next((t.suffix for t in TABLES[1:] if name.endswith(t.suffix)), "")
    return name.removesuffix(suffix), suffix


def published(name: str, scale: str) -> str:
    """The published test accuracy (%) of a recipe; "" if unknown.

    The paper has no figures for small data; there a row without augmentation has those of the same
    step of the ladder on CIFAR-10, to compare the gains from step to step.
    """
    step, suffix = split(name)
    known = suffix == "-aug" or (scale == "small" and not suffix)
    return _PUBLISHED.get(step, "") if known else ""
