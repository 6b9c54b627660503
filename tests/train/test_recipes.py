"""The recipes against the published hyperparameters and accuracies, and their list."""

from __future__ import annotations

import pytest

from fbopt.train.config import listing, recipes
from fbopt.train.config.options import Options
from fbopt.train.config.resolve import resolve

# The authors' configurations (base_sgd, fb1, fb2, fbclip, gradreg, and gradreg on chunks of 32):
# lr, passes, warm-up, length of the cosine, samples at a time, clipping, penalty.
ROWS = {
    "sgd": (0.1, 300, 5, 300, 128, None, None),
    "fb": (0.1, 300, 5, 300, 128, None, None),
    "fb-long": (0.4, 3000, 400, 4000, 128, None, None),
    "fb-clip": (0.4, 3000, 400, 4000, 128, 0.25, None),
    "fb-penalty": (0.8, 3000, 400, 4000, 128, 0.25, 0.5),
    "fb-strong": (0.8, 3000, 400, 4000, 32, 0.25, 0.5),
}
ROWS["fb-shuffled"] = ROWS["fb-strong"]
ROWS["fb-gradreg"] = (1.6, *ROWS["fb-penalty"][1:])  # hubconf.py: resnet18_fbaug_gradreg_v2
# Not the authors': fb-penalty with SAM in its place.
ROWS |= dict.fromkeys(("fb-sam", "fb-asam"), (*ROWS["fb-penalty"][:6], None))
TABLES = {
    "": ("none", None),
    "-aug": ("random", None),
    "-x10": ("fixed", 10),
    "-x40": ("fixed", 40),
}


@pytest.mark.parametrize("name", recipes.NAMES)
def test_published_hyperparameters(name):
    row, table = recipes.split(name)
    o = resolve(Options(data="cifar10", recipe=name, device="cpu"))
    size = o.batch_size if o.stochastic else o.chunk_size
    found = (o.lr, o.passes, o.warmup, o.cosine, size, o.max_norm, o.penalty)
    assert found == ROWS[row]
    assert (o.augment, o.replicas) == TABLES[table] and not o.with_clean
    assert o.chunks == ("shuffled" if row in ("sgd", "fb-shuffled") else "fixed")
    assert (o.model, o.momentum, o.nesterov, o.weight_decay) == ("resnet18", 0.9, True, 5e-4)
    assert (o.decay, o.label_smoothing, o.stochastic) == ("all", 0, row == "sgd")
    if o.penalty:
        assert (o.radius, o.method) == (1e-2, "forward")
    rho = {"fb-sam": 0.05, "fb-asam": 0.5}.get(row)  # those of the papers on SAM and ASAM
    assert (o.rho, o.scope, o.sam_share) == (rho, *((None,) * 2 if rho is None else ("chunk", 1)))


def test_every_row_of_the_published_tables_has_a_recipe():
    rungs = [name for name in ROWS if name != "fb-shuffled"]
    expected = [
        *rungs,
        *(f"{name}-aug" for name in ROWS),
        *(f"{name}-x10" for name in rungs),
        *(f"{name}-x40" for name in rungs),
    ]
    assert list(recipes.NAMES) == expected
    assert list(recipes.TABLES) == list(TABLES)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_small_versions_differ_from_each_other_like_the_published_ones(name):
    """The rates and steps of the small ladder were found by hand; the rest is the paper's."""
    images, small = (recipes.RECIPES[scale][name] for scale in ("images", "small"))
    assert images.keys() == small.keys()
    for key in images.keys() - {"model", "lr", "warmup", "cosine", "steps", "epochs", "batch_size"}:
        assert images[key] == small[key]
    assert small["model"] == "cnn"


ACCURACY = {
    "sgd-aug": 95.70, "fb-aug": 75.42, "fb-long-aug": 87.36, "fb-clip-aug": 93.85,
    "fb-penalty-aug": 95.36, "fb-strong-aug": 95.67, "fb-shuffled-aug": 95.91,
}  # fmt: skip


def test_published_accuracies():
    for name in recipes.NAMES:
        words = recipes.published(name, "images")
        assert (float(words.split(" ±")[0]) if words else None) == ACCURACY.get(name)
    for name in ("fb", "fb-aug"):
        assert recipes.published(name, "small") == "75.42 ± 0.13"
    assert recipes.published("fb-x10", "small") == ""
    assert recipes.published("fb-aug", "images", "resnet18") == "75.42 ± 0.13"
    assert recipes.published("fb-aug", "images", "resnet50") == ""  # the figures are ResNet-18's


def test_the_help_names_every_rung():
    text = recipes.overview()
    for name in recipes.NAMES:
        assert recipes.split(name)[1] or f"  {name} " in text


@pytest.mark.parametrize("scale", tuple(recipes.RECIPES))
def test_list(scale, capsys):
    assert listing.main(["--scale", scale]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in recipes.NAMES}
    assert tuple(rows) == recipes.NAMES
    first = {"images": "3,000", "small": "1,000"}[scale]
    assert rows["fb-strong-x10"][1:3] == [first, "32"] and "0.25" in rows["fb-strong-x10"]
    assert ("95.67" in rows["fb-strong-aug"]) == (scale == "images")
