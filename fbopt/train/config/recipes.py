"""The recipes: the hyperparameters of every row of the paper's ladder, at two scales.

"images" is CIFAR-10's scale, from Geiping et al. (ICLR 2022, arXiv 2109.14119), section 4 and the
authors' released configurations; of the 40-fold table they ran fb-penalty alone. "small" is the
same ladder scaled down to a few thousand samples (MNIST-1D, digits): found by hand on MNIST-1D, not
by the paper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Recipe = dict[str, Any]  # values of the options of `fbopt train`


class Table(NamedTuple):
    """A table of the paper: title, the options that it changes, and known results."""

    title: str
    changes: Recipe
    note: str = ""


TABLES = {  # by the suffix of its recipes
    "": Table("without augmentation", {}, "full batch reaches over 90 %"),
    "-aug": Table("new crops and flips in every pass", {"augment": "random"}),
    "-x10": Table(
        "10 fixed crops and flips of every image",
        {"augment": "fixed", "replicas": 10},
        "full batch reaches over 95 %",
    ),
    "-x40": Table("40 fixed crops and flips of every image", {"augment": "fixed", "replicas": 40}),
}
STEPS = {  # what each adds; its published test accuracy (%) on CIFAR-10 with augmentation
    "sgd": ("stochastic baseline: shuffled mini-batches", "95.70 ± 0.11"),
    "fb": ("full batch, nothing else changed from sgd", "75.42 ± 0.13"),
    "fb-long": ("more steps, larger lr, longer warm-up", "87.36 ± 1.23"),
    "fb-clip": ("fb-long + global gradient clipping", "93.85 ± 0.10"),
    "fb-penalty": ("fb-clip + gradient penalty", "95.36 ± 0.07"),
    "fb-strong": ("fb-penalty on chunks of 32: a stronger penalty", "95.67 ± 0.08"),
    "fb-shuffled": ("fb-strong, samples shuffled into new chunks every pass", "95.91 ± 0.14"),
    "fb-gradreg": ("fb-penalty at twice the lr (the later release)", ""),
    "fb-sam": ("fb-penalty with SAM in place of the penalty", ""),
    "fb-asam": ("fb-penalty with ASAM in place of the penalty", ""),
}
RHO = {"sam": 0.05, "asam": 0.5}  # Foret et al. 2021 and Kwon et al. 2021, on CIFAR-10
_COMMON = {
    "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay": "all", "label_smoothing": 0.0,
    "augment": "none", "chunks": "fixed", "radius": 1e-2, "method": "forward",
}  # fmt: skip


def _ladder(model: str, lr: float, passes: int, batch_size: int, long: Recipe) -> dict[str, Recipe]:
    """All rows of all tables at one scale. The penalty is λ = lr·penalty/4 at the current lr.

    `lr`, `passes` and `batch_size` are those of sgd; `long` is what changes with more steps.
    """
    short = {"model": model, "lr": lr, "warmup": 5, "cosine": passes}
    sgd = short | {"epochs": passes, "batch_size": batch_size, "chunks": "shuffled"}
    fb = short | {"steps": passes, "chunk_size": 128}
    clip = fb | long | {"lr": 0.4, "max_norm": 0.25}
    penalty = clip | {"lr": 0.8, "penalty": 0.5}
    strong = penalty | {"chunk_size": 32}
    shuffled = strong | {"chunks": "shuffled"}
    gradreg = penalty | {"lr": 1.6}
    aware = [clip | {"lr": 0.8, "perturbation": kind} for kind in ("sam", "asam")]
    rows = sgd, fb, fb | long, clip, penalty, strong, shuffled, gradreg, *aware
    steps = dict(zip(STEPS, rows, strict=True))
    return {
        step + suffix: _COMMON | steps[step] | table.changes
        for suffix, table in TABLES.items()
        for step in steps
        if step != "fb-shuffled" or suffix == "-aug"
    }


_LONG = {"lr": 0.4, "warmup": 400, "cosine": 4000, "steps": 3000}
# The small network, which has no BatchNorm, diverges at lr 0.4 without clipping.
_SMALL_LONG = {"lr": 0.1, "warmup": 100, "cosine": 1300, "steps": 1000}
RECIPES: dict[str, dict[str, Recipe]] = {
    "images": _ladder("resnet18", 0.1, 300, 128, _LONG),
    "small": _ladder("cnn", 0.05, 200, 100, _SMALL_LONG),
}
NAMES = tuple(RECIPES["small"])


def chunks_at_once(values: Recipe) -> int:
    """How many chunks go through the model at once, given all other values, where it was measured
    to pay without torch.compile: docs/guides/vectorize.md.
    """
    measured = values["data"] in ("mnist1d", "digits") and values["model"] == "cnn"
    return 32 if measured and values["chunk_size"] <= 32 else 1


def split(name: str) -> tuple[str, str]:
    """The step of the ladder and the table's suffix: ("fb-clip", "-aug") for "fb-clip-aug"."""
    step = next(step for step in sorted(STEPS, key=len, reverse=True) if name.startswith(step))
    return step, name.removeprefix(step)


def summary(name: str) -> str:
    """What a recipe is, in words."""
    step, suffix = split(name)
    return f"{step}, {TABLES[suffix].title}" if suffix else STEPS[step][0]


def published(name: str, scale: str, model: str | None = None) -> str:
    """The published test accuracy (%) of a recipe; "" if unknown, as with another `model`.

    The paper has no figures for small data; there a row without augmentation has those of the same
    step of the ladder on CIFAR-10, to compare the gains from step to step.
    """
    step, suffix = split(name)
    known = suffix == "-aug" or (scale == "small" and not suffix)
    known &= model in (None, RECIPES[scale][name]["model"])
    return STEPS[step][1] if known else ""


def overview() -> str:
    """The steps of the ladder, for the help."""
    plain = [name for name in NAMES if not split(name)[1]]
    rows = "\n".join(f"  {step:11} {STEPS[step][0]}" for step in plain)
    return f"""recipes:\n\n{rows}\n\nWith -aug, -x10 or -x40 at the end: on augmented images;
`fbopt recipes` lists all of them, with their hyperparameters and the accuracies of the paper."""
