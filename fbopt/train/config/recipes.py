"""The recipes as data: the hyperparameters of every row of the paper's ladder, at two scales.

"images" is CIFAR-10's scale, from Geiping et al. (ICLR 2022, arXiv 2109.14119), section 4 and the
authors' released configurations. "small" is the same ladder scaled down to a few thousand samples
(MNIST-1D, digits): found by hand on MNIST-1D, and no claim of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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
